"""++2M, ++3M and DEIS: the exponential Adams-Bashforth methods."""

import math

import mpmath
import numpy as np
import pytest
import torch
import transcription
from problems import MAIN, asym3, asym3_reference, exact, flow, mixture, ring8

from diffedu.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP2M, DPMSolverPP3M, fast_plan
from diffedu.metrics import empirical_order
from diffedu.sampling import encode, sample, trajectory
from diffedu.schedules import VP, Cosine
from diffedu.solvers import Euler, Heun

SOLVERS = [DPMSolverPP2M(), DPMSolverPP3M(), DEIS(2), DEIS(3), DEIS(4), DEIS(3, 1.0)]
every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)


def drawn(seed, k=6):
    """A law drawn from a seed: not one that any solver or grid was chosen on."""
    g = np.random.default_rng(seed)
    means, stds = g.uniform(-1.5, 1.5, (k, 2)), np.exp(g.uniform(np.log(0.08), np.log(0.4), (k, 2)))
    angles, weights = g.uniform(0, np.pi, k), g.dirichlet(np.full(k, 3.0))
    axes = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
    covs = np.array([q @ np.diag(s**2) @ q.T for q, s in zip(axes, stds, strict=True)])
    return mixture(weights, means, covs)


def rms(law, solver, ts, x, reference):
    gap = sample(exact(law, VP()), solver, x, ts) - reference
    return float(gap.square().sum(1).mean().sqrt())


def median_errors(run, steps):
    x, reference = asym3_reference()
    return [float((run(x, n) - reference).norm(dim=1).median()) for n in steps]


@pytest.mark.parametrize(
    ("solver", "spacing"),
    [(DPMSolverPP3M(), "lam"), (DPMSolverPP3M(), 2), (DEIS(3), 1.8), (DEIS(2), 2), (DEIS(4), "lam")],
    ids=repr,
)
def test_the_order_on_a_mixture(solver, spacing):
    steps, denoiser = [80, 160, 320, 640], exact(asym3(), VP())
    errors = median_errors(lambda x, n: sample(denoiser, solver, x, VP().grid(n, spacing)), steps)
    order = empirical_order([1 / n for n in steps], errors)
    assert {2: order >= 1.9, 3: order >= 2.95, 4: order >= 3.8}[solver.order]


def test_the_official_d2_is_short_by_a_factor_of_2_and_loses_an_order():
    # the same code with the second derivative is of order 3 and closer at every number of steps
    denoiser, steps = exact(asym3(), VP()), [80, 160, 320, 640]

    def run(factor):
        def march(x, n):
            ts = VP().grid(n)
            return transcription.dpm_solver_pp_3m(lambda y, t: denoiser(y, t).eps, x, ts, factor)

        return march

    printed, right = median_errors(run(1), steps), median_errors(run(2), steps[:3])
    assert empirical_order([1 / n for n in steps], printed) == pytest.approx(1.9, abs=0.1)
    assert empirical_order([1 / n for n in steps[:3]], right) >= 2.95
    assert all(a < b for a, b in zip(right, printed, strict=False))


def test_2m_agrees_with_the_transcription(generator):
    denoiser, x = exact(asym3(), VP()), torch.randn(100, 2, dtype=torch.float64, generator=generator)
    for n, spacing in ((3, "lam"), (10, "lam"), (25, "t"), (40, 2)):
        ts = VP().grid(n, spacing)
        want = transcription.dpm_solver_pp_2m(lambda y, t: denoiser(y, t).eps, x, ts)
        torch.testing.assert_close(sample(denoiser, DPMSolverPP2M(), x, ts), want, rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_3m_integrates_a_parabola_in_lam_exactly(schedule, degree):
    # x0(lam) = lam^degree on an uneven grid, down and up, against mpmath; two steps to get going
    for ts in ([0.9, 0.7, 0.6, 0.35, 0.3], [0.3, 0.35, 0.6, 0.7, 0.9]):
        lams = [schedule.lam(t) for t in ts]
        c = DPMSolverPP3M().coefficients(schedule, ts)[-1]
        got = sum(b * lam**degree for b, lam in zip(c.b, lams[3::-1], strict=False))
        want = schedule.sigma(ts[-1]) * mpmath.quad(lambda l: mpmath.exp(l) * l**degree, [lams[-2], lams[-1]])
        assert got == pytest.approx(float(want), rel=1e-9, abs=1e-11)
        assert c.a == schedule.sigma(ts[-1]) / schedule.sigma(ts[-2])


@every
@pytest.mark.parametrize("solver", [DEIS(2, 1.0), DEIS(3), DEIS(4, 1.7)], ids=repr)
def test_deis_integrates_its_polynomials_exactly(schedule, solver):
    for ts in ([0.9, 0.7, 0.6, 0.35, 0.3], [0.3, 0.35, 0.6, 0.7, 0.9]):
        t, s = ts[-2:]
        c = solver.coefficients(schedule, ts)[-1]
        for degree in range(solver.order):
            # alpha_s int z^degree d(sigma / alpha), by 60 of Gauss's nodes in t
            got = sum(b * u ** (degree / solver.power) for b, u in zip(c.b, ts[-2::-1], strict=False))
            u, w = np.polynomial.legendre.leggauss(60)
            times = torch.from_numpy(t + (s - t) * 0.5 * (1 + u))
            # d(sigma / alpha)/dt = g^2 / (2 sigma alpha)
            rate = schedule.g2(times) / (2 * schedule.sigma(times) * schedule.alpha(times))
            integral = (torch.from_numpy(w) * rate * times ** (degree / solver.power)).sum() * 0.5 * (s - t)
            assert got == pytest.approx(schedule.alpha(s) * float(integral), rel=1e-10, abs=1e-12)


def test_the_numbers_of_deis_survive_tiny_steps():
    # equal steps 1e-7 in z: the weights of Adams and Bashforth, 23/12 -16/12 5/12, times the length of step
    zs = [0.7 - 1e-7 * i for i in range(4)]
    ts = [z**2 for z in zs]
    c = DEIS(3).coefficients(VP(), ts)[-1]
    b = -VP().sigma(ts[-1]) * math.expm1(VP().lam(ts[-1]) - VP().lam(ts[-2]))
    assert sum(c.b) == pytest.approx(b, rel=1e-12)
    assert [v / b for v in c.b] == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=1e-6)
    # and the same of ++3M in lam
    ts = [VP().t_of_lam(0.3 + 1e-6 * i) for i in range(4)]
    c = DPMSolverPP3M().coefficients(VP(), ts)[-1]
    assert [v / sum(c.b) for v in c.b] == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=1e-5)


def test_deis_of_order_1_is_ddim(generator):
    x, denoiser = torch.randn(20, 2, dtype=torch.float64, generator=generator), exact(asym3(), VP())
    for power in (1.0, 2.0):
        one, other = (sample(denoiser, s, x, VP().grid(9)) for s in (DEIS(1, power), DDIM()))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_solver_and_one_grid_serve_all_laws_at_ten_evaluations():
    # DEIS(3) on the grid uniform in sqrt(t) was chosen on the first two; the third was drawn after
    x, reference = asym3_reference()
    assert rms(asym3(), DEIS(3), VP().grid(10, 2), x, reference) <= 0.06
    assert rms(asym3(), DEIS(3), VP().grid(200, 2), x, reference) <= 2e-5
    x = x[:200]
    reference = torch.from_numpy(flow(ring8(), VP(), x.numpy(), 1.0, 1e-3))
    assert rms(ring8(), DEIS(3), VP().grid(10, 2), x, reference) <= 0.03
    law = drawn(1)
    reference = torch.from_numpy(flow(law, VP(), x.numpy(), 1.0, 1e-3))
    ours = rms(law, DEIS(3), VP().grid(10, 2), x, reference)
    others = [
        (Euler(), VP().grid(10, "t")),
        (Heun(), VP().grid(5, "t")),
        (DDIM(), VP().grid(10, 2)),
        (DPMSolver(2), VP().grid(5)),
        (DPMSolver(fast_plan(10)), VP().grid(4)),
        (DPMSolverPP2M(), VP().grid(10)),
        (DPMSolverPP2M(), VP().grid(10, 2)),
        (DPMSolverPP3M(), VP().grid(10)),
        (DEIS(3, 1.0), VP().grid(10, 1.7)),
    ]
    assert all(ours < rms(law, solver, ts, x, reference) for solver, ts in others)


def test_steps_may_be_as_many_as_one_likes():
    # no floor from rounding down to 1e-9
    x, reference = asym3_reference()
    out = sample(exact(asym3(), VP()), DEIS(4), x[:40], VP().grid(2500, 2))
    assert float((out - reference[:40]).norm(dim=1).median()) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_step_costs_one_evaluation_and_the_first_ones_know_less(solver, generator):
    x, ts = torch.randn(5, 2, dtype=torch.float64, generator=generator), VP().grid(6)
    steps = list(trajectory(exact(asym3(), VP()), solver, x, ts))
    assert [step.nfe for step in steps] == list(range(7))
    known = [len(c.b) for c in solver.coefficients(VP(), ts.tolist())]
    assert known == [min(i + 1, int(solver.order)) for i in range(6)]  # nothing lowered at the last
    assert not solver.stochastic


@pytest.mark.parametrize("solver", [DPMSolverPP3M(), DEIS(3)], ids=repr)
def test_there_and_back(solver, generator):
    denoiser, ts = exact(asym3(), VP()), torch.linspace(0.6, 0.1, 801, dtype=torch.float64)
    x = asym3().marginal(VP(), 0.1).sample(20, generator)
    back = sample(denoiser, solver, encode(denoiser, solver, x, ts.flip(0)), ts)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_what_deis_does_not_know_is_refused():
    for order in (0, 5, 2.5, True, None):
        with pytest.raises(ValueError, match=f"order must be .*; got {order}"):
            DEIS(order)
    for power in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"power must be a positive, finite number; got {power}"):
            DEIS(3, power)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match=r"alpha, sigma > 0; got the time t = 1\.0"):
            solver.coefficients(Cosine(t_max=1.0), [1.0, 0.5, 0.2])
    assert (repr(DEIS(3)), DEIS(3) == DEIS(3, 2.0)) == ("DEIS(order=3, power=2.0)", True)
