"""Heun and RK45: the black boxes of order 2 and 5."""

import math
from itertools import pairwise

import pytest
import torch
from problems import MAIN, asym3, asym3_reference, exact, flow, gaussian

from diffedu.denoiser import Counted
from diffedu.metrics import empirical_order
from diffedu.runge_kutta import ERROR, STAGES, Pace
from diffedu.sampling import encode, sample, trajectory
from diffedu.schedules import VP, Cosine
from diffedu.sde import reverse_drift
from diffedu.solvers import RK45, Euler, Heun

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)


@every
def test_a_heun_step_takes_the_mean_of_two_slopes(schedule, generator):
    denoiser, x = exact(asym3(), schedule), torch.randn(30, 2, dtype=torch.float64, generator=generator)
    for t, s in ((0.5, 0.45), (0.2, 0.23)):
        k_1 = reverse_drift(denoiser, x, t, 0.0)
        k_2 = reverse_drift(denoiser, x + (s - t) * k_1, s, 0.0)
        run = sample if s < t else encode
        got = run(denoiser, Heun(), x, [t, s])
        torch.testing.assert_close(got, x + (s - t) * (k_1 + k_2) / 2, rtol=1e-12, atol=1e-12)


def test_the_order_of_heun_is_2_at_two_evaluations_a_step():
    x, reference = asym3_reference()
    steps, denoiser = [80, 160, 320, 640], exact(asym3(), VP())
    errors = [
        float((sample(denoiser, Heun(), x, VP().grid(n, "t")) - reference).norm(dim=1).median())
        for n in steps
    ]
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(2, abs=0.1)
    assert (Heun().order, Heun().stochastic) == (2, False)
    assert [step.nfe for step in trajectory(denoiser, Heun(), x[:3], VP().grid(3))] == [0, 2, 4, 6]


def test_dormand_and_princes_numbers_meet_the_order_conditions():
    # sum b_i c_i^k = 1 / (k + 1): the first of the conditions of order 5; every row sums to its time
    times, rows = [0.0, *(c for c, _ in STAGES)], [(), *(a for _, a in STAGES)]
    assert [sum(row) for row in rows] == pytest.approx(times, abs=1e-14)
    last = (*rows[-1], 0.0)
    lower = [b - e for b, e in zip(last, ERROR, strict=True)]
    for k in range(5):
        moment = sum(b * c**k for b, c in zip(last, times, strict=True))
        assert moment == pytest.approx(1 / (k + 1), abs=1e-14)
        if k < 4:
            assert sum(b * c**k for b, c in zip(lower, times, strict=True)) == pytest.approx(1 / (k + 1))
    assert sum(b * c**4 for b, c in zip(lower, times, strict=True)) != pytest.approx(1 / 5, abs=1e-5)


def test_one_long_step_of_rk45_has_the_local_order_6():
    # with tolerances that take any step, halving it shows the order of the formula
    law, schedule = gaussian(0.5, 0.7), VP()
    x = torch.tensor([[0.3], [1.2]], dtype=torch.float64)
    errors, lengths = [], [0.1, 0.05, 0.025]
    for length in lengths:
        state = Pace(reverse_drift(exact(law, schedule), x, 0.6, 0.0), -length)
        y, _ = RK45(1e9, 1e9).step(exact(law, schedule), x, (0.6, 0.6 - length), state, lambda: x)
        errors.append(float((y - torch.from_numpy(flow(law, schedule, x.numpy(), 0.6, 0.6 - length))).norm()))
    assert empirical_order(lengths, errors) == pytest.approx(6, abs=0.4)


def test_rk45_keeps_its_tolerance_on_a_mixture():
    x, reference = asym3_reference()
    x, reference = x[:100], reference[:100]
    evaluations, denoiser = [], Counted(exact(asym3(), VP()))
    for tol in (1e-4, 1e-7, 1e-11):
        denoiser.nfe = 0
        worst = (sample(denoiser, RK45(tol, tol), x, [1.0, 1e-3]) - reference).norm(dim=1).max()
        assert float(worst) < 30 * tol
        evaluations.append(denoiser.nfe)
    assert evaluations[0] < 150 < evaluations[1] < 400 < evaluations[2] < 1500


@every
def test_there_and_back_with_rk45(schedule, generator):
    # the round trip of a whole schedule, at 1e-8; Cosine's drift is unbounded towards t = 1
    law, denoiser = asym3(), exact(asym3(), schedule)
    x = law.marginal(schedule, schedule.t_min).sample(20, generator)
    up = encode(denoiser, RK45(1e-11, 1e-11), x, [schedule.t_min, 0.1, schedule.t_max])
    back = sample(denoiser, RK45(1e-11, 1e-11), up, [schedule.t_max, 0.3, schedule.t_min])
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)


def test_the_grid_of_rk45_is_where_it_reports(generator):
    x, ts = torch.randn(20, 2, dtype=torch.float64, generator=generator), VP().grid(7)
    denoiser = exact(asym3(), VP())
    steps = list(trajectory(denoiser, RK45(1e-9, 1e-9), x, ts))
    assert [step.t for step in steps] == ts.tolist()
    for a, b in pairwise(steps):
        want = torch.from_numpy(flow(asym3(), VP(), a.x.numpy(), a.t, b.t))
        torch.testing.assert_close(b.x, want, rtol=0, atol=1e-7)
        assert (b.nfe - a.nfe - (a.nfe == 0)) % 6 == 0  # one for the first slope, then 6 a try
    # a sample's tolerance does not depend on the calmer ones beside it
    crowd = torch.cat([x[:1], torch.zeros(1000, 2, dtype=torch.float64)])
    alone, together = (sample(denoiser, RK45(1e-6, 1e-6), y, [1.0, 1e-3])[:1] for y in (x[:1], crowd))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_rk45_in_single_precision_and_on_nothing(generator):
    x, denoiser = torch.randn(5, 2, generator=generator), exact(asym3(), VP())
    single, double = (sample(denoiser, RK45(1e-5, 1e-5), y, [1.0, 0.01]) for y in (x, x.double()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)
    assert sample(denoiser, RK45(), x[:0], [1.0, 0.01]).shape == (0, 2)
    assert repr(RK45()) == "RK45(rtol=1e-05, atol=1e-05)"


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, "1e-3", True])
def test_bad_tolerances_are_refused(value):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"{name} must be a positive, finite number; got {value!r}"):
            RK45(**{name: value})


def test_what_rk45_cannot_resolve_is_refused():
    x, denoiser = torch.ones(3, 2), exact(asym3(), VP())
    with pytest.raises(ValueError, match=r"rtol must be at least 4.77e-07 for torch.float32; got 1e-08"):
        sample(denoiser, RK45(1e-8, 1e-8), x, [1.0, 0.1])

    def broken(x, t):
        prediction = denoiser(x, t)
        prediction.value = prediction.value * (math.nan if t < 0.5 else 1.0)
        return prediction

    broken.schedule = VP()
    with pytest.raises(ArithmeticError, match=r"no step is short enough for rtol = 1e-05.*at t = 0\.5"):
        sample(broken, RK45(), x, [0.6, 0.4])


def test_singular_ends_are_refused():
    whole, x = Cosine(t_max=1.0), torch.zeros(2, 2, dtype=torch.float64)
    for solver in (Euler(), Heun()):
        with pytest.raises(ValueError, match=r"f and g\^2 must be finite; got f = -inf.* at t = 1\.0"):
            sample(exact(asym3(), whole), solver, x, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"f and g\^2 must be finite"):
        encode(exact(asym3(), whole), Heun(), x, [0.5, 1.0])
