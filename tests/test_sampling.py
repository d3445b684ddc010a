import itertools
import math

import pytest
import torch
from problems import asym3, exact, mix, within
from torch import nn

from diffedu.denoiser import Counted, Guided, NetDenoiser
from diffedu.exponential import DDIM
from diffedu.metrics import empirical_order
from diffedu.sampling import Step, encode, prior, sample, trajectory
from diffedu.schedules import VE, VP, Cosine
from diffedu.solvers import Euler, EulerMaruyama

SOLVERS = [Euler(), EulerMaruyama(), EulerMaruyama(0.0), EulerMaruyama(0.4), DDIM(), DDIM(0.5), DDIM(1.0)]
DETERMINISTIC = [Euler(), EulerMaruyama(0.0), DDIM()]
every = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


def start(generator, n=20, dtype=torch.float64):
    return torch.randn(n, 2, dtype=torch.float64, generator=generator).to(dtype)


@every
def test_a_trajectory_has_a_state_for_every_time(solver, generator):
    x, ts = start(generator), VP().grid(7)
    steps = list(trajectory(exact(asym3(), VP()), solver, x, ts, generator.manual_seed(1)))
    assert all(isinstance(step, Step) for step in steps)
    assert [step.t for step in steps] == ts.tolist()
    assert [step.nfe for step in steps] == list(range(8))
    assert all((step.x.shape, step.x.dtype) == (x.shape, x.dtype) for step in steps)
    assert steps[0].x is x
    assert torch.equal(x, start(generator.manual_seed(0)))  # untouched
    last = sample(exact(asym3(), VP()), solver, x, ts, generator.manual_seed(1))
    assert torch.equal(last, steps[-1].x)


@every
def test_the_generator_decides_and_nothing_else(solver, generator, global_rng_untouched):
    x, ts, denoiser = start(generator), VP().grid(5), exact(asym3(), VP())
    runs = [sample(denoiser, solver, x, ts, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (not solver.stochastic)


@every
def test_any_start_within_the_schedule_will_do(solver, generator):
    x, denoiser = start(generator), exact(asym3(), VP())
    whole = [0.9, 0.5, 0.2, 0.05]
    half = sample(denoiser, solver, x, whole[:3], generator.manual_seed(1))
    rest = sample(denoiser, solver, half, whole[2:], generator)
    torch.testing.assert_close(rest, sample(denoiser, solver, x, whole, generator.manual_seed(1)))
    for ts in (tuple(whole), torch.tensor(whole), torch.tensor(whole, dtype=torch.float64).numpy()):
        again = sample(denoiser, solver, x, ts, generator.manual_seed(1))
        torch.testing.assert_close(again, rest, rtol=1e-5, atol=1e-5)


@every
def test_states_keep_their_shape_and_dtype(solver, generator):
    class Net(nn.Module):
        def forward(self, x, lam):
            return 0.1 * x

    for shape in ((3, 1), (3, 1, 4, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(shape, generator=generator).to(dtype)
            y = sample(NetDenoiser(Net(), Cosine(), "v"), solver, x, Cosine().grid(3), generator)
            assert (y.shape, y.dtype) == (shape, dtype)
            assert bool(y.isfinite().all())


def test_single_precision_grids_may_end_where_the_schedule_ends(generator):
    for schedule in (VP(), VE(), Cosine()):
        ts = schedule.grid(5).float()
        steps = list(trajectory(exact(asym3(), schedule), DDIM(), start(generator), ts))
        assert (steps[0].t, steps[-1].t) == (pytest.approx(schedule.t_max), pytest.approx(schedule.t_min))
        assert all(schedule.t_min <= step.t <= schedule.t_max for step in steps)


def test_evaluations_are_counted_by_what_they_cost(generator):
    x, ts = start(generator), VP().grid(4)
    counted = Counted(exact(asym3(), VP()))
    guided = Guided(counted, exact(asym3(), VP()), 1.5)
    steps = list(trajectory(guided, DDIM(), x, ts))
    assert [step.nfe for step in steps] == [0, 2, 4, 6, 8]
    assert counted.nfe == 4
    # each trajectory starts at 0, the caller's own count goes on
    assert [step.nfe for step in trajectory(counted, DDIM(), x, ts)] == [0, 1, 2, 3, 4]
    assert counted.nfe == 8


def test_nothing_is_evaluated_before_it_is_asked_for(generator):
    counted = Counted(exact(asym3(), VP()))
    steps = trajectory(counted, Euler(), start(generator), VP().grid(1000))
    assert [step.nfe for step in itertools.islice(steps, 3)] == [0, 1, 2]
    assert counted.nfe == 2


def test_mistakes_are_refused_before_the_first_step(generator):
    denoiser, x = exact(asym3(), VP()), start(generator)
    with pytest.raises(ValueError, match="descend"):
        trajectory(denoiser, Euler(), x, [0.1, 0.5])
    with pytest.raises(ValueError, match="finite"):
        trajectory(denoiser, Euler(), x * math.nan, [0.5, 0.1])
    whole = Cosine(t_max=1.0)
    for solver in (Euler(), DDIM()):  # at alpha = 0 the drift is infinite and lam as well
        with pytest.raises(ValueError, match=r"t = 1\.0"):
            trajectory(exact(asym3(), whole), solver, x, [1.0, 0.5])


def test_no_gradients_are_recorded_and_the_caller_keeps_them(generator):
    net = nn.Linear(2, 2)

    class Net(nn.Module):
        def forward(self, x, lam):
            assert not torch.is_grad_enabled()
            return net(x)

    x = start(generator, dtype=torch.float32).requires_grad_()
    for step in trajectory(NetDenoiser(Net(), VP(), "v"), DDIM(), x, VP().grid(3)):
        assert torch.is_grad_enabled()
        if step.nfe:
            assert not step.x.requires_grad
    with torch.inference_mode():
        assert sample(exact(mix(), VP()), DDIM(), torch.zeros(3, 1), [0.5, 0.1]).shape == (3, 1)


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=repr)
def test_encode_undoes_sample_to_the_order_of_the_solver(solver, generator):
    denoiser, x = exact(asym3(), VP()), 0.5 * start(generator)
    errors, steps = [], [40, 80, 160, 320]
    for n in steps:
        ts = VP().grid(n)
        up = encode(denoiser, solver, x, ts.flip(0)[n // 2 :])
        back = sample(denoiser, solver, up, ts[: n // 2 + 1])
        errors.append(float((back - x).norm(dim=1).median()))
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.1)


def test_encode_needs_a_solver_that_has_an_inverse(generator, global_rng_untouched):
    denoiser, x = exact(asym3(), VP()), start(generator)
    for solver in (EulerMaruyama(), EulerMaruyama(0.1), DDIM(0.5)):
        with pytest.raises(ValueError, match=r"deterministic solver \(eta = 0\); got .*eta=0\.1|1\.0|0\.5"):
            encode(denoiser, solver, x, [0.1, 0.5])
    with pytest.raises(ValueError, match=r"ascend; got 0\.5 followed by 0\.1"):
        encode(denoiser, DDIM(), x, [0.5, 0.1])
    with pytest.raises(ValueError, match="finite"):
        encode(denoiser, DDIM(), x / 0, [0.1, 0.5])


@pytest.mark.parametrize("schedule", [VP(), VE(), Cosine()], ids=repr)
@pytest.mark.equation("eq-vp-prior")
def test_the_prior_is_gaussian_with_the_deviation_of_t_max(schedule, generator, global_rng_untouched):
    x = prior(schedule, (20_000, 2), generator, torch.float64)
    assert (x.shape, x.dtype) == ((20_000, 2), torch.float64)
    sigma = schedule.sigma(schedule.t_max)
    assert within(x.mean(0), 0, sigma / math.sqrt(20_000))
    assert within(x.var(0), sigma**2, sigma**2 * math.sqrt(2 / 20_000))
    assert torch.equal(x, prior(schedule, [20_000, 2], generator.manual_seed(0), torch.float64))
    assert prior(schedule, (2, 1, 3, 3), generator).dtype == torch.float32


@pytest.mark.cuda
def test_the_device_follows_the_state():
    g = torch.Generator("cuda").manual_seed(0)
    x = prior(VP(), (4, 2), g)
    assert x.device.type == "cuda"
    for solver in SOLVERS:
        assert sample(exact(asym3(), VP()), solver, x, VP().grid(3), g).device == x.device
