import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from problems import within
from safetensors import safe_open
from torch import nn

from diffedu import training, weights
from diffedu.denoiser import NetDenoiser
from diffedu.networks import MLP
from diffedu.objectives import dsm_loss
from diffedu.schedules import VP
from diffedu.training import Recipe, Restarted, fit

STEPS = 40
RECIPE = Recipe(steps=STEPS, lr=1e-2, ema=0.9)


def network(width=16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(dim=2, width=width, depth=2, embedding=8)


def loss(net, generator):
    """Denoising score matching on a Gaussian, all noise from the generator."""
    x0, eps = torch.randn(2, 32, 2, generator=generator)
    t = 1e-3 + 0.999 * torch.rand(32, generator=generator)
    return dsm_loss(NetDenoiser(net, VP(), "v"), 0.5 * x0 + 1, t, eps, "v")


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def state(net, fitted, generator):
    """Everything that a run leaves behind."""
    tensors = [*net.state_dict().values(), *fitted.net.state_dict().values()]
    return [*tensors, torch.tensor(fitted.losses, dtype=torch.float64), generator.get_state()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def run(recipe=RECIPE, net=None, objective=loss, **options):
    net, generator = net or network(), seeded()
    fitted = fit(net, objective, recipe, generator, progress=False, **options)
    return state(net, fitted, generator)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


@pytest.mark.parametrize("stops", [[1], [7], [10, 3], [39], [13, 13, 13], [40]])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(stops, uninterrupted, tmp_path):
    file = tmp_path / "deep" / "run.safetensors"
    for stop in stops:
        # another process: fresh objects, another seed that must not matter once there is a file
        net, generator = network(), seeded() if not file.exists() else seeded(99)
        part = fit(net, loss, RECIPE, generator, checkpoint=file, every=5, stop_after=stop, progress=False)
    assert len(part.losses) == sum(stops)
    net, generator = network(), seeded(99)
    fitted = fit(net, loss, RECIPE, generator, checkpoint=str(file), every=5, progress=False)
    assert same(state(net, fitted, generator), uninterrupted)
    assert len(fitted.losses) == STEPS
    # and once more, when all is done: nothing changes
    assert same(run(checkpoint=file), uninterrupted)


@pytest.mark.parametrize("at", [3, 11, 25])
def test_a_run_killed_in_mid_step_resumes_from_its_last_checkpoint(at, uninterrupted, tmp_path):
    file, calls = tmp_path / "run.safetensors", []

    def killed(net, generator):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return loss(net, generator)

    with pytest.raises(KeyboardInterrupt):
        run(objective=killed, checkpoint=file, every=5)
    assert file.exists() == (at >= 5)
    assert same(run(checkpoint=file, every=5), uninterrupted)


def test_a_write_broken_off_leaves_the_old_file_whole(uninterrupted, tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    run(checkpoint=file, stop_after=10)
    before = file.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", half)
        with pytest.raises(OSError, match="disk full"):
            run(checkpoint=file, every=5)
    assert file.read_bytes() == before
    assert same(run(checkpoint=file, every=5), uninterrupted)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_networks_with_buffers_and_frozen_parameters_resume(tmp_path):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        net[0].weight.requires_grad_(False)
        return net

    def objective(net, generator):
        x = torch.randn(16, 2, generator=generator)
        return (net(x) - 2 * x).square().sum(1)

    whole = run(net=make(), objective=objective)
    file = tmp_path / "run.safetensors"
    run(net=make(), objective=objective, checkpoint=file, stop_after=17)
    assert same(run(net=make(), objective=objective, checkpoint=file), whole)


def refused(file, match, **options):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=match) as refusal:
        run(checkpoint=file, **options)
    assert file.read_bytes() == before
    assert str(file) in str(refusal.value)


def test_a_checkpoint_of_something_else_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "run.safetensors"
    run(checkpoint=file, stop_after=3)
    for recipe in (Recipe(STEPS + 1, 1e-2, 0.9), Recipe(STEPS, 2e-2, 0.9), Recipe(STEPS, 1e-2, 0.99)):
        refused(file, r"was made with the recipe \{'steps': 40.*this run has", recipe=recipe)
    refused(file, r"holds a network of .*\(16, 10\).*this one has .*\(17, 10\)", net=network(17))
    refused(file, "holds a network of .*float32.*this one has .*float64", net=network().double())
    refused(file, "holds a network of", net=nn.Linear(2, 2))


@pytest.mark.parametrize("spoil", [lambda b: b[:-7], lambda b: b[:100], lambda b: b"", lambda b: b"x" * 500])
def test_a_corrupt_checkpoint_is_refused_and_left_alone(spoil, tmp_path):
    file = tmp_path / "run.safetensors"
    run(checkpoint=file, stop_after=3)
    file.write_bytes(spoil(file.read_bytes()))
    refused(file, "is not a readable safetensors file .*: delete it")


def test_a_checkpoint_of_other_data_or_of_another_kind_of_device_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    run(checkpoint=file, stop_after=3, made={"data": "a"})
    refused(file, r"belongs to a run of \{'data': 'a'\}, this one is of \{'data': 'b'\}", made={"data": "b"})
    tensors, metadata = weights.read(file)
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)  # as long as a GPU's
    weights.write(file, tensors, metadata)
    refused(file, "was written on another kind of device than cpu", made={"data": "a"})


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    weights.write(file, {"a": torch.zeros(2)}, {})
    refused(file, "was made with the recipe None")


def test_a_checkpoint_is_plain_data(tmp_path):
    file = tmp_path / "run.safetensors"
    run(checkpoint=file, stop_after=3)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["recipe"]) == asdict(RECIPE)
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("losses").shape == (3,)
    for module in (training, weights):
        source = Path(module.__file__).read_text()
        assert "pickle" not in source
        assert "torch.load" not in source


def test_the_result_is_the_exponential_average_of_the_weights():
    seen, net, recipe = [], network(), Recipe(STEPS, 1e-2, 0.8)

    def spy(net, generator):
        seen.append(nn.utils.parameters_to_vector(net.parameters()).detach().double())
        return loss(net, generator)

    fitted = fit(net, spy, recipe, seeded(), progress=False)
    seen.append(nn.utils.parameters_to_vector(net.parameters()).detach().double())
    # sum over all weights, each with what the later decays leave of it
    decay = [min(0.8, (1 + k) / (10 + k)) for k in range(STEPS)]
    left = [math.prod(decay[k:]) for k in range(STEPS + 1)]
    share = [left[0], *((1 - decay[k]) * left[k + 1] for k in range(STEPS))]
    assert sum(share) == pytest.approx(1)
    want = sum(s * w for s, w in zip(share, seen, strict=True))
    got = nn.utils.parameters_to_vector(fitted.net.parameters()).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not fitted.net.training
    assert not any(p.requires_grad for p in fitted.net.parameters())
    assert net.training


def test_the_learning_rate_falls_as_a_cosine():
    recipe = Recipe(100, 0.4)
    assert recipe.lr_at(0) == 0.4
    assert recipe.lr_at(50) == pytest.approx(0.2)
    assert recipe.lr_at(100) == pytest.approx(0, abs=1e-16)
    slopes = [recipe.lr_at(k + 1) - recipe.lr_at(k) for k in range(100)]
    assert max(slopes) < 0


def test_a_restart_goes_on_from_a_finished_training():
    # the checkpoint of the shorter run, told of the longer recipe, is where the longer run stood
    twice = Restarted(steps=STEPS + 25, lr=1e-2, ema=0.9, warmup=3, restart=STEPS)
    once = Recipe(STEPS, 1e-2, 0.9, warmup=3)
    assert [twice.lr_at(k) for k in range(STEPS)] == [once.lr_at(k) for k in range(STEPS)]
    assert same(run(twice, stop_after=STEPS), run(once))
    # risen anew at once, and down again at the end: a rate is symmetric about the middle of its cosine
    assert twice.lr_at(STEPS - 1) < 1e-4 < 3e-3 < twice.lr_at(STEPS)
    assert twice.lr_at(STEPS + 10) + twice.lr_at(STEPS + 15) == pytest.approx(1e-2)
    assert twice.lr_at(STEPS + 25) == pytest.approx(0, abs=1e-16)


def test_another_budget_than_the_restarted_one_has_one_cycle():
    twice = Restarted(steps=60, lr=1e-2, ema=0.9, warmup=6, restart=40)
    assert twice.scaled(1) == twice
    assert twice.scaled(0.5) == Recipe(30, 1e-2, 0.9, warmup=3)
    assert twice.scaled(1e-9) == Recipe(1, 1e-2, 0.9)
    assert twice.scaled(1 + 1e-12) == twice  # a budget's share is a quotient of floats
    assert twice.scaled(61 / 60) == Recipe(61, 1e-2, 0.9, warmup=6)


@pytest.mark.parametrize("restart", [0, 40, 41, 1.5])
def test_a_restart_lies_within_the_run(restart):
    with pytest.raises(ValueError, match=rf"restart must be .*got {restart}"):
        Restarted(steps=40, restart=restart)


def test_adam_takes_steps_of_that_length():
    # where the gradient never changes, each of Adam's steps is the learning rate
    net, recipe = Linear(), Recipe(50, 0.4)
    fit(net, lambda net, generator: 3.0 * net.a - 5.0 * net.b, recipe, seeded(), progress=False)
    way = sum(recipe.lr_at(k) for k in range(50))
    assert float(net.a.detach()) == pytest.approx(-way, rel=1e-5)
    assert float(net.b.detach()) == pytest.approx(way, rel=1e-5)


def test_the_losses_are_the_means_that_were_minimised():
    seen = []

    def spy(net, generator):
        value = loss(net, generator)
        seen.append(float(value.detach().mean()))
        return value

    net = network()
    assert fit(net, spy, RECIPE, seeded(), progress=False).losses == seen
    assert sum(seen[-10:]) < sum(seen[:10])


def test_the_generator_decides_and_nothing_else(uninterrupted, global_rng_untouched):
    assert same(run(), uninterrupted)
    net = network()
    assert not same(state(net, fit(net, loss, RECIPE, seeded(4), progress=False), seeded()), uninterrupted)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_it_reaches_the_weights(number, tmp_path):
    calls, net, file = [], network(), tmp_path / "run.safetensors"

    def bad(net, generator):
        calls.append(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
        return loss(net, generator) * (number if len(calls) == 8 else 1.0)

    with pytest.raises(ValueError, match=f"loss must be finite; got {number} at step 7"):
        fit(net, bad, RECIPE, seeded(), checkpoint=file, every=5, progress=False)
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), calls[-1])
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("losses").shape == (5,)


class Linear(nn.Module):
    """x0 predicted as a x + b, the best there is for Gaussian data at one time."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, lam):
        return self.a * x + self.b


def test_a_linear_denoiser_learns_the_posterior_mean():
    # E[x0 | x_t] for x0 ~ N(m, s^2): slope alpha s^2 / v, offset m sigma^2 / v, v = alpha^2 s^2 + sigma^2
    schedule, t, m, s, batch = VP(), 0.25, 0.6, 0.5, 512
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    v = (alpha * s) ** 2 + sigma**2

    def objective(net, generator):
        x0, eps = torch.randn(2, batch, 1, generator=generator)
        return dsm_loss(NetDenoiser(net, schedule, "x0"), m + s * x0, t, eps, "x0")

    fitted = fit(Linear(), objective, Recipe(1200, 2e-2, 0.99), seeded(), progress=False)
    got = torch.cat([fitted.net.a, fitted.net.b])
    want = torch.tensor([alpha * s**2 / v, m * sigma**2 / v])
    # the last 300 steps, at small steps, average at least this many draws; residual std sigma s / sqrt(v)
    assert within(got, want, 2 * sigma * s / math.sqrt(v) / math.sqrt(300 * batch) / min(1.0, math.sqrt(v)))
    floor = (s * sigma) ** 2 / v
    assert sum(fitted.losses[-200:]) / 200 == pytest.approx(floor, rel=0.03)


def test_progress_is_shown_only_on_demand(capsys):
    fit(network(), loss, Recipe(3), seeded(), progress=False)
    assert capsys.readouterr() == ("", "")
    fit(network(), loss, Recipe(3), seeded())
    assert "3/3" in capsys.readouterr().err


@pytest.mark.cuda
def test_training_runs_where_the_network_is(tmp_path):
    def objective(net, generator):
        x = torch.randn(16, 2, generator=generator, device="cuda")
        return net(x, x[:, 0]).square().sum(1)

    whole, parts = [], []
    for kept, stops in ((whole, [None]), (parts, [4, None])):
        for stop in stops:
            net, generator = network().cuda(), torch.Generator("cuda").manual_seed(0)
            file = None if kept is whole else tmp_path / "run.safetensors"
            fitted = fit(net, objective, Recipe(9), generator, checkpoint=file, stop_after=stop)
        kept += state(net, fitted, generator)
    assert same(whole, parts)
