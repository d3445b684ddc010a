"""The students: what decides their training, its resume, their files, and the shipped ones."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from problems import within
from torch import nn

from diffedu import weights
from diffedu.consistency import ConsistencyFunction, multistep
from diffedu.consistency_students import (
    MOONS_CONSISTENCY,
    MOONS_CONSISTENCY_TRAINED,
    SWISS_ROLL_CONSISTENCY,
    SWISS_ROLL_CONSISTENCY_TRAINED,
    Tracked,
)
from diffedu.denoiser import Prediction
from diffedu.exponential import DDIM
from diffedu.metrics import sliced_w2
from diffedu.refinement import Narrowing, Refinement, levels
from diffedu.sampling import prior, sample
from diffedu.schedules import VP
from diffedu.students import MOONS_DISTILLED, SWISS_ROLL_DISTILLED, Distilled
from diffedu.teachers import SWISS_ROLL
from diffedu.training import Recipe

RECIPE = Recipe(steps=25, lr=4e-3, ema=0.9)
SMALL = replace(SWISS_ROLL, points=2000)
DISTILLED = replace(SWISS_ROLL_DISTILLED, teacher=SMALL, generations=((2, RECIPE), (1, RECIPE)), kept=(2, 1))
DISTILLED_CM, TRAINED_CM = (
    replace(student, teacher=SMALL, recipe=RECIPE, division=division, restarts=((), (3,)))
    for student, division in (
        (SWISS_ROLL_CONSISTENCY, Refinement(25, 2, 6, 0.9)),
        (SWISS_ROLL_CONSISTENCY_TRAINED, Narrowing(25, 6, 0.9)),
    )
)
SHORT = {"distill": DISTILLED, "consistency": DISTILLED_CM, "consistency-training": TRAINED_CM}
CONSISTENCY = [
    SWISS_ROLL_CONSISTENCY,
    MOONS_CONSISTENCY,
    SWISS_ROLL_CONSISTENCY_TRAINED,
    MOONS_CONSISTENCY_TRAINED,
]
each_short = pytest.mark.parametrize("student", SHORT.values(), ids=SHORT)
each_consistency = pytest.mark.parametrize("student", CONSISTENCY, ids=lambda s: s.name)
each_distilled = pytest.mark.parametrize(
    "student", [SWISS_ROLL_DISTILLED, MOONS_DISTILLED], ids=lambda s: s.name
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def digests(trained):
    nets = {n: d.net for n, d in trained.items()} if isinstance(trained, dict) else {0: trained.net}
    return {n: weights.digest(net.state_dict()) for n, net in nets.items()}


@each_short
def test_training_is_decided_by_the_seed_alone(student, global_rng_untouched):
    found = [digests(student.train(seed, progress=False)) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert all(found[0][n] != found[2][n] for n in found[0])


def killed(student, at):
    """The student with a loss that is interrupted at its call number `at`."""
    calls = []

    class Killed(type(student)):
        def loss(self, *arguments):
            values = super().loss(*arguments)

            def loss(net, generator):
                calls.append(1)
                if len(calls) == at:
                    raise KeyboardInterrupt
                return values(net, generator)

            return loss

    return Killed(**vars(student))


STOPS = [*((s, at) for s in SHORT.values() for at in (13, 25)), (DISTILLED, 38)]


@pytest.mark.parametrize(("student", "at"), STOPS, ids=lambda v: getattr(v, "suffix", v))
def test_an_interrupted_training_goes_on_to_the_same_bits(student, at, tmp_path):
    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        killed(student, at).train(0, checkpoint=file, every=10, progress=False)
    again = student.train(0, checkpoint=file, every=10, progress=False)
    assert digests(again) == digests(student.train(0, progress=False))


@each_short
def test_a_saved_student_says_what_made_it(student, tmp_path):
    trained = student.train(3, progress=False)
    files = student.save(tmp_path / "x.safetensors", trained, 3)
    names = ["x-2.safetensors", "x-1.safetensors"] if student is DISTILLED else ["x.safetensors"]
    assert [f.name for f in files] == names
    for file, (n, digest) in zip(files, digests(trained).items(), strict=True):
        tensors, made = weights.read(file)
        assert made["digest"] == weights.digest(tensors) == digest
        assert made["command"] == f"python -m diffedu.train swiss-roll-{student.suffix} --seed 3"
        assert made["seed"] == "3"
        taught = student is not TRAINED_CM
        assert made["teacher_digest"] == (weights.shipped("swiss-roll")[1]["digest"] if taught else "none")
        assert made["data_digest"] == weights.digest({"data": SMALL.data(3)})
        recipe = json.loads(made["recipe"])
        assert recipe["batch"] == 512
        assert recipe["points"] == 2000
        if student is DISTILLED:
            assert recipe["student_steps"] == n
            assert [steps for steps, _ in recipe["generations"]] == [2, 1]
        else:
            assert recipe["division"] == asdict(student.division)
            assert recipe["steps"] == 25


@pytest.mark.parametrize("counts", [(), (4, 1), (1, 2), (4, 2, 2)])
def test_generations_that_do_not_halve_are_refused(counts):
    with pytest.raises(ValueError, match="half the steps"):
        Distilled(SMALL, tuple((n, RECIPE) for n in counts))


@pytest.mark.equation("eq-step-halving")
def test_each_generation_starts_from_the_one_before_and_learns_its_two_steps():
    seen = []

    class Watched(Distilled):
        def loss(self, teacher, n, data):
            values = super().loss(teacher, n, data)
            seen.append((n, weights.digest(teacher.net.state_dict())))

            def loss(net, generator):
                if len(seen) == n_before[0]:
                    n_before[0] += 1
                    assert (
                        weights.digest(net.state_dict()) == seen[-1][1]
                    )  # the student starts as its teacher
                return values(net, generator)

            return loss

    n_before = [1]
    students = Watched(**vars(DISTILLED)).train(0, progress=False)
    assert [n for n, _ in seen] == [2, 1]
    assert seen[0][1] == weights.shipped("swiss-roll")[1]["digest"]
    assert seen[1][1] == weights.digest(students[2].net.state_dict())


@each_distilled
@pytest.mark.parametrize("n", [1, 2, 8])
def test_steps_are_drawn_half_evenly_and_half_by_what_an_error_in_v_moves(student, n):
    ts = student.grid(n)
    z = torch.randn(1, 2, dtype=torch.float64, generator=seeded())

    def landed(t, s, error):
        def wrong(x, t):
            a, b = student.teacher.schedule.alpha(t), student.teacher.schedule.sigma(t)
            return Prediction(x, a, b, "v", torch.full_like(x, error))

        wrong.schedule = student.teacher.schedule
        return sample(wrong, DDIM(), z, [t, s])

    moved = torch.stack(
        [
            (landed(t, s, 1.0) - landed(t, s, 0.0))[0, 0].abs().asin()
            for t, s in zip(ts.tolist(), ts.tolist()[1:], strict=False)
        ]
    )
    shares = student.shares(n)
    torch.testing.assert_close(shares, 0.5 / n + 0.5 * moved / moved.sum(), rtol=1e-5, atol=1e-8)
    assert float(shares.sum()) == pytest.approx(1)


def test_training_draws_steps_by_their_shares():
    asked = []

    class Counting:
        schedule = SMALL.schedule

        def __call__(self, x, t):
            asked.append(t)
            return Prediction(x, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], "v", 0 * x)

    schedule, n = SMALL.schedule, 4
    wide = replace(DISTILLED, batch=20_000)
    wide.loss(Counting(), n, SMALL.data(0))(SMALL.untrained(0), seeded())
    counts = torch.stack([(asked[0] == t.float()).sum() for t in wide.grid(n)[:-1]]).double()
    assert counts.sum() == 20_000
    expected = 20_000 * wide.shares(n)
    assert within(counts, expected, expected.sqrt())


def test_time_is_divided_more_finely_as_training_goes_on():
    # A.11 with s_0 = 2, s_1 = 150, mu_0 = .95: N levels are N - 1 intervals
    refinement, total = Refinement(1000, 2, 150, 0.95), 1000
    for k in (1, 10, 100, 500, 999, 1000):
        n = math.ceil(math.sqrt(k / total * (151**2 - 2**2) + 2**2) - 1) + 1
        assert refinement.intervals_at(k) == n - 1
        assert refinement.decay_at(k) == pytest.approx(math.exp(2 * math.log(0.95) / (n - 1)))
    counts = [refinement.intervals_at(k) for k in range(1200)]
    assert counts[0] == 2
    assert counts == sorted(counts)
    assert counts[-1] == 150
    assert Refinement(10, 4, 4).decay_at(3) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"), [((10, 4, 3), "last"), ((0, 1, 1), "steps"), ((9, 1, 2, 1.0), "mu")]
)
def test_bad_refinements_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Refinement(*arguments)


def test_the_times_of_a_pair_draw_near():
    narrowing = Narrowing(1000, 24, 0.9, start=0.2, end=0.6)
    divisions = [narrowing.division_at(k) for k in range(1000)]
    assert {n for n, _ in divisions} == {24}
    gaps = [gap for _, gap in divisions]
    assert set(gaps[:200]) == {24}
    assert gaps == sorted(gaps, reverse=True)
    assert set(gaps[600:]) == {1}
    assert gaps[400] == round(math.sqrt(24))
    assert narrowing.decay_at(0) == narrowing.decay_at(999) == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0.9), "steps"),
        ((9, 0, 0.9), "last"),
        ((9, 4, 1.0), "mu"),
        ((9, 4, 0.9, 0.6, 0.5), "start < end"),
    ],
)
def test_bad_narrowings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Narrowing(*arguments)


def test_training_takes_its_targets_from_the_batch_alone():
    # at a gap that reaches t_min the target is the batch's posterior mean, stepped there by DDIM
    student = replace(TRAINED_CM, batch=64)
    vp, g = student.teacher.schedule, seeded(2)
    x0, eps = torch.randn(2, 64, 2, generator=g)
    t, s = torch.full((64,), 0.6), torch.full((64,), vp.t_min)
    f = student.function(SWISS_ROLL.untrained(0))
    values = student.pairs(x0)(f, f, x0, t, s, eps, 6)
    x = vp.alpha(0.6) * x0 + vp.sigma(0.6) * eps
    w = (-0.5 * ((x[:, None] - vp.alpha(0.6) * x0) / vp.sigma(0.6)).square().sum(-1)).softmax(-1)
    mean = w @ x0
    landed = vp.alpha(vp.t_min) * mean + vp.sigma(vp.t_min) * (x - vp.alpha(0.6) * mean) / vp.sigma(0.6)
    torch.testing.assert_close(values, (f(x, t) - landed).square().sum(1), rtol=1e-3, atol=1e-5)


def test_the_slow_copy_follows():
    torch.manual_seed(0)
    net = Tracked(nn.Linear(2, 2))
    slow = net.target.weight.clone()
    assert torch.equal(slow, net.net.weight)
    with torch.no_grad():
        net.net.weight += 1
    net.follow(0.75)
    torch.testing.assert_close(net.target.weight, slow + 0.25)
    net.follow(0.0)
    assert torch.equal(net.target.weight, net.net.weight)
    assert int(net.steps) == 2
    assert not any(p.requires_grad for p in net.target.parameters())
    assert "steps" in net.state_dict()


def test_the_loss_counts_its_steps():
    student, net = DISTILLED_CM, Tracked(SWISS_ROLL.untrained(0))
    loss, g = student.loss(SMALL.data(0)), seeded()
    for k in range(3):
        assert loss(net, g).shape == (512,)
        assert int(net.steps) == k + 1


def test_levels_are_quantiles_of_the_law_that_they_are_said_to_follow():
    vp, n = VP(), 40
    ts = levels(vp, n)
    assert (ts[0], ts[-1]) == (vp.t_min, vp.t_max)
    assert (ts.diff() > 0).all()
    draws = torch.randn(400_000, dtype=torch.float64, generator=seeded()) + 1.2
    low, high = vp.lam(vp.t_max), vp.lam(vp.t_min)
    draws[::2] = low + (high - low) * torch.rand(200_000, dtype=torch.float64, generator=seeded(1))
    draws = draws[(draws > low) & (draws < high)]
    counts = torch.histogram(draws, vp.lam(ts).flip(0)).hist
    assert within(counts, len(draws) / n, math.sqrt(len(draws) / n) + 0.002 * len(draws) / n)


@each_consistency
def test_restarts_are_levels_of_the_last_grid(student):
    known = levels(student.teacher.schedule, student.division.last).tolist()
    for n in (1, 2, 4):
        times = student.times(n)
        assert len(times) == n
        assert times[0] == student.teacher.schedule.t_max
        assert set(times) <= set(known)
        assert times == sorted(times, reverse=True)
    with pytest.raises(ValueError, match=r"evaluations must be one of \[1, 2, 4\]; got 3"):
        student.times(3)


def check_file(name, student, teacher_digest):
    tensors, made = weights.shipped(name)
    assert made["command"] == f"python -m diffedu.train {student.name} --seed 0"
    assert made["schedule"] == repr(student.teacher.schedule)
    assert made["teacher_digest"] == teacher_digest
    assert made["data_digest"] == weights.digest({"data": student.teacher.data(0)})
    assert sum(value.numel() * value.element_size() for value in tensors.values()) < 200_000
    return json.loads(made["recipe"])


@each_distilled
def test_the_shipped_students_are_those_of_the_recipe(student):
    teacher_digest = weights.shipped(student.teacher.name)[1]["digest"]
    for n in student.kept:
        recipe = check_file(f"{student.name}-{n}", student, teacher_digest)
        found = tuple((k, Recipe(**r)) for k, r in recipe["generations"])
        assert (found, recipe["batch"], recipe["student_steps"]) == (student.generations, student.batch, n)


@each_consistency
def test_the_shipped_functions_are_those_of_the_recipe(student):
    shipped = weights.shipped(student.teacher.name)[1]["digest"]
    recipe = check_file(student.name, student, shipped if student.taught else "none")
    known = {k: recipe[k] for k in asdict(student.recipe) if k in recipe}
    assert Recipe(**known) == student.recipe
    assert recipe["division"] == asdict(student.division)
    assert recipe["batch"] == student.batch
    if student.taught:
        assert recipe["substeps"] == student.substeps


# At 10,000 a side two samples of the data lie .020 apart, with a deviation of .005 a pair (design/goals.md).
def distance(x, teacher):
    return sliced_w2(x, teacher.draw(10_000, seeded(12)))


@each_distilled
def test_the_shipped_students_sample_the_data(student):
    z = prior(student.teacher.schedule, (10_000, 2), seeded(13))
    for n in student.kept:
        x = sample(student.load(n), DDIM(), z, student.grid(n))
        assert distance(x, student.teacher) < math.hypot(0.020 + 4 * 0.005, 0.02)
    undistilled = sample(student.teacher.load(), DDIM(), z, student.grid(4))
    assert distance(undistilled, student.teacher) > 0.15


@each_consistency
def test_the_shipped_functions_sample_the_data(student):
    f, vp = student.load(), student.teacher.schedule
    assert isinstance(f, ConsistencyFunction)
    assert not any(p.requires_grad for p in f.net.parameters())
    for n in (1, 2, 4):
        x = multistep(f, prior(vp, (10_000, 2), seeded(14)), student.times(n), vp, seeded(15))
        assert distance(x, student.teacher) < math.hypot(0.020 + 4 * 0.005, 0.06)
    assert within(x.mean(0), student.teacher.data(0).mean(0), 0.1 / 4)
