import math

import numpy as np
import pytest
import torch
from problems import MAIN, affine_step, asym3, asym3_reference, exact, gaussian, point_mass, propagate

from diffedu.exponential import DDIM, DPMSolverPP2M
from diffedu.metrics import empirical_order
from diffedu.sampling import encode, sample
from diffedu.schedules import VP, Cosine
from diffedu.solvers import Ancestral

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
TINY = {"rtol": 1e-12, "atol": 1e-12}


def one_step(solver, denoiser, x, t, s, z=0.0):
    (record,) = solver.coefficients(denoiser.schedule, [t, s])
    return solver.step(denoiser, x, record, None, lambda: torch.full_like(x, z))[0]


@every
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
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP2M()], ids=repr)
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
    ("solver", "tolerance"), [(DDIM(), 0.05), (DPMSolverPP2M(), 0.1)], ids=["ddim", "2m"]
)
def test_the_order_on_a_mixture(solver, tolerance):
    # audit, appendix E: pre-asymptotic below 160 steps; the median, not the root mean square
    x, reference = asym3_reference()
    steps, denoiser = [160, 320, 640], exact(asym3(), VP())
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
