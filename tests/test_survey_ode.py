"""The survey's ODE and its solvers, S61-S103: run as `test_survey_forward` runs the forward half.

Each test applies one check to the package; where the audit's verdict is A or B the printed form goes through
the same check and must fail it, for the reason that `match` names. On a line the probability flow moves each
point at a fixed quantile, so paths come from distribution functions alone, with no ODE; further oracles are
quadrature, sympy and the transcription of the audit's algorithms.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
import transcription
from problems import affine_step, exact, gaussian, mix, point_mass
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm
from test_survey_backward import MIX_MEAN, MIX_PARTS, MIX_VARIANCE, draws, mix_score, near_mix, walk
from test_survey_forward import equal, generator, near, times

from diffedu.denoiser import Counted, Prediction
from diffedu.exponential import DDIM, DPMSolver
from diffedu.fokker_planck import solve
from diffedu.likelihood import log_likelihood
from diffedu.metrics import empirical_order
from diffedu.phi import phi
from diffedu.sampling import encode, sample, trajectory
from diffedu.schedules import VE, VP, Cosine, SubVP
from diffedu.sde import forward_drift, reverse_drift
from diffedu.solvers import RK45, Ancestral, Euler, EulerMaruyama

SCHEDULES = [VP(), SubVP(), VE(), Cosine()]
S, T = 0.6, 0.3  # one step of the audit, from S down to T
DENOISER = exact(mix(), VP())
CELLS = (torch.arange(480, dtype=torch.float64) + 0.5) / 40 - 6
EARLY, LATE = 0.05, 0.4


# VP in closed form, apart from the package


def beta(t):
    return 0.1 + 19.9 * t


def amp(t):
    return np.exp(-0.05 * t - 4.975 * t**2)


def dev(t):
    return np.sqrt(-np.expm1(-0.1 * t - 9.95 * t**2))


def lam(t):
    return np.log(amp(t) / dev(t))


def time_of(l):
    log = np.logaddexp(0, -2 * l)
    return 2 * log / (np.sqrt(0.01 + 39.8 * log) + 0.1)


def parts(t):
    """Weight, mean and standard deviation of the parts of p_t."""
    return [(p, amp(t) * m, np.sqrt((amp(t) * s) ** 2 + dev(t) ** 2)) for p, m, s in MIX_PARTS]


def density(x, t):
    return sum(p * norm.pdf(x, m, s) for p, m, s in parts(t))


def quantile(u, t):
    """The point of p_t below which the share u lies, by bisection: the path of the flow; u, t broadcast."""
    u, t = np.broadcast_arrays(np.asarray(u, float), np.asarray(t, float))
    low, high = np.full(u.shape, -12.0), np.full(u.shape, 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(p * norm.cdf(middle, m, s) for p, m, s in parts(t)) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def noise_at(x, t):
    """The exact noise model at the points x and one time."""
    return -dev(t) * mix_score(x, amp(t), dev(t))


def noise_on(u, t):
    """The noise model on the paths u (n, 1) at the times t (1, m)."""
    x = quantile(u, t)
    return np.stack([noise_at(x[:, j], t[0, j]) for j in range(t.shape[1])], axis=1)


SHARES = (np.arange(60) + 0.5)[:, None] / 60
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def between(low, high):
    """Gauss's nodes (1, 40) and weights (40,) on an interval."""
    return low + (high - low) * (1 + NODES)[None] / 2, WEIGHTS * (high - low) / 2


def column(x):
    return torch.as_tensor(np.asarray(x, float)).reshape(-1, 1)


def run(denoiser, solver, x, ts):
    return sample(denoiser, solver, column(x), ts)[:, 0].numpy()


def errors(solver, ts):
    """Distance from the exact paths of the mixture at the end of ts, for 400 shares."""
    u = (np.arange(400) + 0.5) / 400
    return np.abs(run(DENOISER, solver, quantile(u, float(ts[0])), ts) - quantile(u, float(ts[-1])))


# 7 Fokker-Planck


@pytest.mark.equation("eq-many-steps")
def test_many_steps():
    # W1 to the data of Euler-Maruyama on the reverse SDE: the audit's 0.1225 at 10 steps, 0.0247 at 50
    n = 8000
    data = quantile((np.arange(n) + 0.5) / n, 1e-3)

    def distance(steps):
        def step(x, t, s, z):
            beta_dt = beta(t) * (t - s)
            return (1 + beta_dt / 2) * x + beta_dt * mix_score(x, amp(t), dev(t)) + math.sqrt(beta_dt) * z

        return np.abs(np.sort(walk(step, times(steps, 1.0, 1e-3), draws(n), 40)) - data).mean()

    floor = np.abs(np.sort(quantile(np.random.default_rng(41).uniform(size=n), 1e-3)) - data).mean()
    few, more, many = (distance(steps) for steps in (10, 50, 400))
    assert few == pytest.approx(0.1225, abs=0.02)
    assert few > 2 * more > 2 * many - 0.01
    assert many < 2 * floor + 0.01
    # "thousands" is no theorem, and the ODE needs few: 20 evaluations from draws of the prior
    steps = run(DENOISER, DPMSolver((3,) * 6 + (2,)), np.sort(draws(n)), VP().grid(7))
    assert np.abs(steps - data).mean() < more


@pytest.mark.equation("eq-one-density")
def test_one_density():
    start, end = (torch.from_numpy(density(CELLS.numpy(), t)) for t in (EARLY, LATE))

    def evolve():
        return solve(lambda x, t: forward_drift(VP(), x, t), VP().g2, start, CELLS, (EARLY, LATE))[-1]

    def check(later):
        apart = float((later - end).abs().sum()) / 40
        assert apart < 0.01, f"p differs from p_t by {apart:.2f}"

    check(evolve())
    assert torch.equal(evolve(), evolve())  # deterministic, as the paths are not
    paths = [
        walk(lambda x, t, s, z: x + math.sqrt(beta(t) * (s - t)) * z, times(10), np.zeros(3), k)
        for k in (1, 2)
    ]
    assert np.abs(paths[0] - paths[1]).min() > 0.01
    with pytest.raises(AssertionError, match=r"p differs from p_t by 0\.76"):  # "the distribution is stable"
        check(start)


@pytest.mark.equation("eq-sde-restated")
def test_sde_restated():
    # the moments of dx = f x dt + g dw, by scipy, are those of the kernel
    for schedule in SCHEDULES:

        def slope(t, y, schedule=schedule):
            one = torch.ones(1, 1, dtype=torch.float64)
            f = float(forward_drift(schedule, one, t))
            return [f * y[0], 2 * f * y[1] + schedule.g2(t)]

        a, b = 0.1, 0.8
        y = [schedule.alpha(a) * 1.7, schedule.sigma(a) ** 2]
        found = solve_ivp(slope, (a, b), y, rtol=1e-10, atol=1e-12).y[:, -1]
        equal("the moments", found, [schedule.alpha(b) * 1.7, schedule.sigma(b) ** 2], 1e-7)


@pytest.mark.equation("eq-fokker-planck")
def test_fokker_planck():
    # Gaussian marginals solve (7) for any alpha and sigma
    x, t, m, v = sympy.symbols("x t m v", positive=True)
    a, s = sympy.Function("a", positive=True)(t), sympy.Function("s", positive=True)(t)
    variance = a**2 * v + s**2
    p = sympy.exp(-((x - a * m) ** 2) / (2 * variance)) / sympy.sqrt(variance)
    f = sympy.diff(a, t) / a
    g2 = sympy.diff(s**2, t) - 2 * f * s**2
    residual = sympy.diff(p, t) + sympy.diff(f * x * p, x) - sympy.diff(g2 * p, x, 2) / 2
    assert sympy.simplify(residual / p) == 0

    # and the mixture's, by central differences of its density
    x, t, h = np.linspace(-3, 3, 61), 0.3, 1e-3
    rate = (density(x, t + h / 10) - density(x, t - h / 10)) / (h / 5)
    flux = [(-beta(t) / 2) * (x + k * h) * density(x + k * h, t) for k in (-1, 1)]
    curve = (density(x + h, t) - 2 * density(x, t) + density(x - h, t)) / h**2
    np.testing.assert_allclose(rate + (flux[1] - flux[0]) / (2 * h) - beta(t) / 2 * curve, 0, atol=1e-4)


@pytest.mark.equation("eq-split-diffusion")
@pytest.mark.equation("eq-log-derivative")
@pytest.mark.equation("eq-fokker-planck-family")
def test_fokker_planck_family():
    x, y, t = sympy.symbols("x y t")
    p = sympy.Function("p", positive=True)(x, y, t)
    f = [sympy.Function(name)(x, y, t) for name in ("f1", "f2")]
    g2, rho2 = (sympy.Function(name)(t) for name in ("g2", "rho2"))

    def right(drift, noise):
        terms = [
            -sympy.diff(b * p, z) + sympy.diff(noise * p, z, 2) / 2
            for b, z in zip(drift, (x, y), strict=True)
        ]
        return sum(terms)

    def family(noise):
        return [b - (g2 - noise) * sympy.diff(sympy.log(p), z) / 2 for b, z in zip(f, (x, y), strict=True)]

    for z in (x, y):
        assert sympy.simplify(p * sympy.diff(sympy.log(p), z) - sympy.diff(p, z)) == 0
        split = sympy.diff((g2 - rho2) * sympy.diff(p, z), z) + sympy.diff(rho2 * p, z, 2)
        assert sympy.simplify(sympy.diff(g2 * p, z, 2) - split) == 0
    assert sympy.simplify(right(family(rho2), rho2) - right(f, g2)) == 0

    # the condition: rho depends on t alone. Along x the residual is - (p rho2'' + p' rho2') / 2, up to sign
    rho2 = sympy.Function("rho2")(x, t)
    residual = right(family(rho2), rho2) - right(f, g2)
    want = (p * sympy.diff(rho2, x, 2) + sympy.diff(p, x) * sympy.diff(rho2, x)) / 2
    assert sympy.simplify(residual - want) == 0


@pytest.mark.equation("eq-family-sde")
def test_family_sde():
    for k, ratio in enumerate((0.0, 0.25, 1.0, 2.0)):  # rho^2 / g^2, above g too
        start, eta = column(draws(4000)), math.sqrt(ratio)
        ts = np.linspace(1.0, 1e-3, 301)
        found = sample(DENOISER, EulerMaruyama(eta), start, ts, generator(42 + k))[:, 0].numpy()
        near_mix(found)
        x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 0.4
        there = mix_score(x.numpy(), amp(t), dev(t))
        want = -beta(t) / 2 * (x.numpy() + (1 + ratio) * there)
        np.testing.assert_allclose(reverse_drift(DENOISER, x, t, eta).numpy(), want, rtol=1e-10, atol=1e-10)


def forward_ends(ratio, n=20_000):
    """(x at 0.01, x at 0.4) of the member rho^2 = ratio g^2, forward in time by Euler-Maruyama."""

    def step(x, t, s, z):
        drift = -beta(t) / 2 * (x + (1 - ratio) * mix_score(x, amp(t), dev(t)))
        return x + drift * (s - t) + math.sqrt(ratio * beta(t) * (s - t)) * z

    start = quantile(np.random.default_rng(46).uniform(size=n), 0.01)
    return start, walk(step, times(150, 0.01, LATE), start, 47)


@pytest.mark.equation("eq-same-marginals")
def test_same_marginals():
    n, (v_start, v_end) = 20_000, (amp(t) ** 2 * MIX_VARIANCE + dev(t) ** 2 for t in (0.01, LATE))
    ends = {ratio: forward_ends(ratio, n) for ratio in (0.0, 0.5, 1.0, 2.0)}
    correlations = {ratio: float(np.corrcoef(*pair)[0, 1]) for ratio, pair in ends.items()}
    u = (np.arange(4000) + 0.5) / 4000
    for _, end in ends.values():
        near(
            mean=(end.mean(), amp(LATE) * MIX_MEAN, math.sqrt(v_end / n)),
            variance=(end.var(), v_end, v_end * math.sqrt(2 / n) + 0.002),
        )
        assert np.abs(np.sort(end) - quantile((np.arange(n) + 0.5) / n, LATE)).mean() < 0.03
    of_sde = amp(LATE) / amp(0.01) * math.sqrt(v_start / v_end)
    of_ode = np.corrcoef(quantile(u, 0.01), quantile(u, LATE))[0, 1]
    assert (of_ode, of_sde) == pytest.approx((0.932, 0.483), abs=0.005)
    audit = [0.932, 0.669, 0.483, 0.263]
    assert list(correlations.values()) == pytest.approx(audit, abs=0.03)

    def check(ratio):  # the joint law of two times, not the law at each
        near(correlation=(correlations[ratio], of_sde, (1 - of_sde**2) / math.sqrt(n)))

    check(1.0)
    for ratio, found in ((0.0, r"0\.93"), (0.5, r"0\.6"), (2.0, r"0\.2")):
        with pytest.raises(AssertionError, match=rf"correlation {found}\d*, not 0\.48"):
            check(ratio)


# 8 The probability-flow ODE


@pytest.mark.equation("eq-probability-flow")
def test_probability_flow():
    u = SHARES[:, 0]
    for t in (0.05, 0.3, 0.8):  # the velocity of a quantile
        h = 1e-4
        velocity = (quantile(u, t + h) - quantile(u, t - h)) / (2 * h)
        found = reverse_drift(DENOISER, column(quantile(u, t)), t, 0.0)[:, 0].numpy()
        np.testing.assert_allclose(found, velocity, rtol=1e-5, atol=1e-5)
    end = run(DENOISER, RK45(1e-11, 1e-11), quantile(u, 1.0), [1.0, 1e-3])
    shares = sum(p * norm.cdf(end, m, s) for p, m, s in parts(1e-3))
    assert np.abs(shares - u).max() < 1e-8  # F_t(x_t) is constant


@pytest.mark.equation("eq-invertible")
def test_invertible():
    x = column(quantile(SHARES[:, 0], 1e-3))
    there = encode(DENOISER, RK45(1e-11, 1e-11), x, [1e-3, 1.0])
    back = sample(DENOISER, RK45(1e-11, 1e-11), there, [1.0, 1e-3])
    assert float((back - x).abs().max()) < 1e-8
    assert float((there[:, 0] - column(quantile(SHARES[:, 0], 1.0))[:, 0]).abs().max()) < 1e-8

    # towards t = 0 the inverse needs data that fill the line: two points of p_1, where are they at 1e-12?
    schedule = VP(t_min=1e-12)
    pair = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)

    def check(denoiser):
        apart = float(sample(denoiser, DDIM(), pair, schedule.grid(60)).diff(dim=0))
        assert apart > 1e-3, f"the points are {apart:.1e} apart"

    check(exact(mix(), schedule))
    with pytest.raises(AssertionError, match=r"the points are 3\.\de-07 apart"):  # data at one point
        check(point_mass(schedule, [0.8]))
    slopes = []
    for t in (1e-1, 1e-2, 1e-3, 1e-4):
        at = torch.tensor([[0.8 * amp(t)], [0.8 * amp(t) + 0.1 * dev(t)]], dtype=torch.float64)
        schedule = VP(t_min=1e-5)
        drift = reverse_drift(point_mass(schedule, [0.8]), at, t, 0.0)
        slopes.append(float(drift.diff(dim=0)) / (0.1 * dev(t)) - schedule.f(t))
    assert slopes == pytest.approx([10.1, 75.0, 545, 5049], rel=3e-3)  # g^2 / (2 sigma^2)


@pytest.mark.equation("eq-continuous-flow")
def test_continuous_flow():
    x = quantile(SHARES[:, 0], 1e-3)
    found = log_likelihood(DENOISER, column(x), mix().marginal(VP(), 1.0), rtol=1e-10).numpy()
    np.testing.assert_allclose(found, np.log(density(x, 1e-3)), atol=1e-6, rtol=0)

    # the formula itself, on exact paths from 0.05 to 0.8: the divergence by quadrature
    ts, weights = between(0.05, 0.8)
    paths, h = quantile(SHARES, ts), 1e-5
    divergence = np.empty_like(paths)
    for j, t in enumerate(ts[0]):
        left, right = (mix_score(paths[:, j] + k * h, amp(t), dev(t)) for k in (-1, 1))
        divergence[:, j] = -beta(t) / 2 * (1 + (right - left) / (2 * h))
    first, last = (np.log(density(quantile(SHARES[:, 0], t), t)) for t in (0.05, 0.8))
    np.testing.assert_allclose(last + divergence @ weights, first, atol=1e-6, rtol=0)


@pytest.mark.equation("eq-one-ode")
def test_one_ode():
    x = np.linspace(-2, 2, 9)
    for t in (0.05, 0.4, 0.9):
        there, f, g2 = mix_score(x, amp(t), dev(t)), -beta(t) / 2, beta(t)
        found = [reverse_drift(DENOISER, column(x), t, eta)[:, 0].numpy() for eta in (0.0, 1.0)]
        of_forward = f * x - g2 / 2 * there  # (8) with rho = 0, of the forward SDE
        of_reverse = -(-found[1] - g2 / 2 * there)  # and of (6), whose clock runs the other way
        np.testing.assert_allclose(found[0], of_forward, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found[0], of_reverse, rtol=1e-10, atol=1e-10)


# 9 Semi-linear


@pytest.mark.equation("eq-score-to-noise")
def test_score_to_noise():
    x = np.linspace(-2, 2, 9)
    prediction = Prediction(column(x), float(amp(T)), float(dev(T)), "eps", column(noise_at(x, T)))
    np.testing.assert_allclose(prediction.score[:, 0].numpy(), mix_score(x, amp(T), dev(T)), rtol=1e-12)

    def check(factor):  # data N(0, 1), whose noise model is sigma x, must stay N(0, 1) under (9)
        def slope(t, x):
            return -beta(t) / 2 * x - beta(t) / 2 * (-factor / dev(t)) * dev(t) * x

        end = solve_ivp(slope, (1.0, 1e-3), [1.0], rtol=1e-10, atol=1e-12).y[0, -1]
        near(growth=(end, 1, 1e-8))

    check(1.0)
    with pytest.raises(AssertionError, match=r"growth 12\.335\d*, not 1"):  # -eps / (2 sigma)
        check(0.5)
    assert math.exp((10.05 - 0.1 * 1e-3 - 9.95e-6) / 4) == pytest.approx(12.3354, abs=1e-4)


@pytest.mark.equation("eq-noise-ode")
@pytest.mark.equation("eq-semi-linear")
def test_noise_ode():
    x = np.linspace(-2, 2, 9)
    for t in (0.05, 0.4, 0.9):
        h = -beta(t) / 2 * x + beta(t) / (2 * dev(t)) * noise_at(x, t)
        np.testing.assert_allclose(
            reverse_drift(DENOISER, column(x), t, 0.0)[:, 0].numpy(), h, rtol=1e-10, atol=1e-10
        )
        np.testing.assert_allclose(run(DENOISER, Euler(), x, [t, t - 0.01]), x - 0.01 * h, rtol=1e-10)

    def constant(x, t):  # a network that answers 0.7 leaves an affine function of x of slope f
        return Prediction(x, VP().alpha(t), VP().sigma(t), "eps", torch.full_like(x, 0.7))

    constant.schedule = VP()
    drift = reverse_drift(constant, column(x), T, 0.0)[:, 0].numpy()
    np.testing.assert_allclose(np.diff(drift) / np.diff(x), -beta(T) / 2, rtol=1e-10)


@pytest.mark.equation("eq-variation-of-constants")
@pytest.mark.equation("eq-plain-integral")
@pytest.mark.equation("eq-lambda-integral")
@pytest.mark.equation("eq-exponential-integral")
@pytest.mark.equation("eq-exact-step")
def test_integral_forms():
    # (11), (12), (14), (15) on exact paths of the mixture; the last is (16), one step of a grid
    start, end = quantile(SHARES[:, 0], S), quantile(SHARES[:, 0], T)
    tau, weights = between(S, T)
    eps, x = noise_on(SHARES, tau), quantile(SHARES, tau)
    push = beta(tau) / (2 * dev(tau))
    carried = np.exp(-(0.05 * T + 4.975 * T**2) + 0.05 * tau + 4.975 * tau**2)  # e^(int_tau^t f)
    rate = -beta(tau) / (2 * dev(tau) ** 2)  # d lambda / d tau, by (13)
    lams, lam_weights = between(lam(S), lam(T))
    forms = {
        11: amp(T) / amp(S) * start + (carried * push * eps) @ weights,
        12: start + (-beta(tau) / 2 * x + push * eps) @ weights,
        14: amp(T) / amp(S) * start - amp(T) * (rate * dev(tau) / amp(tau) * eps) @ weights,
        15: amp(T) / amp(S) * start
        - amp(T) * (np.exp(-lams) * noise_on(SHARES, time_of(lams))) @ lam_weights,
    }
    for found in forms.values():
        np.testing.assert_allclose(found, end, rtol=0, atol=1e-9)


@pytest.mark.equation("eq-black-box")
def test_black_box():
    u = 0.37  # scipy's RK45 as Song et al. call it, and ours, on one path
    start, end = quantile(u, 1.0), float(quantile(u, 1e-3))

    def slope(t, x):
        return -beta(t) / 2 * (x + mix_score(x, amp(t), dev(t)))

    theirs = solve_ivp(slope, (1.0, 1e-3), [float(start)], method="RK45", rtol=1e-5, atol=1e-5)
    counted = Counted(DENOISER)
    ours = sample(counted, RK45(), column(start), [1.0, 1e-3])
    assert theirs.y[0, -1] == pytest.approx(end, abs=1e-3)
    assert float(ours) == pytest.approx(end, abs=1e-3)
    assert max(counted.nfe, theirs.nfev) < 100


def largest(solver, law, z, n, spacing="lam"):
    """The largest error at 1e-3 of points z standard deviations out, for Gaussian data (mean, deviation)."""
    mean, std = law

    def at(t):
        return amp(t) * mean + z * np.sqrt((amp(t) * std) ** 2 + dev(t) ** 2)

    denoiser = exact(gaussian(mean, std), VP()) if std else point_mass(VP(), [mean])
    return np.abs(run(denoiser, solver, at(1.0), VP().grid(n, spacing)) - at(1e-3)).max()


@pytest.mark.equation("eq-linear-term")
def test_linear_term():
    z = np.array([-1.0, 0.5, 1.0])

    def check(law):  # in ten steps the exact linear term is worth it
        ours, black_box = largest(DPMSolver(1), law, z, 10), largest(Euler(), law, z, 10)
        assert ours < black_box, f"exponential {ours:.2g}, Euler {black_box:.0e}"

    check((0.8, 0.0))  # data at one point: exact, where Euler is off by 0.01
    assert 0.005 < largest(Euler(), (0.8, 0.0), z, 10) < 0.05
    assert largest(DPMSolver(1), (0.8, 0.0), z, 10) < 1e-10
    with pytest.raises(AssertionError, match=r"exponential 0\.21, Euler \de-1[4-6]"):  # the two terms cancel
        check((0.0, 1.0))


# 10 DPM-Solver


@pytest.mark.equation("eq-exact-linear")
def test_exact_linear():
    for schedule in SCHEDULES:
        carried = math.exp(quad(schedule.f, S, T, epsabs=1e-13, epsrel=1e-13)[0])
        for solver in (DDIM(), DDIM(1.0)):
            (record,) = solver.coefficients(schedule, [S, T])
            assert record.a == pytest.approx(carried, rel=1e-11)


@pytest.mark.equation("eq-half-log-snr")
def test_half_log_snr():
    for schedule in SCHEDULES:
        t = torch.linspace(schedule.t_min, min(schedule.t_max, 0.999), 400, dtype=torch.float64)
        found = schedule.lam(t)
        torch.testing.assert_close(found, torch.log(schedule.alpha(t) / schedule.sigma(t)))
        torch.testing.assert_close(schedule.snr(t), torch.exp(2 * found))
        assert bool((found.diff() < 0).all())  # strictly, or there were no inverse
        torch.testing.assert_close(schedule.t_of_lam(found), t, rtol=1e-10, atol=1e-12)
    t = np.linspace(1e-3, 1, 400)
    np.testing.assert_allclose(time_of(lam(t)), t, rtol=1e-11)
    np.testing.assert_allclose(VP().t_of_lam(torch.from_numpy(lam(t))).numpy(), t, rtol=1e-11)


@pytest.mark.equation("eq-g2-lambda")
@pytest.mark.equation("eq-f-restated")
def test_g2_lambda():
    t = sympy.symbols("t")
    a, s = (sympy.Function(name, positive=True)(t) for name in "as")
    f = sympy.diff(sympy.log(a), t)
    g2 = sympy.diff(s**2, t) - 2 * f * s**2
    assert sympy.simplify(g2 + 2 * s**2 * sympy.diff(sympy.log(a / s), t)) == 0
    other = g2 + 2 * s**2 * sympy.diff(sympy.log(s / a), t)  # with the lambda of S86
    assert sympy.simplify(other - 4 * s * (a * sympy.diff(s, t) - s * sympy.diff(a, t)) / a) == 0
    h = 1e-5
    for schedule in SCHEDULES:
        for t in (0.1, 0.5, 0.9):
            slope = (schedule.lam(t + h) - schedule.lam(t - h)) / (2 * h)
            assert schedule.g2(t) == pytest.approx(-2 * schedule.sigma(t) ** 2 * slope, rel=1e-6)
            slope = math.log(schedule.alpha(t + h) / schedule.alpha(t - h)) / (2 * h)
            assert schedule.f(t) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.equation("eq-change-of-variable")
def test_change_of_variable():
    start, end = quantile(SHARES[:, 0], S), quantile(SHARES[:, 0], T)

    def check(half_log_snr, inverse):
        lams, weights = between(half_log_snr(S), half_log_snr(T))
        eps = noise_on(SHARES, inverse(lams))
        found = amp(T) / amp(S) * start - amp(T) * (np.exp(-lams) * eps) @ weights
        worst = float(np.median(np.abs(found - end)))
        assert worst < 1e-9, f"x_t is off by {worst:.1f}"

    check(lam, time_of)
    torch_lam = VP().lam, lambda l: VP().t_of_lam(torch.from_numpy(l)).numpy()
    check(*torch_lam)
    with pytest.raises(AssertionError, match=r"x_t is off by 2\.\d"):  # log(sigma / alpha)
        check(lambda t: -lam(t), lambda l: time_of(-l))


@pytest.mark.equation("eq-time-grid")
def test_time_grid():
    def check(last):
        before, schedule = 0.05, VP(t_min=0.0)
        h = schedule.lam(last) - schedule.lam(before)
        assert math.isfinite(h), f"the last step is h = {h}"
        sample(exact(mix(), schedule), DPMSolver(2), torch.ones(3, 1), [1.0, before, last])

    check(1e-3)
    check(1e-12)
    with pytest.raises(AssertionError, match="the last step is h = inf"):  # t_M = 0
        check(0.0)
    schedule = VP(t_min=0.0)
    with pytest.raises(ValueError, match="needs a finite lam at both ends"):
        schedule.grid(10)
    for solver in (DDIM(), DPMSolver(3)):
        with pytest.raises(ValueError, match="alpha, sigma > 0"):
            solver.coefficients(schedule, [1.0, 0.5, 0.0])


def jets(u, at, count):
    """The derivatives 0 ... count - 1 in lambda of the noise on the path u at lambda = at."""
    fit = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda l: noise_on(np.array([[u]]), time_of(l)[None])[0], 24, [at - 0.5, at + 0.5]
    )
    return [fit.deriv(k)(at) if k else fit(at) for k in range(count)]


@pytest.mark.equation("eq-lambda-derivatives")
@pytest.mark.equation("eq-taylor")
def test_taylor():
    u, at = 0.37, float(lam(S))
    derivatives = jets(u, at, 4)
    # the total derivative: eps depends on lambda by itself and by way of x
    x, h = float(quantile(u, S)), 1e-4
    own = (noise_at(np.array([x]), time_of(at + h)) - noise_at(np.array([x]), time_of(at - h))) / (2 * h)
    by_x = (noise_at(np.array([x + h]), S) - noise_at(np.array([x - h]), S)) / (2 * h)
    speed = (quantile(u, time_of(at + h)) - quantile(u, time_of(at - h))) / (2 * h)
    assert float(own[0] + by_x[0] * speed) == pytest.approx(derivatives[1], rel=1e-6)
    assert abs(own[0] / derivatives[1] - 1) > 0.1  # which the partial one is not

    hs = np.array([0.2, 0.1, 0.05])
    there = noise_on(np.array([[u]]), time_of(at + hs)[None])[0]
    for k in (1, 2, 3):
        series = sum(derivatives[n] * hs**n / math.factorial(n) for n in range(k))
        assert empirical_order(hs, np.abs(there - series)) == pytest.approx(k, abs=0.3)


@pytest.mark.equation("eq-taylor-step")
@pytest.mark.equation("eq-four-parts")
def test_taylor_step():
    # linear term and coefficients exact, derivatives exact too: what is left is the part that is omitted
    u, at = 0.37, float(lam(S))
    derivatives, hs = jets(u, at, 3), [0.4, 0.2, 0.1, 0.05]
    left = {1: [], 2: [], 3: []}
    for h in hs:
        t = float(time_of(at + h))
        x = amp(t) / amp(S) * float(quantile(u, S))
        for k in left:
            n = k - 1
            x -= dev(t) * h**k * phi(k, h) * derivatives[n]
            left[k].append(abs(x - float(quantile(u, t))))
    for k, found in left.items():
        assert empirical_order(hs, found) == pytest.approx(k + 1, abs=0.35)


@pytest.mark.equation("eq-phi-recursion")
def test_phi_recursion():
    low, high = 0.3, 1.4
    h, before = high - low, math.exp(-low)  # I_(-1): the boundary term at the start
    for n in range(4):
        integral = quad(lambda l, n=n: math.exp(-l) * (l - low) ** n / math.factorial(n), low, high)[0]
        by_parts = -(h**n) / math.factorial(n) * math.exp(-high) + before
        assert by_parts == pytest.approx(integral, rel=1e-12)
        assert math.exp(-high) * h ** (n + 1) * phi(n + 1, h) == pytest.approx(integral, rel=1e-12)
        assert phi(n + 1, h) == pytest.approx((phi(n, h) - 1 / math.factorial(n)) / h, rel=1e-12)
        before = integral


@pytest.mark.equation("eq-derivative-estimate")
def test_derivative_estimate():
    u, at = 0.37, float(lam(S))
    here, slope = jets(u, at, 2)
    hs = [0.2, 0.1, 0.05, 0.025]
    exact_there, predicted = [], []
    for h in hs:
        s = float(time_of(at + h))
        guess = run(DENOISER, DPMSolver(1), quantile(u, S), [S, s])
        quotients = [(float(noise_at(x, s)[0]) - here) / h for x in (quantile([u], s), guess)]
        exact_there.append(abs(quotients[0] - slope))
        predicted.append(abs(quotients[1] - slope))
    # a forward difference, of order 1, also where the point ahead is only predicted
    assert empirical_order(hs, exact_there) == pytest.approx(1.04, abs=0.12)
    assert empirical_order(hs, predicted) == pytest.approx(1.05, abs=0.12)

    def check(path):  # somewhere in between the derivative is the quotient
        l = np.linspace(0, 1, 2001)
        values = path(l)
        quotient = values[-1] - values[0]
        derivative = np.diff(values, axis=0) / (l[1] - l[0])
        nearest = np.sqrt(((derivative - quotient) ** 2).sum(1)).min()
        assert nearest < 0.01, f"the derivative comes no nearer than {nearest:.1f}"

    check(lambda l: noise_on(np.array([[u]]), time_of(at + l)[None]).T)
    with pytest.raises(AssertionError, match=r"comes no nearer than 6\.3"):  # a vector: a whole turn
        check(lambda l: np.stack([np.cos(2 * np.pi * l), np.sin(2 * np.pi * l)], 1))


@pytest.mark.equation("eq-least-error")
def test_least_error():
    def check(ours, black_box):
        assert ours < black_box, f"DPM-Solver-1 is off by {ours:.2g}, Euler by {black_box:.2g}"

    def on_mix(n):
        return [errors(solver, VP().grid(n)).max() for solver in (DPMSolver(1), Euler())]

    z = np.linspace(-2, 2, 9)
    check(*(largest(solver, (0.3, 0.05), z, 5) for solver in (DPMSolver(1), Euler())))  # concentrated data
    assert on_mix(10) == pytest.approx([0.834, 0.299], abs=3e-3)
    with pytest.raises(AssertionError, match=r"DPM-Solver-1 is off by 0\.83, Euler by 0\.3"):
        check(*on_mix(10))
    with pytest.raises(AssertionError, match=r"DPM-Solver-1 is off by 0\.05\d*, Euler by 0\.01"):
        check(*on_mix(640))
    assert errors(DPMSolver(3), VP().grid(40)).max() < 2e-3  # what pays is the order


@pytest.mark.equation("eq-first-order")
def test_first_order():
    for s, t in ((1.0, 0.7), (S, T), (0.01, 0.001)):
        (stages,) = DPMSolver(1).coefficients(VP(), [s, t])
        (stage,) = stages
        weight = quad(lambda l: math.exp(-l), lam(s), lam(t), epsabs=1e-13)[0]
        assert (stage.t, stage.a) == pytest.approx((s, amp(t) / amp(s)), rel=1e-12)
        assert stage.b[0] == pytest.approx(-amp(t) * weight, rel=1e-9)
    hs = [0.2, 0.1, 0.05]
    local = []
    for h in hs:
        t = float(time_of(lam(S) + h))
        local.append(np.abs(run(DENOISER, DPMSolver(1), quantile(0.37, S), [S, t]) - quantile(0.37, t)).max())
    assert empirical_order(hs, local) == pytest.approx(2.1, abs=0.2)


def ddim(x, s, t, eps):
    """alpha_t x0 + sigma_t eps, with the x0 of the eps at s."""
    return amp(t) * (x - dev(s) * eps) / amp(s) + dev(t) * eps


@pytest.mark.equation("eq-dpm-solver-1")
def test_dpm_solver_1():
    grid = VP().grid(20).numpy()
    x = quantile(SHARES[:, 0], 1.0)

    def check(step):  # along the 20 steps of DDIM
        y, gaps = x, []
        for s, t in pairwise(grid):
            eps = noise_at(y, s)
            gaps.append(np.abs(step(y, s, t, eps) - ddim(y, s, t, eps)).max())
            y = ddim(y, s, t, eps)
        assert max(gaps) < 1e-12, f"a step is off by {max(gaps):.2f}"

    check(lambda y, s, t, eps: amp(t) / amp(s) * y - amp(t) * (dev(s) / amp(s) - dev(t) / amp(t)) * eps)
    check(lambda y, s, t, eps: run(DENOISER, DPMSolver(1), y, [s, t]))

    def printed(y, s, t, eps):
        return amp(t) / amp(s) * y - amp(t) * (dev(t) / amp(t) - dev(s) / amp(s)) * eps

    with pytest.raises(AssertionError, match=r"a step is off by [2-4]\.\d\d"):
        check(printed)
    y = x
    for s, t in pairwise(grid):
        y = printed(y, s, t, noise_at(y, s))
    assert 1e3 < np.abs(y).max() < 1e6  # and it diverges


@pytest.mark.equation("eq-dpm-solver-23")
def test_dpm_solver_23():
    steps = [80, 160, 320]

    def order(march):
        return empirical_order([1 / n for n in steps], [float(np.median(march(n))) for n in steps])

    for solver in (DPMSolver(2), DPMSolver(3)):
        assert order(lambda n, k=solver: errors(k, VP().grid(n))) == pytest.approx(solver.order, abs=0.1)
    u = (np.arange(100) + 0.5) / 100
    start, end = column(quantile(u, 1.0)), quantile(u, 1e-3)

    def eps(x, t):
        return DENOISER(x, t).eps

    def general(x, s, t):
        return transcription.dpm_solver_2(eps, x, s, t, r_1=0.3)

    def one_evaluation(x, s, t):  # the midpoint's form, away from the middle
        s_1 = transcription.t_lambda(
            transcription.lam(s) + 0.3 * (transcription.lam(t) - transcription.lam(s))
        )
        e_1 = eps(transcription.dpm_solver_1(eps, x, s, s_1), s_1)
        h = transcription.lam(t) - transcription.lam(s)
        return (
            transcription.alpha(t) / transcription.alpha(s) * x
            - transcription.sigma(t) * torch.expm1(h) * e_1
        )

    def away_from_the_middle(step):
        def march(n):
            x = start
            for s, t in pairwise(VP().grid(n)):
                x = step(x, s, t)
            return np.abs(x[:, 0].numpy() - end)

        return order(march)

    assert away_from_the_middle(general) == pytest.approx(2, abs=0.1)
    assert away_from_the_middle(one_evaluation) == pytest.approx(1.05, abs=0.15)  # the order is lost


@pytest.mark.equation("eq-ddim")
def test_ddim():
    s, t, x0 = 0.5, 0.49, 0.8

    def check(level, free):
        """(20) with `level` for its alpha and `free` for its sigma, at the true eps: is it x_t given x0?"""
        under = 1 - level(t) - free**2
        assert under >= 0, f"the root of {under:.2f}"
        gain = (math.sqrt(level(t)) / math.sqrt(level(s)), math.sqrt(under))
        from_eps = gain[0] * (dev(s) - math.sqrt(1 - level(s))) + gain[1]
        near(
            mean=(gain[0] * amp(s) * x0, amp(t) * x0, 1e-12),
            variance=(from_eps**2 + free**2, dev(t) ** 2, 1e-12),
        )

    def total(u):
        return amp(u) ** 2

    posterior = math.sqrt((1 - total(t)) / (1 - total(s)) * (1 - total(s) / total(t)))  # at eta = 1
    denoiser = point_mass(VP(), [x0])
    for eta in (0.0, 0.3, 1.0):
        check(total, eta * posterior)
        assert affine_step(DDIM(eta), denoiser, s, t)[2] == pytest.approx(eta * posterior, rel=1e-9)
        (record,) = DDIM(eta).coefficients(VP(), [s, t])
        of_eps = math.sqrt(1 - total(t) - (eta * posterior) ** 2) - amp(t) * dev(s) / amp(s)
        assert (record.a, record.b) == pytest.approx((amp(t) / amp(s), of_eps), rel=1e-9)
    assert affine_step(Ancestral(), denoiser, s, t)[2] == pytest.approx(posterior, rel=1e-9)
    variance = (1 - 0.55) / (1 - 0.5) * (1 - 0.5 / 0.55)  # from 0.5 to 0.55
    assert variance == pytest.approx(0.08182, abs=1e-5)

    # alpha and sigma as the slides define them; then alpha as they do, with no noise
    with pytest.raises(AssertionError, match=r"the root of -0\.2"):
        check(amp, dev(s))
    with pytest.raises(AssertionError, match=r"mean .*; variance"):
        check(amp, 0.0)


@pytest.mark.equation("eq-deterministic-ddim")
def test_deterministic_ddim():
    x = np.linspace(-2, 2, 9)
    for s, t in pairwise([1.0, 0.7, 0.3, 0.02, 0.001]):
        at, there = amp(s) ** 2, amp(t) ** 2  # the alpha of (21)
        eps = noise_at(x, s)
        want = math.sqrt(there) * (x - math.sqrt(1 - at) * eps) / math.sqrt(at) + math.sqrt(1 - there) * eps
        np.testing.assert_allclose(run(DENOISER, DDIM(), x, [s, t]), want, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("eq-sigma-alpha")
def test_sigma_alpha():
    x, eps, (before, after) = 1.0, 0.4, (0.5, 0.9)  # DDIM's alpha at the two times
    want = (
        math.sqrt(after) * (x - math.sqrt(1 - before) * eps) / math.sqrt(before) + math.sqrt(1 - after) * eps
    )
    assert want == pytest.approx(1.0886585736864, abs=1e-12)

    def check(alpha, sigma):  # DPM-Solver-1 with those
        (a, c), (b, d) = ((f(before), f(after)) for f in (alpha, sigma))
        near(x=(c / a * x - (c * b / a - d) * eps, want, 1e-12))

    def amplitude(level):
        return math.sqrt(level)

    check(amplitude, lambda level: math.sqrt(1 - level))
    times_of = [float(time_of(0.5 * math.log(level / (1 - level)))) for level in (before, after)]
    (record,) = DDIM().coefficients(VP(), times_of)
    assert record.a * x + record.b * eps == pytest.approx(want, abs=1e-12)
    with pytest.raises(AssertionError, match=r"x 1\.480?\d*, not 1\.08866"):  # sigma = 1 - alpha, literally
        check(lambda level: level, lambda level: 1 - level)
    with pytest.raises(AssertionError, match=r"x 1\.20\d*, not 1\.08866"):  # and with alpha an amplitude
        check(amplitude, lambda level: 1 - math.sqrt(level))


@pytest.mark.equation("eq-ddim-is-dpm-1")
def test_ddim_is_dpm_1():
    grid = VP().grid(20)
    x = y = quantile(SHARES[:, 0], 1.0)
    for s, t in pairwise(grid.numpy()):
        y = ddim(y, s, t, noise_at(y, s))
    for solver in (DPMSolver(1), DDIM()):
        np.testing.assert_allclose(run(DENOISER, solver, x, grid), y, rtol=0, atol=1e-11)

    def check(solver, cost):
        *_, last = trajectory(DENOISER, solver, column(x), VP().grid(cost))
        gap = np.abs(last.x[:, 0].numpy() - quantile(SHARES[:, 0], 1e-3)).max()
        assert gap < 0.02, f"{last.nfe} evaluations leave an error of {gap:.2f}"

    check(DPMSolver(3), 20)  # 60 evaluations
    check(DDIM(), 1000)  # as many as the chain has
    with pytest.raises(
        AssertionError, match=r"60 evaluations leave an error of 0\.[1-9]"
    ):  # "hence it is fast"
        check(DDIM(), 60)
    with pytest.raises(AssertionError, match=r"60 evaluations leave an error of 0\.[1-9]"):
        check(DPMSolver(1), 60)
