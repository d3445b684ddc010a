import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diffedu import digit_training, mnist_files, weights
from diffedu import digits as module
from diffedu.digit_metrics import accuracy
from diffedu.digits import CLASSES, MNIST, to_floats
from diffedu.networks import Labelled
from diffedu.training import Recipe

SMALL = replace(MNIST, batch=8, recipe=Recipe(steps=4, lr=1e-3, ema=0.9, warmup=1))


@pytest.fixture(scope="module")
def digits():
    images, labels = mnist_files.subset("test")
    return images[:100], labels[:100].long()


@pytest.fixture
def single_precision(monkeypatch):
    """No bf16, also where the processor has it: gradients of equal batches are then equal to rounding."""
    monkeypatch.setattr(module, "half_precision", lambda device: contextlib.nullcontext())


class Recorder(nn.Module):
    """A network that predicts 0 and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, lam, labels=None):
        self.calls.append((x, lam, labels))
        return torch.zeros_like(x)


def asked(model, digits, seed=0, part=(0, 1)):
    net = Recorder()
    values = model.loss(*digits, part)(net, torch.Generator().manual_seed(seed))
    return values, *net.calls[0]


def test_bytes_become_floats_between_minus_one_and_one(digits):
    images = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].reshape(1, 28, 28)
    floats = to_floats(images)
    assert floats.shape == (1, 1, 28, 28)
    assert (float(floats.min()), float(floats.max())) == (-1.0, 1.0)
    back = ((floats + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back.squeeze(1), images)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 28, 28), torch.zeros(2, 28, 27, dtype=torch.uint8)])
def test_other_images_are_refused(wrong):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(n, 28, 28\); got"):
        to_floats(wrong)


def test_the_loss_of_no_prediction_is_the_mean_square_of_v(digits):
    # the network predicts v = 0, so the loss is E v^2 = alpha^2 + sigma^2 E x0^2 per pixel
    model = replace(MNIST, batch=1000)
    values, _, lam, _ = asked(model, digits)
    t = model.schedule.t_of_lam(lam)
    power = to_floats(digits[0]).square().mean()
    want = model.schedule.alpha(t) ** 2 + model.schedule.sigma(t) ** 2 * power
    # a mean over 1000 images of 784 pixels; the images' own powers differ by about .1 between images
    assert float(values.mean()) == pytest.approx(float(want.mean()), abs=4 * 0.1 / 1000**0.5)


def test_the_times_are_stratified_and_a_share_of_the_labels_is_hidden(digits):
    model = replace(MNIST, batch=1000)
    _, _, lam, labels = asked(model, digits)
    low, high = model.schedule.t_min, model.schedule.t_max
    place = (model.schedule.t_of_lam(lam.double()) - low) / (high - low) * 1000
    inside = place - torch.arange(1000)  # rounding in float32 lam carries a few over their part's ends
    assert float(inside.min()) > -0.05
    assert float(inside.max()) < 1.05
    hidden = float((labels == CLASSES).double().mean())
    assert abs(hidden - model.unknown) < 4 * (model.unknown * (1 - model.unknown) / 1000) ** 0.5
    assert set(labels.tolist()) == {*range(10), CLASSES}


def test_the_labels_belong_to_the_images(digits):
    model = replace(MNIST, batch=500, unknown=0.0)
    _, x, lam, labels = asked(model, digits)
    alpha = model.schedule.alpha(model.schedule.t_of_lam(lam))
    clear = alpha > 0.999  # almost no noise: the image can be told
    images = to_floats(digits[0]).flatten(1)
    nearest = torch.cdist(x[clear].flatten(1), images).argmin(1)
    assert int(clear.sum()) > 10
    assert torch.equal(digits[1][nearest], labels[clear])


def test_the_parts_of_a_batch_make_the_whole(digits):
    whole = asked(SMALL, digits)
    parts = [asked(SMALL, digits, part=(i, 2)) for i in range(2)]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), one)


def test_the_mean_gradient_of_the_parts_is_that_of_the_whole(digits, single_precision):
    net = SMALL.untrained(0)
    nn.init.normal_(net.coarse_in[0].conv2.weight, std=0.05, generator=torch.Generator().manual_seed(0))

    def gradient(part):
        net.zero_grad()
        SMALL.loss(*digits, part)(net, torch.Generator().manual_seed(1)).mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    whole = gradient((0, 1))
    torch.testing.assert_close((gradient((0, 2)) + gradient((1, 2))) / 2, whole, rtol=1e-4, atol=1e-7)
    assert float(whole.norm()) > 0.01


def test_a_batch_that_the_processes_cannot_share_is_refused(digits):
    with pytest.raises(ValueError, match="the batch must be a multiple of the 3 processes; got 8"):
        SMALL.loss(*digits, (0, 3))


def test_the_budget_is_in_images():
    assert MNIST.images == MNIST.recipe.steps * MNIST.batch
    half = MNIST.with_budget(MNIST.images // 2)
    assert half.images == MNIST.images // 2
    assert half.recipe.warmup == MNIST.recipe.warmup // 2
    assert MNIST.with_budget(1).recipe.steps == 1
    with pytest.raises(ValueError, match="images must be an int of at least 1; got 0"):
        MNIST.with_budget(0)


def test_a_killed_training_resumes_to_the_identical_state(tmp_path):
    whole = SMALL.train(3, subset=True, progress=False)
    state, log = tmp_path / "state.safetensors", tmp_path / "run.jsonl"

    class Killed(Exception):
        pass

    def draw(net, key):
        raise Killed

    broken = replace(SMALL)
    object.__setattr__(broken, "examples", draw)  # dies while the picture of step 2 is drawn
    with pytest.raises(Killed):
        broken.train(3, subset=True, progress=False, checkpoint=state, every=2, log=log)
    assert not log.exists()
    resumed = SMALL.train(3, subset=True, progress=False, checkpoint=state, every=2, log=log)
    assert weights.digest(resumed.net.state_dict()) == weights.digest(whole.net.state_dict())
    assert resumed.data_digest == whole.data_digest
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [4]


def test_the_file_has_all_that_made_it(tmp_path):
    trained = SMALL.train(3, subset=True, progress=False)
    (path,) = SMALL.save(tmp_path / "net.safetensors", trained, 3)
    tensors, made = weights.read(path)
    command = "python -m diffedu.train mnist --seed 3 --images 32 --batch 8 --lr 0.001 --ema 0.9 --subset"
    assert made["command"] == command
    assert made["digest"] == weights.digest(tensors)
    images, labels = mnist_files.subset("train")
    assert made["data_digest"] == weights.digest({"images": images, "labels": labels.long()})
    recipe = json.loads(made["recipe"])
    assert (recipe.pop("batch"), recipe.pop("unknown")) == (8, 0.3)
    assert Recipe(**recipe) == SMALL.recipe
    for name, value in trained.net.state_dict().items():
        assert tensors[name].dtype == torch.float16
        torch.testing.assert_close(tensors[name].float(), value, rtol=1e-3, atol=1e-7)


def test_a_network_may_know_the_class_or_not(digits):
    net = Recorder()
    labels = torch.tensor([3, 1])
    x = torch.zeros(2, 1, 28, 28)
    MNIST.denoiser(net, labels)(x, 0.5)
    MNIST.denoiser(net)(x, 0.5)
    assert torch.equal(net.calls[0][2], labels)
    assert net.calls[1][2] is None
    assert torch.equal(net.calls[0][1], net.calls[1][1])


def test_as_many_labels_as_images_are_needed():
    with pytest.raises(ValueError, match="x must have a row for each of the 2 labels; got 3"):
        Labelled(Recorder(), torch.tensor([1, 2]))(torch.zeros(3, 1, 28, 28), torch.zeros(3))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_half_precision_is_used_where_the_processor_has_it(capabilities, dtype, digits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    net, seen = SMALL.untrained(0), []
    net.level[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    values = SMALL.loss(*digits)(net, torch.Generator().manual_seed(1))
    values.mean().backward()
    assert seen == [dtype]
    assert values.dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    monkeypatch.setattr(module, "half_precision", lambda device: contextlib.nullcontext())
    plain = SMALL.loss(*digits)(net, torch.Generator().manual_seed(1))
    torch.testing.assert_close(values, plain, rtol=0.02, atol=0)  # bf16 has 8 bits


@pytest.mark.parametrize(
    ("change", "seed", "subset"),
    [({"batch": 4}, 3, True), ({"unknown": 0.5}, 3, True), ({}, 4, True), ({}, 3, False)],
)
def test_the_checkpoint_of_another_run_is_refused(change, seed, subset, tmp_path, monkeypatch):
    state = tmp_path / "state.safetensors"
    SMALL.train(3, subset=True, progress=False, checkpoint=state)
    before = state.read_bytes()
    images, labels = mnist_files.subset("test")
    monkeypatch.setattr(digit_training, "mnist", lambda *_, **__: (images, labels))
    with pytest.raises(ValueError, match=r"belongs to a run of .*this one is of .*: use another file"):
        replace(SMALL, **change).train(seed, subset=subset, progress=False, checkpoint=state)
    assert state.read_bytes() == before


def test_the_shipped_network_is_that_of_the_recipe():
    tensors, made = weights.shipped("mnist")
    assert (Path(weights.__file__).parent / "pretrained" / "mnist.safetensors").stat().st_size <= 4.5e6
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert json.loads(made["recipe"]) == asdict(MNIST.recipe) | {"batch": 64, "unknown": 0.3}
    assert made["command"].startswith(f"python -m diffedu.train mnist --seed 0 --images {MNIST.images} ")
    assert (made["schedule"], made["seed"]) == (repr(MNIST.schedule), "0")
    # the classifier's training read the same 60,000 images and labels, by a command of its own
    assert made["data_digest"] == weights.shipped("mnist-classifier")[1]["data_digest"]


def test_the_shipped_network_draws_the_digits_it_is_asked_for():
    net = MNIST.load()
    labels = torch.arange(CLASSES).repeat_interleave(5)
    assert accuracy(MNIST.examples(net).clamp(-1, 1), labels) >= 0.84  # eight wrong of fifty at most


@pytest.mark.cuda
def test_training_and_sampling_run_where_the_network_is(tmp_path):
    state = tmp_path / "state.safetensors"
    whole = SMALL.train(3, subset=True, progress=False, device="cuda")
    half = replace(SMALL)
    object.__setattr__(half, "examples", lambda net, key: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        half.train(
            3, subset=True, progress=False, device="cuda", checkpoint=state, every=2, log=tmp_path / "l.jsonl"
        )
    resumed = SMALL.train(3, subset=True, progress=False, device="cuda", checkpoint=state)
    assert next(whole.net.parameters()).device.type == "cuda"
    # cuDNN's convolutions add in another order each time, and Adam's first steps are the gradient's sign
    start = SMALL.untrained(3)
    rows = zip(start.parameters(), whole.net.parameters(), resumed.net.parameters(), strict=True)
    for first, a, b in rows:
        moved = a.cpu() - first.detach()
        assert float((a - b).norm()) <= 0.1 * float(moved.norm()) + 1e-6
    assert SMALL.examples(whole.net).device.type == "cuda"
