import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import (
    MAIN,
    affine_step,
    asym3,
    asym3_reference,
    exact,
    flow,
    gaussian,
    mix,
    point_mass,
    propagate,
    within,
)
from scipy.stats import kstest, norm

from diffedu.denoiser import Counted
from diffedu.exponential import DDIM
from diffedu.metrics import empirical_order
from diffedu.sampling import prior, sample
from diffedu.schedules import VE, VP, Cosine
from diffedu.sde import reverse_drift
from diffedu.solvers import (
    Ancestral,
    AnnealedLangevin,
    Euler,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
)

MEAN, STD = 0.5, 0.7


def moment_errors(solver, schedule, n, end=None):
    """Distance of the moments after n steps (t grid, from the exact law at t_max) from the exact ones."""
    end = schedule.t_min if end is None else end
    law, denoiser = gaussian(MEAN, STD), exact(gaussian(MEAN, STD), schedule)
    ts = torch.linspace(schedule.t_max, end, n + 1, dtype=torch.float64).clamp(end, schedule.t_max)
    first, last = law.marginal(schedule, schedule.t_max), law.marginal(schedule, end)
    mean, variance = propagate(solver, denoiser, ts, float(first.means), float(first.covs))
    return abs(mean - float(last.means)), abs(variance - float(last.covs))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_the_weak_order_of_the_reverse_sde_is_1(eta):
    steps = [160, 320, 640]
    means, variances = zip(*(moment_errors(EulerMaruyama(eta), VP(), n) for n in steps), strict=True)
    h = [1 / n for n in steps]
    assert empirical_order(h, means) == pytest.approx(1, abs=0.1)
    assert empirical_order(h, variances) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("solver", [Ancestral(), ReverseDiffusion()], ids=repr)
@pytest.mark.parametrize("schedule", [VP(), VE(sigma_max=5.0), Cosine(t_max=0.99)], ids=repr)
def test_the_chains_run_backward_have_weak_order_1(solver, schedule):
    steps = [160, 320, 640]
    means, variances = zip(*(moment_errors(solver, schedule, n) for n in steps), strict=True)
    for errors in (means, variances):
        assert errors[-1] < 1e-2
        if errors[0] > 1e-12:  # VE has no mean error
            assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["vp", "subvp", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_every_eta_has_the_same_marginals(name, eta, generator):
    # audit (8): one family, one density. On the line the exact distribution function is known.
    schedule, law, end, n = MAIN[name], mix(), 0.05, 4000
    x = law.marginal(schedule, 0.95).sample(n, generator)
    ts = torch.linspace(0.95, end, 401, dtype=torch.float64)
    x = sample(exact(law, schedule), EulerMaruyama(eta), x, ts, generator)[:, 0].numpy()
    there = law.marginal(schedule, end)

    def cdf(v):
        parts = zip(there.weights, there.means[:, 0], there.covs[:, 0, 0].sqrt(), strict=True)
        return sum(float(w) * norm.cdf(v, float(m), float(s)) for w, m, s in parts)

    assert kstest(x, cdf).pvalue > 1e-3


@pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_a_step_follows_the_reverse_drift(schedule, eta, generator):
    denoiser = exact(asym3(), schedule)
    x = torch.randn(30, 2, dtype=torch.float64, generator=generator)
    (record,) = EulerMaruyama(eta).coefficients(schedule, [0.5, 0.49])
    z = torch.randn(30, 2, dtype=torch.float64, generator=generator)
    got, state = EulerMaruyama(eta).step(denoiser, x, record, None, lambda: z)
    want = x - 0.01 * reverse_drift(denoiser, x, 0.5, eta) + eta * math.sqrt(schedule.g2(0.5) * 0.01) * z
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert state is None


def test_without_noise_euler_maruyama_is_euler(generator):
    x, ts = torch.randn(30, 2, dtype=torch.float64, generator=generator), VP().grid(10)
    denoiser = exact(asym3(), VP())
    before = generator.get_state()
    runs = [sample(denoiser, solver, x, ts, generator) for solver in (Euler(), EulerMaruyama(0.0))]
    assert torch.equal(*runs)
    assert torch.equal(generator.get_state(), before)
    assert (Euler().stochastic, EulerMaruyama(0.0).stochastic, EulerMaruyama().stochastic) == (0, 0, 1)
    assert EulerMaruyama() == EulerMaruyama(1.0)


@pytest.mark.equation("eq-euler")
def test_the_order_of_euler_is_1():
    x, reference = asym3_reference()
    steps, denoiser = [80, 160, 320, 640], exact(asym3(), VP())
    errors = [
        float((sample(denoiser, Euler(), x, VP().grid(n, "t")) - reference).norm(dim=1).median())
        for n in steps
    ]
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.05)
    assert Euler().order == 1


@pytest.mark.parametrize("name", ["subvp", "ve", "cosine", "custom"])
@pytest.mark.equation("eq-euler")
def test_euler_converges_on_every_schedule(name, generator):
    schedule, law, end = MAIN[name], asym3(), 0.05
    x = law.marginal(schedule, 0.6).sample(100, generator)
    reference = torch.from_numpy(flow(law, schedule, x.numpy(), 0.6, end))
    errors, steps = [], [50, 100, 200]
    for n in steps:
        ts = torch.linspace(0.6, end, n + 1, dtype=torch.float64)
        errors.append(float((sample(exact(law, schedule), Euler(), x, ts) - reference).norm(dim=1).median()))
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.05


def test_the_reference_agrees_with_a_closed_form():
    # Gaussian data: the ODE moves every point at a fixed number of standard deviations
    law, x = gaussian(MEAN, STD, dim=2), np.array([[0.3, -1.0], [2.0, 0.7]])
    for schedule in MAIN.values():
        first, last = (law.marginal(schedule, t) for t in (0.9, 0.1))
        scale = float((last.covs[0, 0, 0] / first.covs[0, 0, 0]).sqrt())
        want = last.means.numpy() + scale * (x - first.means.numpy())
        np.testing.assert_allclose(flow(law, schedule, x, 0.9, 0.1), want, rtol=1e-9)


def test_simulation_agrees_with_the_exact_moments(generator):
    # the affine probes of the weak-order tests, against sampling itself
    schedule, n, draws = VP(), 50, 20_000
    law = gaussian(MEAN, STD)
    ts = schedule.grid(n, "t")
    first = law.marginal(schedule, 1.0)
    for solver in (EulerMaruyama(), EulerMaruyama(0.5), Ancestral(), ReverseDiffusion()):
        x = sample(exact(law, schedule), solver, first.sample(draws, generator), ts, generator)
        mean, variance = propagate(solver, exact(law, schedule), ts, float(first.means), float(first.covs))
        assert within(x.mean(), mean, math.sqrt(variance / draws))
        assert within(x.var(), variance, variance * math.sqrt(2 / draws))


def test_data_at_one_point_is_found(generator):
    # the whole reverse SDE, down to t_min: what is left is the noise of t_min
    for schedule in (VP(), VE()):
        denoiser = point_mass(schedule, [0.8, -0.3])
        x = torch.randn(2000, 2, dtype=torch.float64, generator=generator) * schedule.sigma(1.0)
        x = sample(denoiser, EulerMaruyama(), x, schedule.grid(400), generator)
        rest = (x - torch.tensor([0.8, -0.3], dtype=torch.float64)) / schedule.sigma(schedule.t_min)
        assert float(rest.std()) == pytest.approx(1, abs=0.1)


def test_a_singular_start_is_refused(generator):
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"f and g\^2 must be finite; got f = -inf.* at t = 1\.0"):
        sample(exact(asym3(), Cosine(t_max=1.0)), EulerMaruyama(), x, [1.0, 0.5], generator)


def test_langevin_at_one_level_settles_where_its_step_size_says():
    # audit S60: x <- x - e x / v + sqrt(2 e) z has the stationary variance v / (1 - e / (2 v)), exactly
    law, schedule, s = gaussian(0.0, 0.7), VP(), 0.3
    v = float(law.marginal(schedule, s).covs)
    for snr in (0.3, 0.1, 0.03):
        e = 2 * (snr * schedule.sigma(s)) ** 2
        a, c, n = affine_step(AnnealedLangevin(1, snr), exact(law, schedule), 0.31, s)
        variance = 5.0
        for _ in range(int(20 * v / e)):
            variance = a * a * variance + n * n
        assert variance == pytest.approx(v / (1 - e / (2 * v)), rel=1e-9)
        assert abs(c) < 1e-12


def test_many_langevin_steps_are_many_single_ones(generator):
    schedule, denoiser = VP(), Counted(exact(asym3(), VP()))
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator)
    noises = list(torch.randn(6, 50, 2, dtype=torch.float64, generator=generator))

    def step(solver, x, drawn):
        (record,) = solver.coefficients(schedule, [0.5, 0.4])
        draws = iter(drawn)
        return solver.step(denoiser, x, record, None, lambda: next(draws))[0]

    together = step(AnnealedLangevin(6, 0.2), x, noises)
    assert denoiser.nfe == 6
    one_by_one = x
    for z in noises:
        one_by_one = step(AnnealedLangevin(1, 0.2), one_by_one, [z])
    torch.testing.assert_close(together, one_by_one, rtol=1e-14, atol=1e-14)
    # a predictor-corrector step is the predictor's and then the corrector's
    corrected = step(PredictorCorrector(Ancestral(), 5, 0.2), x, noises)
    predicted = step(Ancestral(), x, noises[:1])
    torch.testing.assert_close(
        corrected, step(AnnealedLangevin(5, 0.2), predicted, noises[1:]), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(
    "make", [lambda n, snr: AnnealedLangevin(n, snr), lambda n, snr: PredictorCorrector(Ancestral(), n, snr)]
)
def test_langevin_refuses_no_steps_and_no_noise(make):
    for n, snr, said in ((0, 0.1, "n_steps"), (2.5, 0.1, "2.5"), (1, 0.0, "snr"), (1, math.nan, "nan")):
        with pytest.raises(ValueError, match=said):
            make(n, snr)


@pytest.mark.parametrize("schedule", [VP(), VE()], ids=["vp", "ve"])
def test_annealed_langevin_follows_the_law_as_its_steps_grow(schedule):
    # moments of the chain on Gaussian data, exactly: each level's step is affine and is taken n times
    law, ts = gaussian(MEAN, STD), schedule.grid(60)
    denoiser, want = exact(law, schedule), law.marginal(schedule, schedule.t_min)
    errors = []
    for n in (10, 100, 1000):
        mean, variance = 0.0, schedule.sigma(schedule.t_max) ** 2
        for t, s in pairwise(ts.tolist()):
            a, c, noise = affine_step(AnnealedLangevin(1, 0.1), denoiser, t, s)
            for _ in range(n):
                mean, variance = a * mean + c, a * a * variance + noise * noise
        errors.append(max(abs(mean - float(want.means)), abs(variance - float(want.covs))))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("schedule", [VP(), VE()], ids=["vp", "ve"])
def test_a_corrector_mends_a_predictor_of_few_steps(schedule, generator):
    # the statistic of 4,000 draws of the law itself has the mean 0.014 and stays below 0.03
    law, n, ts = gaussian(MEAN, STD), 4000, schedule.grid(12)
    want = norm(MEAN, float(law.marginal(schedule, schedule.t_min).covs) ** 0.5)
    distance = {}
    for solver in (ReverseDiffusion(), PredictorCorrector(ReverseDiffusion(), 20, 0.15)):
        x = prior(schedule, (n, 1), generator, dtype=torch.float64)
        out = sample(exact(law, schedule), solver, x, ts, generator)
        distance[type(solver)] = kstest(out[:, 0].numpy(), want.cdf).statistic
    assert distance[PredictorCorrector] < 0.5 * distance[ReverseDiffusion]


@pytest.mark.equation("eq-ancestral")
def test_the_posterior_by_three_formulas():
    # q(x_{i-1} | x_i, x0) of DDPM's chain: by Bayes, by Ho et al. 2020 (7) and by its noise form
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    x0, x = 0.7, -1.1
    for i in (1, 10, 500, 999):
        beta, now, before = betas[i], bar[i], bar[i - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)
        bayes = (math.sqrt(1 - beta) * x / beta + math.sqrt(before) * x0 / (1 - before)) / precision
        of_data = math.sqrt(before) * beta / (1 - now)
        of_state = math.sqrt(1 - beta) * (1 - before) / (1 - now)
        eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        by_noise = (x - beta / math.sqrt(1 - now) * eps) / math.sqrt(1 - beta)
        variance = (1 - before) / (1 - now) * beta
        assert (of_data * x0 + of_state * x, by_noise) == pytest.approx((bayes, bayes), rel=1e-12, abs=1e-12)
        assert variance == pytest.approx(1 / precision, rel=1e-12)
    for schedule in MAIN.values():  # the same two formulas for any alpha and sigma
        for t, s in ((0.9, 0.5), (0.5, 0.45), (0.3, 0.05)):
            a = schedule.alpha(t) / schedule.alpha(s)
            v = schedule.sigma(t) ** 2 - (a * schedule.sigma(s)) ** 2
            precision = a**2 / v + 1 / schedule.sigma(s) ** 2
            eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
            bayes = (a * x / v + schedule.alpha(s) * x0 / schedule.sigma(s) ** 2) / precision
            (record,) = Ancestral().coefficients(schedule, [t, s])
            assert record.a * x + record.b * eps == pytest.approx(bayes, rel=1e-11, abs=1e-11)
            assert record.n**2 == pytest.approx(1 / precision, rel=1e-11)


@pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
def test_ancestral_is_ddim_with_eta_1(schedule, generator):
    denoiser = exact(asym3(), schedule)
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator) * schedule.sigma(0.9)
    ts = torch.linspace(0.9, 0.05, 13, dtype=torch.float64)
    runs = [sample(denoiser, solver, x, ts, generator.manual_seed(1)) for solver in (Ancestral(), DDIM(1.0))]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [VP(), VE(), Cosine(t_max=0.99)], ids=repr)
def test_reverse_euler_maruyama_has_the_moments_of_the_law(schedule, generator):
    # a simulation against the exact law: the bias of the steps, by recursion, and 4 standard errors
    law, draws, n = gaussian(MEAN, STD), 20_000, 200
    denoiser, ts = exact(law, schedule), schedule.grid(n)
    there, here = (law.marginal(schedule, t) for t in (schedule.t_max, schedule.t_min))
    x = sample(denoiser, EulerMaruyama(), there.sample(draws, generator), ts, generator)
    mean, variance = propagate(EulerMaruyama(), denoiser, ts, float(there.means), float(there.covs))
    bias = mean - float(here.means), variance - float(here.covs)
    assert max(map(abs, bias)) < 0.05
    assert within(x.mean() - bias[0], float(here.means), math.sqrt(variance / draws))
    assert within(x.var() - bias[1], float(here.covs), variance * math.sqrt(2 / draws))


EVERY_SOLVER = [
    Euler(),
    EulerMaruyama(),
    Ancestral(),
    ReverseDiffusion(),
    AnnealedLangevin(2, 0.1),
    PredictorCorrector(Ancestral(), 1, 0.1),
]
NAMES = [type(solver).__name__ for solver in EVERY_SOLVER]


@pytest.mark.parametrize("solver", EVERY_SOLVER, ids=NAMES)
def test_the_state_keeps_its_dtype(solver, generator):
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(4, 2, dtype=dtype, generator=generator)
        y = sample(exact(asym3(), VP()), solver, x, VP().grid(3), generator)
        assert (y.shape, y.dtype) == (x.shape, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("solver", EVERY_SOLVER, ids=NAMES)
def test_the_device_follows_the_state(solver):
    denoiser, g = exact(asym3(), VP()), torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 2, device="cuda", generator=g)
    y = sample(denoiser, solver, x, VP().grid(3), g)
    assert (y.device, y.dtype) == (x.device, x.dtype)
    # one step with the same noise: what the CPU finds
    (record,) = solver.coefficients(VP(), [0.5, 0.4])
    z = torch.randn(4, 2, device="cuda", generator=g)
    there, _ = solver.step(denoiser, x, record, None, lambda: z)
    here, _ = solver.step(denoiser, x.cpu(), record, None, lambda: z.cpu())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
