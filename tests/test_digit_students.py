import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diffedu import mnist_files, weights
from diffedu.consistency import ConsistencyFunction
from diffedu.consistency_students import Tracked
from diffedu.digit_metrics import accuracy
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digits import CLASSES, MNIST, to_floats
from diffedu.distillation import step_shares
from diffedu.exponential import DDIM
from diffedu.refinement import Refinement, levels
from diffedu.sampling import prior, sample
from diffedu.training import Recipe

SCHEDULE = MNIST.schedule
FEW = Recipe(steps=3, lr=1e-3, ema=0.9, warmup=1)
DISTILLED = replace(MNIST_DISTILLED, batch=4, generations=((2, FEW), (1, FEW)))
CONSISTENCY = replace(MNIST_CONSISTENCY, batch=4, recipe=FEW, division=Refinement(3, 2, 4, 0.9))
STUDENTS = [f"mnist-distill-{n}" for n in (8, 4, 2, 1)] + ["mnist-consistency"]
PRETRAINED = Path(weights.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def digits():
    images, labels = mnist_files.subset("test")
    return images[:100], labels[:100].long()


class OneDigit(nn.Module):
    """The v-prediction of a law that has one digit only, whatever the label; keeps what it was asked."""

    def __init__(self, digit):
        super().__init__()
        self.digit, self.calls = digit, []

    def forward(self, x, lam, labels):
        self.calls.append((x, lam, labels))
        t = SCHEDULE.t_of_lam(lam)[:, None, None, None]
        return (SCHEDULE.alpha(t) * x - self.digit) / SCHEDULE.sigma(t)


class Nothing(OneDigit):
    """A network that predicts 0."""

    def forward(self, x, lam, labels):
        super().forward(x, lam, labels)
        return torch.zeros_like(x)


class Straight(OneDigit):
    """What makes a consistency function of that one digit's ODE, whose noise never changes."""

    def forward(self, x, lam, labels):
        super().forward(x, lam, labels)
        t = SCHEDULE.t_of_lam(lam)
        skip, out, into = (
            c[:, None, None, None] for c in ConsistencyFunction(self, SCHEDULE).coefficients(t)
        )
        state = x / into
        alpha, sigma = SCHEDULE.alpha(t)[:, None, None, None], SCHEDULE.sigma(t)[:, None, None, None]
        first, low = SCHEDULE.alpha(SCHEDULE.t_min), SCHEDULE.sigma(SCHEDULE.t_min)
        end = first * self.digit + low * (state - alpha * self.digit) / sigma
        return torch.where(out > 0, (skip * state - end) / out.clamp(min=1e-12), torch.zeros_like(x))


def times(lam):
    """The cosine schedule's times, in float64: tan(pi t / 2) = sigma / alpha."""
    return torch.atan(torch.exp(-lam.double())) * (2 / torch.pi)


def drawn(training, digits, seed=0):
    """A batch as the loss will draw it."""
    return training.batches(*digits)(torch.Generator().manual_seed(seed))


def test_a_student_s_loss_is_the_error_in_v_against_its_teacher(digits):
    # teacher: one digit c, so two DDIM steps of it are one; a student that says v = 0 says x0 = alpha z
    digit = to_floats(digits[0])[:1]
    training = replace(MNIST_DISTILLED, batch=64)
    student, teacher = Nothing(digit), OneDigit(digit)
    loss = training.stage_loss(4, teacher, training.batches(*digits))
    values = loss(student, torch.Generator().manual_seed(0))
    z, lam, labels = student.calls[0]
    t = SCHEDULE.t_of_lam(lam)[:, None, None, None]
    want = ((digit - SCHEDULE.alpha(t) * z) / SCHEDULE.sigma(t)).square().mean((1, 2, 3))
    torch.testing.assert_close(values, want, rtol=1e-4, atol=1e-6)
    assert torch.equal(labels, drawn(training, digits).labels)
    assert all(torch.equal(call[2], labels) for call in teacher.calls)
    same = training.stage_loss(4, teacher, training.batches(*digits))(
        OneDigit(digit), torch.Generator().manual_seed(0)
    )
    assert float(same.max()) < 1e-7


def test_the_teacher_is_asked_at_a_step_s_start_and_middle(digits):
    digit = to_floats(digits[0])[:1]
    training = replace(MNIST_DISTILLED, batch=400)
    teacher = OneDigit(digit)
    training.stage_loss(4, teacher, training.batches(*digits))(
        OneDigit(digit), torch.Generator().manual_seed(0)
    )
    first, second = (times(lam) for _, lam, _ in teacher.calls)
    grid = training.grid(8)  # the times of the teacher's eight steps
    step = (first[:, None] - grid[None, ::2]).abs().argmin(1)
    torch.testing.assert_close(first, grid[::2][step], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, grid[1::2][step], rtol=1e-4, atol=1e-5)
    # stratified: each step as often as its share says, to one image
    counts = torch.bincount(step, minlength=4)
    assert float((counts - 400 * step_shares(SCHEDULE, training.grid(4))).abs().max()) <= 1


def test_the_shares_add_up_and_favour_the_steps_that_turn_far():
    shares = step_shares(SCHEDULE, MNIST_DISTILLED.grid(4))
    assert float(shares.sum()) == pytest.approx(1)
    # on the cosine schedule the angle is pi t / 2: equal steps of time turn equally far
    torch.testing.assert_close(shares, torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-12, atol=0)
    uneven = step_shares(SCHEDULE, torch.tensor([0.9, 0.3, 0.1], dtype=torch.float64))
    torch.testing.assert_close(uneven, 0.25 + torch.tensor([0.375, 0.125], dtype=torch.float64))


def test_the_grids_end_exactly_at_t_min():
    for n in (16, 8, 4, 2, 1):
        grid = MNIST_DISTILLED.grid(n)
        assert (float(grid[0]), float(grid[-1])) == (SCHEDULE.t_max, SCHEDULE.t_min)
        assert len(grid) == n + 1


def test_the_consistency_loss_is_0_for_the_solution_map(digits, monkeypatch):
    # one digit: the ODE's paths keep their noise, Heun's step makes no error, the map is known
    digit = to_floats(digits[0])[:1]
    training = replace(MNIST_CONSISTENCY, batch=32, division=Refinement(10, 3, 6, 0.9))
    teacher = OneDigit(digit)
    monkeypatch.setattr(type(MNIST), "load", lambda self: teacher)
    loss = training.stage_loss(None, nn.Identity(), training.batches(*digits))
    exact, wrong = Tracked(Straight(digit)), Tracked(Nothing(digit))
    values = loss(exact, torch.Generator().manual_seed(0))
    assert float(values.max()) < 1e-5
    assert float(loss(wrong, torch.Generator().manual_seed(0)).mean()) > 1e-2
    assert int(exact.steps) == 1
    # pairs of neighbours on the first grid, of three intervals
    ts = times(exact.net.calls[0][1])
    grid = levels(SCHEDULE, 3)
    assert float((ts[:, None] - grid[None, 1:]).abs().min(1).values.max()) < 1e-4
    batch = drawn(training, digits)
    assert torch.equal(exact.net.calls[0][2], batch.labels)
    assert torch.equal(exact.target.calls[-1][2], batch.labels)


def test_what_is_no_halving_is_refused():
    with pytest.raises(ValueError, match=r"half the steps of the one before; got \[8, 3\]"):
        replace(MNIST_DISTILLED, generations=((8, FEW), (3, FEW)))


def test_the_budget_is_shared_by_the_generations():
    half = MNIST_DISTILLED.with_budget(MNIST_DISTILLED.images // 2)
    for (n, whole), (m, part) in zip(MNIST_DISTILLED.generations, half.generations, strict=True):
        assert (m, part.steps, part.lr) == (n, whole.steps // 2, whole.lr)
    assert MNIST_CONSISTENCY.division.steps == MNIST_CONSISTENCY.recipe.steps
    few = MNIST_CONSISTENCY.with_budget(640)
    assert (few.images, few.recipe.steps, few.division.steps) == (640, 10, 10)


@pytest.mark.parametrize("training", [DISTILLED, CONSISTENCY])
def test_a_killed_training_ends_where_an_unbroken_one_ends(training, tmp_path):
    whole = training.train(3, subset=True, progress=False)
    state, log = tmp_path / "state.safetensors", tmp_path / "run.jsonl"

    class Killed(Exception):
        pass

    calls = []

    def draw(net, key):
        calls.append(key)
        if len(calls) == 2:
            raise Killed
        return torch.zeros(4, 1, 28, 28)

    broken = replace(training)
    object.__setattr__(broken, "examples", draw)
    with pytest.raises(Killed):
        broken.train(3, subset=True, progress=False, checkpoint=state, every=2, log=log)
    resumed = training.train(3, subset=True, progress=False, checkpoint=state, every=2, log=log)
    assert resumed.nets.keys() == whole.nets.keys() == training.stages.keys()
    for key, net in whole.nets.items():
        assert weights.digest(resumed.nets[key].state_dict()) == weights.digest(net.state_dict())
        assert weights.numbered(log, key).exists()
    first = MNIST.load().state_dict()
    assert weights.digest(whole.net.state_dict()) != weights.digest(first)
    assert whole.net.state_dict().keys() == first.keys()  # no slow copy, no counter


@pytest.mark.parametrize("training", [DISTILLED, CONSISTENCY])
def test_the_files_have_all_that_made_them(training, tmp_path):
    trained = training.train(3, subset=True, progress=False)
    files = training.save(tmp_path / "net.safetensors", trained, 3)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for (key, net), file in zip(trained.nets.items(), files, strict=True):
        assert file.name == ("net.safetensors" if key is None else f"net-{key}.safetensors")
        tensors, made = weights.read(file)
        assert made["command"].startswith(f"python -m diffedu.train {training.name} --seed 3 --images ")
        assert made["teacher_digest"] == weights.shipped("mnist")[1]["digest"]
        assert made["schedule"] == repr(SCHEDULE)
        assert made["digest"] == weights.digest(tensors)
        recipe = json.loads(made["recipe"])
        assert recipe.items() >= (asdict(FEW) | {"batch": 4, "unknown": 0.0}).items()
        assert recipe.get("student_steps") == key
        for name, value in net.state_dict().items():
            torch.testing.assert_close(tensors[name].float(), value, rtol=1e-3, atol=1e-7)


def test_the_times_of_the_consistency_model_are_levels_it_was_trained_at():
    grid = levels(SCHEDULE, MNIST_CONSISTENCY.division.last)
    assert torch.equal(MNIST_CONSISTENCY.levels(), grid)
    for k in (1, 2, 4, 8):
        ts = MNIST_CONSISTENCY.times(k)
        assert len(ts) == k
        assert ts[0] == SCHEDULE.t_max
        assert ts == sorted(set(ts), reverse=True)
        assert ts[-1] > SCHEDULE.t_min
        assert all(float((grid - t).abs().min()) == 0 for t in ts)
    with pytest.raises(ValueError, match=r"evaluations must be one of \[1, 2.*\]; got 9"):
        MNIST_CONSISTENCY.times(9)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_shipped_students_are_those_of_the_recipes(name):
    training = MNIST_CONSISTENCY if name == MNIST_CONSISTENCY.name else MNIST_DISTILLED
    key = None if training is MNIST_CONSISTENCY else int(name.rsplit("-", 1)[1])
    tensors, made = weights.shipped(name)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    recipe = asdict(training.stages[key]) | {"batch": training.batch, "unknown": training.unknown}
    assert json.loads(made["recipe"]) == recipe | json.loads(json.dumps(training.details(key)))
    command = f"python -m diffedu.train {training.name} --seed 0 --images {training.images} "
    assert made["command"].startswith(command)
    assert "--subset" not in made["command"]
    assert made["teacher_digest"] == weights.shipped("mnist")[1]["digest"]
    assert made["data_digest"] == weights.shipped("mnist")[1]["data_digest"]


def test_what_is_shipped_for_digits_is_small():
    sizes = {path.name: path.stat().st_size for path in PRETRAINED.glob("mnist*.safetensors")}
    assert {f"{name}.safetensors" for name in STUDENTS} < sizes.keys()
    assert max(sizes.values()) <= 4.5e6
    assert sum(sizes.values()) <= 30e6


@pytest.mark.parametrize("name", STUDENTS)
def test_the_shipped_students_draw_the_digits_they_are_asked_for(name):
    labels = torch.arange(CLASSES).repeat_interleave(5)
    if name == MNIST_CONSISTENCY.name:
        images = MNIST_CONSISTENCY.examples(MNIST_CONSISTENCY.load())
    else:
        n = int(name.rsplit("-", 1)[1])
        images = MNIST_DISTILLED.examples(MNIST_DISTILLED.load(n), n)
    assert accuracy(images.clamp(-1, 1), labels) >= 0.84  # eight wrong of fifty at most


def test_a_distilled_step_goes_where_two_of_its_teacher_s_go():
    # the student of four steps against that of eight, from the same noise: closer than the eight's own four
    start, labels = MNIST.example_starts(MNIST.load())
    eight, four = (MNIST_DISTILLED.load(n) for n in (8, 4))
    goal = sample(MNIST.denoiser(eight, labels), DDIM(), start, MNIST_DISTILLED.grid(8))
    taught = sample(MNIST.denoiser(four, labels), DDIM(), start, MNIST_DISTILLED.grid(4))
    untaught = sample(MNIST.denoiser(eight, labels), DDIM(), start, MNIST_DISTILLED.grid(4))
    assert float((taught - goal).square().mean()) < 0.5 * float((untaught - goal).square().mean())


@pytest.mark.cuda
@pytest.mark.parametrize("training", [DISTILLED, CONSISTENCY])
def test_students_train_and_sample_where_the_network_is(training):
    trained = training.train(3, subset=True, progress=False, device="cuda")
    assert next(trained.net.parameters()).device.type == "cuda"
    assert training.examples(trained.net, list(trained.nets)[-1]).device.type == "cuda"
    start = prior(SCHEDULE, (2, 1, 28, 28), torch.Generator("cuda").manual_seed(0))
    assert start.device.type == "cuda"
