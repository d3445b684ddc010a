import math

import numpy as np
import pytest
import torch
import transcription
from problems import MAIN, affine_step, asym3, asym3_reference, exact, gaussian, point_mass, propagate

from diffedu.denoiser import Prediction
from diffedu.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP2M, DPMSolverPP3M, fast_plan
from diffedu.metrics import empirical_order
from diffedu.sampling import encode, sample, trajectory
from diffedu.schedules import VE, VP, Cosine
from diffedu.solvers import RK45, Ancestral

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
TINY = {"rtol": 1e-12, "atol": 1e-12}


def one_step(solver, denoiser, x, t, s, z=0.0):
    (record,) = solver.coefficients(denoiser.schedule, [t, s])
    return solver.step(denoiser, x, record, None, lambda: torch.full_like(x, z))[0]


@every
@pytest.mark.equation("eq-deterministic-ddim")
def test_without_noise_ddim_recombines_its_own_prediction(schedule, generator):
    denoiser = exact(asym3(), schedule)
    x = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    for t, s in ((0.9, 0.5), (0.5, 0.49), (0.5, 0.5 - 1e-7), (0.3, schedule.t_min), (0.2, 0.6)):
        prediction = denoiser(x, t)
        want = schedule.alpha(s) * prediction.x0 + schedule.sigma(s) * prediction.eps
        got = one_step(DDIM(), denoiser, x, t, s)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@every
@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize(
    "solver", [DDIM(), DPMSolver(2), DPMSolverPP2M(), DPMSolverPP3M(), DEIS(3)], ids=repr
)
def test_data_at_one_point_is_carried_exactly_whatever_the_steps(schedule, n, solver, generator):
    denoiser = point_mass(schedule, [0.8, -0.3])
    x0, eps = denoiser.points, torch.randn(40, 2, dtype=torch.float64, generator=generator)

    def at(t):
        return schedule.alpha(t) * x0 + schedule.sigma(t) * eps

    ts = schedule.grid(n)
    down = sample(denoiser, solver, at(schedule.t_max), ts)
    # what rounding the first state costs at the last
    gain = schedule.alpha(schedule.t_min) / schedule.alpha(schedule.t_max)
    rounding = 1e-12 * schedule.sigma(schedule.t_max) + 1e-14 * gain
    if isinstance(solver, DPMSolver):  # the noise, read again from a rounded state, weighs e^h
        rounding *= 1e3
    torch.testing.assert_close(down, at(schedule.t_min), rtol=0, atol=rounding)
    up = encode(denoiser, solver, at(0.1), [0.1, 0.4, 0.8])
    torch.testing.assert_close(up, at(0.8), rtol=1e-11, atol=1e-11)


@every
def test_with_eta_1_ddim_draws_from_the_posterior(schedule, generator):
    # x_s given x_t and x0, by conditioning their joint Gaussian
    x0, eps = torch.randn(2, 30, 1, dtype=torch.float64, generator=generator)
    for t, s in ((0.9, 0.5), (0.5, 0.45), (0.3, schedule.t_min)):
        alpha_t, sigma_t, alpha_s, sigma_s = (c(u) for u in (t, s) for c in (schedule.alpha, schedule.sigma))
        a = alpha_t / alpha_s
        joint = np.array([[sigma_s**2, a * sigma_s**2], [a * sigma_s**2, sigma_t**2]])
        gain = joint[0, 1] / joint[1, 1]
        variance = joint[0, 0] - gain * joint[0, 1]
        x = alpha_t * x0 + sigma_t * eps
        mean = alpha_s * x0 + gain * sigma_t * eps
        for i in range(3):
            denoiser = point_mass(schedule, x0[i])
            for solver in (DDIM(1.0), Ancestral()):
                got = one_step(solver, denoiser, x[i : i + 1], t, s)
                torch.testing.assert_close(got, mean[i : i + 1], rtol=1e-10, atol=1e-10)
                noise = one_step(solver, denoiser, x[i : i + 1], t, s, 1.0) - got
                assert float(noise) == pytest.approx(math.sqrt(variance), rel=1e-7)


@every
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_every_eta_keeps_the_law_of_data_at_one_point(schedule, eta):
    denoiser = point_mass(schedule, [0.8])
    ts = schedule.grid(6)
    mean, variance = propagate(
        DDIM(eta), denoiser, ts, 0.8 * schedule.alpha(float(ts[0])), schedule.sigma(float(ts[0])) ** 2
    )
    assert mean == pytest.approx(0.8 * schedule.alpha(schedule.t_min), rel=1e-9)
    assert variance == pytest.approx(schedule.sigma(schedule.t_min) ** 2, rel=1e-9)


def test_eta_scales_the_deviation_of_the_posterior():
    denoiser = point_mass(VP(), [0.8])
    noises = [affine_step(DDIM(eta), denoiser, 0.5, 0.3)[2] for eta in (0.0, 0.25, 0.5, 1.0)]
    assert noises == pytest.approx([eta * noises[-1] for eta in (0.0, 0.25, 0.5, 1.0)], rel=1e-12)
    # a small step leaves room for more than the posterior's noise, a large one does not
    assert affine_step(DDIM(1.2), denoiser, 0.5, 0.499)[2] > 0
    with pytest.raises(ValueError, match=r"eta = 1\.2 asks for more noise than sigma at t = 0\.1"):
        DDIM(1.2).coefficients(VP(), [0.9, 0.1])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_weak_order_on_gaussian_data_is_1(eta):
    law, schedule = gaussian(0.5, 0.7), VP()
    first, last = law.marginal(schedule, 1.0), law.marginal(schedule, schedule.t_min)
    errors, steps = [], [100, 200, 400]
    for n in steps:
        mean, variance = propagate(
            DDIM(eta), exact(law, schedule), schedule.grid(n), float(first.means), float(first.covs)
        )
        errors.append((abs(mean - float(last.means)), abs(variance - float(last.covs))))
    means, variances = zip(*errors, strict=True)
    assert max(means) < 1e-12  # the mean is exact: there eps = 0
    assert empirical_order([1 / n for n in steps], variances) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(DDIM(), 0.05), (DPMSolver(1), 0.05), (DPMSolver(2), 0.1), (DPMSolverPP2M(), 0.1), (DPMSolver(3), 0.05)],
    ids=repr,
)
def test_the_order_on_a_mixture(solver, tolerance):
    # the median, not the root mean square, which points near separatrices spoil
    x, reference = asym3_reference()
    steps, denoiser = [80, 160, 320, 640], exact(asym3(), VP())
    errors = [
        float((sample(denoiser, solver, x, VP().grid(n)) - reference).norm(dim=1).median()) for n in steps
    ]
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(solver.order, abs=tolerance)


def test_solvers_compare_by_value_and_say_what_they_are():
    assert DDIM() == DDIM(0.0) != DDIM(1.0)
    assert (DDIM().stochastic, DDIM(0.1).stochastic) == (False, True)
    assert repr(DDIM(0.5)) == "DDIM(eta=0.5)"


def test_a_step_from_pure_noise_is_refused():
    with pytest.raises(ValueError, match=r"alpha, sigma > 0; got a step from t = 1\.0 to 0\.5"):
        DDIM().coefficients(Cosine(t_max=1.0), [1.0, 0.5])


SPACINGS = [(12, "lam"), (7, "t"), (30, 2)]


@pytest.mark.parametrize(("n", "spacing"), SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.equation("eq-dpm-solver-23")
def test_dpm_solver_agrees_with_the_transcription(order, n, spacing, generator):
    denoiser, x = exact(asym3(), VP()), torch.randn(100, 2, dtype=torch.float64, generator=generator)
    ts = VP().grid(n, spacing)
    want = transcription.single_step(lambda y, t: denoiser(y, t).eps, x, ts, [order] * n)
    torch.testing.assert_close(sample(denoiser, DPMSolver(order), x, ts), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nfe", range(1, 13))
def test_fast_plans_are_the_audits_and_spend_what_they_say(nfe, generator):
    plan = fast_plan(nfe)
    assert list(plan) == transcription.dpm_solver_fast_orders(nfe)
    assert sum(plan) == nfe
    denoiser, x = exact(asym3(), VP()), torch.randn(20, 2, dtype=torch.float64, generator=generator)
    ts = VP().grid(len(plan))
    steps = list(trajectory(denoiser, DPMSolver(plan), x, ts))
    assert [step.nfe for step in steps] == [sum(plan[:i]) for i in range(len(plan) + 1)]
    want = transcription.single_step(lambda y, t: denoiser(y, t).eps, x, ts, plan)
    torch.testing.assert_close(steps[-1].x, want, rtol=1e-10, atol=1e-10)


@every
@pytest.mark.equation("eq-ddim-is-dpm-1")
def test_dpm_solver_1_is_ddim(schedule, generator):
    # audit S103
    denoiser, x = exact(asym3(), schedule), torch.randn(40, 2, dtype=torch.float64, generator=generator)
    for n in (1, 20):
        one, other = (sample(denoiser, solver, x, schedule.grid(n)) for solver in (DPMSolver(1), DDIM()))
        torch.testing.assert_close(one, other, **TINY)


@every
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_converges_on_every_schedule_and_upward(schedule, order, generator):
    denoiser, steps = exact(asym3(), schedule), [8, 16, 32]
    x = asym3().marginal(schedule, 0.2).sample(20, generator)
    want, errors = encode(denoiser, RK45(1e-10, 1e-10), x, [0.2, 0.6]), []
    for n in steps:
        ts = torch.linspace(0.2, 0.6, n + 1, dtype=torch.float64)
        errors.append(float((encode(denoiser, DPMSolver(order), x, ts) - want).norm(dim=1).median()))
    assert empirical_order([1 / n for n in steps], errors) > order - 0.25
    assert errors[-1] < 1e-2


def test_there_and_back_to_eight_digits(generator):
    denoiser, ts = exact(asym3(), VP()), torch.linspace(0.6, 0.1, 601, dtype=torch.float64)
    x = asym3().marginal(VP(), 0.1).sample(20, generator)
    back = sample(denoiser, DPMSolver(3), encode(denoiser, DPMSolver(3), x, ts.flip(0)), ts)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)


def test_dpm_solver_in_the_limit_of_a_tiny_step(generator):
    # h = 1e-9: no digit of the step itself is lost
    denoiser, x = exact(asym3(), VP()), torch.randn(20, 2, dtype=torch.float64, generator=generator)
    t = 0.4
    s = VP().t_of_lam(VP().lam(t) + 1e-9)
    want = sample(denoiser, DDIM(), x, [t, s]) - x
    for order in (2, 3):
        got = sample(denoiser, DPMSolver(order), x, [t, s]) - x
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-15)


def test_bad_orders_and_plans_are_refused():
    for order in (0, 4, 1.5, True, (), (1, 4), "2", None):
        with pytest.raises(ValueError, match="order must be 1, 2 or 3, or a plan of those; got"):
            DPMSolver(order)
    with pytest.raises(
        ValueError, match="a plan of 3 steps needs a grid of as many steps, 4 times; got 6 times"
    ):
        DPMSolver((3, 2, 1)).coefficients(VP(), VP().grid(5).tolist())
    for nfe in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"nfe must be an int of at least 1; got {nfe}"):
            fast_plan(nfe)
    for order in (1, 2, 3):
        with pytest.raises(ValueError, match=r"alpha, sigma > 0; got a step from t = 1\.0 to 0\.5"):
            DPMSolver(order).coefficients(Cosine(t_max=1.0), [1.0, 0.5])
    assert DPMSolver(3) != DPMSolver((3, 3)) == DPMSolver([3, 3])
    assert (repr(DPMSolver(3)), repr(DPMSolver((3, 1)))) == ("DPMSolver(3)", "DPMSolver((3, 1))")
    assert (DPMSolver(2).order, DPMSolver((1, 3)).order, DPMSolver(2).stochastic) == (2, 3, False)


# What the survey prints, run: each must fail where the right form holds.


@pytest.mark.parametrize("schedule", [VP(), VE()], ids=repr)
@pytest.mark.equation("eq-dpm-solver-1")
def test_the_printed_sign_of_dpm_solver_1_is_wrong(schedule, generator):
    # audit S98: alpha_t (sigma_t / alpha_t - sigma_s / alpha_s) eps must be subtracted with the other sign
    denoiser, x = exact(asym3(), schedule), torch.randn(20, 2, dtype=torch.float64, generator=generator)
    s, t = 0.6, 0.5
    alpha_s, alpha_t, sigma_s, sigma_t = (c(u) for c in (schedule.alpha, schedule.sigma) for u in (s, t))
    eps = denoiser(x, s).eps
    step = alpha_t * (sigma_s / alpha_s - sigma_t / alpha_t) * eps
    ours = sample(denoiser, DPMSolver(1), x, [s, t])
    torch.testing.assert_close(ours, alpha_t / alpha_s * x - step, **TINY)
    printed = alpha_t / alpha_s * x + step
    want = -2 * eps * (alpha_s * sigma_t - alpha_t * sigma_s) / alpha_s
    torch.testing.assert_close(printed - ours, want, **TINY)
    assert float((printed - ours).abs().max()) > 0.1


@pytest.mark.equation("eq-score-to-noise")
def test_the_printed_half_in_the_score_inflates_the_data():
    # audit S74: with s = -eps / (2 sigma) unit Gaussian data widen by exp((B(1) - B(t_min)) / 4)
    denoiser, x = exact(gaussian(), VP()), torch.tensor([[0.5], [-1.0]], dtype=torch.float64)

    def halved(x, t):
        p = denoiser(x, t)
        return Prediction(x, p.alpha, p.sigma, "score", 0.5 * p.score)

    halved.schedule = VP()
    right, printed = (sample(d, RK45(1e-9, 1e-9), x, [1.0, 1e-3]) for d in (denoiser, halved))
    torch.testing.assert_close(right, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(printed, 12.3354 * x, rtol=1e-4, atol=1e-4)


@pytest.mark.equation("eq-change-of-variable")
@pytest.mark.equation("eq-exponential-integral")
def test_the_printed_lambda_is_upside_down():
    # audit S86: on an exact trajectory eq. 15 holds with lam = log(alpha / sigma), not log(sigma / alpha)
    schedule, law, s, t = VP(), gaussian(0.5, 0.7), 0.6, 0.3

    def x_at(u):  # Gaussian data: the ODE moves every point at a fixed number of standard deviations
        there = law.marginal(schedule, u)
        return there.means + 1.3 * there.covs[0].sqrt()

    def right_side(sign):  # lam = sign log(alpha / sigma)
        u, w = np.polynomial.legendre.leggauss(40)
        low, high = schedule.lam(s), schedule.lam(t)
        total = 0.0
        for lam, weight in zip(low + (high - low) * 0.5 * (1 + u), 0.5 * w, strict=True):
            now = schedule.t_of_lam(float(lam))
            eps = exact(law, schedule)(x_at(now), now).eps
            total = total + sign * (high - low) * weight * math.exp(-sign * lam) * eps
        return schedule.alpha(t) / schedule.alpha(s) * x_at(s) - schedule.alpha(t) * total

    torch.testing.assert_close(right_side(1), x_at(t), rtol=1e-10, atol=1e-10)
    assert float((right_side(-1) - x_at(t)).abs()) > 0.5
