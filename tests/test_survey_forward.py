"""The survey's forward half, S05-S33: every item is run, and where it is wrong the printed form is run too.

Each test applies one check to the package. Where the audit's verdict is A or B, the printed form goes through
the same check and must fail it, for the reason that `match` names; one that blows up is an error of the test,
not evidence. Oracles: closed forms, autodiff, quadrature, ODE solves at tight tolerance.
A statistic is compared within 4 standard errors, which `near` is given; the seeds are fixed.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp

from diffedu.denoiser import Counted
from diffedu.metrics import empirical_order
from diffedu.mixtures import ExactDenoiser, GaussianMixture
from diffedu.sampling import prior, sample
from diffedu.schedules import VE, VP, Cosine, Custom, SubVP
from diffedu.sde import BrownianPath, ddpm_chain, euler_maruyama, forward_drift, ncsn_chain, perturb
from diffedu.solvers import Euler

SCHEDULES = [VP(), SubVP(), VE(), Cosine()]
VP0, VE0 = VP(t_min=0.0), VE(t_min=0.0)  # simulated from t = 0
HALF = 0.5
B_HALF, B_END = 2.5375, 10.05  # B(t) = 0.1 t + 9.95 t^2, the integral of VP's beta, at 1/2 and 1
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # of DDPM
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
VP_STEPS = VP0.g2(torch.arange(1000, dtype=torch.float64) / 1000) / 1000  # beta(t_i) dt, of Euler-Maruyama


class PrintedVP(VP):
    """The slide's VP-SDE, dx = sqrt(1 - sigma^2) x dt + sqrt(sigma^2) dw, with the kernel that it claims."""

    def _f(self, m, t):
        return m.sqrt(1 - self._sigma(m, t) ** 2)

    def _g2(self, m, t):
        return self._sigma(m, t) ** 2


PRINTED_VP = PrintedVP(t_min=0.0)


class StandardIncrements:
    """A path whose increments are standard Gaussians whatever the step: `w_t` read as the slide has it."""

    def __init__(self, path):
        self.path, self.shape = path, path.shape

    def increment(self, t, s):
        return self.path.increment(t, s) / math.sqrt(s - t)


class Impulses:
    """A path that is 0 but for one increment of size sqrt(dt) in row k at step k.

    An Euler-Maruyama map is affine in its increments, so the squares of what comes out sum to its variance:
    the weak error without a sampling error.
    """

    def __init__(self, n):
        self.shape, self.k = (n, 1), 0

    def increment(self, t, s):
        dw = torch.zeros(self.shape, dtype=torch.float64)
        dw[self.k] = math.sqrt(s - t)
        self.k += 1
        return dw


class Silence:
    """A path that does not move."""

    shape = (1, 1)

    def increment(self, t, s):
        return torch.zeros(self.shape, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def times(n, start=0.0, end=1.0):
    return [start + (end - start) * k / n for k in range(n + 1)]


def start_at(value, n):
    return torch.full((n, 1), float(value), dtype=torch.float64)


def unit_data(n):
    """Draws of mean 0 and E x^2 = 1, not Gaussian: +1 or -1."""
    return torch.sign(torch.randn(n, 1, dtype=torch.float64, generator=generator(18)))


def last(chain):
    for x in chain:
        end = x
    return end


def near(**estimates):
    """Each name=(estimate, truth, standard error) within 4 standard errors; the message names what is not.

    An estimate that is not finite is a ValueError: a run that blew up must not pass for a form refuted.
    """
    far = []
    for name, numbers in estimates.items():
        estimate, truth, error = map(float, numbers)
        if not (math.isfinite(estimate) and error > 0):
            raise ValueError(f"{name} {estimate} with the standard error {error} can refute nothing")
        if abs(estimate - truth) > 4 * error:
            far.append(f"{name} {estimate:.6g}, not {truth:.6g}")
    if far:
        raise AssertionError("; ".join(far))


def near_moments(x, mean, variance):
    """Mean and variance of (n, 1) draws that are Gaussian, or have no heavier tails than a Gaussian."""
    n = len(x)
    near(
        mean=(x.mean(), mean, math.sqrt(variance / n)),
        variance=(x.var(), variance, variance * math.sqrt(2 / n)),
    )


def near_covariance(x, y, covariance):
    """Covariance of two Gaussian samples."""
    found = torch.mean((x - x.mean()) * (y - y.mean()))
    near(covariance=(found, covariance, math.sqrt((float(x.var() * y.var()) + covariance**2) / len(x))))


def near_gaussian_shape(x):
    """Skewness and excess kurtosis 0: standard errors sqrt(6/n) and sqrt(24/n)."""
    values = x.flatten().numpy()
    n = len(values)
    near(
        skewness=(stats.skew(values), 0, math.sqrt(6 / n)),
        kurtosis=(stats.kurtosis(values), 0, math.sqrt(24 / n)),
    )


def equal(name, found, truth, rtol):
    """Element by element within rtol; the message begins with the name. ValueError as in `near`."""
    found, truth = (np.asarray(v, dtype=float) for v in (found, truth))
    if not np.isfinite(found).all():
        raise ValueError(f"{name} is not finite and can refute nothing")
    worst = np.max(np.abs(found - truth) / np.abs(truth))
    if worst > rtol:
        raise AssertionError(f"{name} is off by up to {worst:.3g} of what it should be")


def euler_variance(schedule, ts, start=0.0):
    """The exact variance of Euler-Maruyama at ts[-1] from a start of that variance."""
    x0 = start_at(0, len(ts))
    x0[-1] = math.sqrt(start)  # the row that gets no impulse
    return float((euler_maruyama(schedule, x0, ts, path=Impulses(len(ts))) ** 2).sum())


def euler_signal(schedule, ts):
    """What Euler-Maruyama leaves of a start of 1 at ts[1], ts[2], ..., with no noise."""
    x, signal = start_at(1, 1), []
    for t, s in pairwise(ts):
        x = euler_maruyama(schedule, x, [t, s], path=Silence())
        signal.append(float(x))
    return signal


def derivative(function, t):
    """d function / dt at the times t, by autodiff."""
    u = t.clone().requires_grad_(True)
    return torch.autograd.grad(function(u).sum(), u)[0]


# 1 Diffusion as an SDE


@pytest.mark.equation("eq-forward-sde")
def test_wiener_increments():
    n = 40_000

    def check(increment):
        for h in (1 / 4, 1 / 8, 1 / 16):
            first, second = increment(0.25, 0.25 + h), increment(0.25 + h, 0.25 + 2 * h)
            near_moments(first, 0, h)
            near_covariance(first, second, 0)

    check(BrownianPath(8, (n, 1), generator()).increment)

    g, noise = generator(1), {}

    def standard_noise(t):  # "w_t is a standard Gaussian noise": one at every time
        if t not in noise:
            noise[t] = torch.randn(n, 1, dtype=torch.float64, generator=g)
        return noise[t]

    with pytest.raises(AssertionError, match=r"variance [12]\.?\d*, not 0\.25"):
        check(lambda t, s: standard_noise(s) - standard_noise(t))
    with pytest.raises(AssertionError, match=r"variance [01]\.?\d*, not 0\.25"):
        check(StandardIncrements(BrownianPath(8, (n, 1), generator())).increment)

    # g is a standard deviation rate: with g = 2 a time 1/2 brings the variance g^2 / 2, not g / 2.
    double = Custom(torch.ones_like, lambda t: 2 * t.sqrt())
    x = euler_maruyama(double, start_at(1, n), times(20, 0.25, 0.75), generator=generator(2))
    near_moments(x, 1, 2**2 / 2)
    with pytest.raises(AssertionError, match="variance"):
        near_moments(x, 1, 2 / 2)


@pytest.mark.equation("eq-linear-sde")
def test_linear_drift_is_a_choice():
    n, steps = 20_000, 200

    def check(drift, g2):  # Gaussian, as every noising process would be if its drift had to be linear
        g, x = generator(3), start_at(1, n)
        for t, s in pairwise(times(steps)):
            z = torch.randn(n, 1, dtype=torch.float64, generator=g)
            x = x + drift(x, t) * (s - t) + math.sqrt(g2(t) * (s - t)) * z
        near_gaussian_shape(x)

    check(lambda x, t: forward_drift(VP0, x, t), VP0.g2)
    with pytest.raises(AssertionError, match="kurtosis -"):  # flatter than a Gaussian, and no less noise
        check(lambda x, t: -(x**3), lambda t: 2.0)


@pytest.mark.equation("eq-noising")
def test_noising_in_one_step():
    n, early, late = 20_000, 0.1, 0.3
    x0 = torch.where(torch.rand(n, 1, dtype=torch.float64, generator=generator(4)) < 0.3, -1.5, 0.8)
    at_early = euler_maruyama(VP0, x0, times(200, 0, early), generator=generator(5))
    at_late = euler_maruyama(VP0, at_early, times(400, early, late), generator=generator(6))
    eps = torch.randn(n, 1, dtype=torch.float64, generator=generator(7))
    direct = [perturb(VP0, x0, t, eps) for t in (early, late)]
    for solved, drawn in zip((at_early, at_late), direct, strict=True):  # one time: the same law
        assert stats.ks_2samp(solved.flatten(), drawn.flatten()).pvalue > 1e-3

    def check(x, y):  # two times: a path forgets, a shared eps does not
        noise_early, noise_late = x - VP0.alpha(early) * x0, y - VP0.alpha(late) * x0
        near_covariance(noise_early, noise_late, VP0.alpha(late) / VP0.alpha(early) * VP0.sigma(early) ** 2)

    check(at_early, at_late)
    with pytest.raises(AssertionError, match="covariance"):
        check(*direct)


@pytest.mark.equation("eq-snr")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_snr(schedule):
    n, t = 40_000, 0.15
    x0 = unit_data(n)
    noise = perturb(schedule, x0, t, torch.randn(n, 1, dtype=torch.float64, generator=generator(9)))
    noise = noise - schedule.alpha(t) * x0
    power = torch.mean((schedule.alpha(t) * x0) ** 2) / torch.mean(noise**2)

    def check(snr):
        near(ratio=(power, snr, snr * math.sqrt(2 / n)))

    check(schedule.snr(t))
    assert math.log(schedule.snr(t)) == pytest.approx(2 * schedule.lam(t), rel=1e-12)
    with pytest.raises(AssertionError, match="ratio"):  # alpha and sigma themselves as the energies
        check(schedule.alpha(t) / schedule.sigma(t))


@pytest.mark.equation("eq-snr-monotone")
def test_snr_must_fall():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for schedule in SCHEDULES:
        identity = -(schedule.sigma(t) ** 2) * derivative(lambda u, s=schedule: s.snr(u).log(), t)
        torch.testing.assert_close(schedule.g2(t), identity, rtol=1e-9, atol=0)
        assert bool((schedule.snr(t).diff() < 0).all())

    def alpha(u):
        return 0.5 + 0.4 * torch.cos(6 * u)

    def sigma(u):
        return torch.sqrt(1 - alpha(u) ** 2)

    fine = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    snr_slope = derivative(lambda u: 2 * torch.log(alpha(u) / sigma(u)), fine)
    smallest = float((-(sigma(fine) ** 2) * snr_slope).min())  # of g^2 = 4.8 sin 6t / (0.5 + 0.4 cos 6t)
    assert smallest == pytest.approx(-16, rel=1e-5)
    with pytest.raises(ValueError, match="signal-to-noise ratio must fall"):
        Custom(alpha, sigma)


# 2 The SDE's coefficients


@pytest.mark.equation("eq-kernel")
def test_kernel():
    n, t, x0 = 40_000, 0.35, 1.7
    B = quad(lambda s: 0.1 + 19.9 * s, 0, t)[0]
    mean, variance = math.exp(-B / 2) * x0, 1 - math.exp(-B)
    eps = torch.randn(n, 1, dtype=torch.float64, generator=generator(10))
    near_moments(perturb(VP0, start_at(x0, n), t, eps), mean, variance)
    point = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[x0]], [[[1e-12]]])))
    law = point.marginal(VP0, t)
    assert (float(law.means), float(law.covs)) == pytest.approx((mean, variance), rel=1e-9)
    for schedule in (VP(), SubVP(), Cosine()):
        assert (schedule.alpha(0.0), schedule.sigma(0.0)) == (1.0, 0.0)

    # "The final Gaussian is determined by the SNR": only up to its scale.
    rescaled = Custom(torch.ones_like, lambda u: VP0.sigma(u) / VP0.alpha(u))
    assert rescaled.snr(t) == pytest.approx(VP0.snr(t), rel=1e-12)
    x = perturb(rescaled, start_at(x0, n), t, eps)
    near_moments(x * VP0.alpha(t), mean, variance)
    with pytest.raises(AssertionError, match="mean"):
        near_moments(x, mean, variance)


@pytest.mark.equation("eq-coefficients")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_coefficients(schedule):
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    f = derivative(lambda u: schedule.alpha(u).log(), t)
    g2 = derivative(lambda u: schedule.sigma(u) ** 2, t) - 2 * f * schedule.sigma(t) ** 2
    torch.testing.assert_close(schedule.f(t), f, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.g2(t), g2, rtol=1e-9, atol=1e-12)
    if isinstance(schedule, Cosine):  # f and g^2 blow up at the end
        assert [schedule.f(s) for s in (0.9, 0.99, 0.999)] == pytest.approx([-9.92, -99.99, -1000], rel=1e-3)


@pytest.mark.equation("eq-integral-form")
def test_integral_form():
    n, end, fine = 2000, 0.5, 1024
    path = BrownianPath(2 * fine, (n, 1), generator(11))
    x0 = start_at(1, n)
    # The last integral of (3) does not depend on x: once, on the fine grid, with beta at the midpoints.
    noise = torch.zeros_like(x0)
    for t, s in pairwise(times(fine, 0, end)):
        noise += math.sqrt(0.1 + 19.9 * (t + s) / 2) * path.increment(t, s)

    def residual(schedule, steps):
        """What is left of (3), f = -beta / 2 integrated by the trapezium rule over the path found."""
        x, drift = x0, torch.zeros_like(x0)
        for t, s in pairwise(times(steps, 0, end)):
            later = euler_maruyama(schedule, x, [t, s], path=path)
            drift -= (s - t) / 4 * ((0.1 + 19.9 * t) * x + (0.1 + 19.9 * s) * later)
            x = later
        return float(torch.sqrt(torch.mean((x - x0 - drift - noise) ** 2)))

    steps = [32, 64, 128, 256]

    def check(schedule):
        errors = [residual(schedule, k) for k in steps]
        assert math.isfinite(errors[-1])
        assert errors[-1] < 0.02, f"a residual of {errors[-1]:.3g} remains"
        assert empirical_order([1 / k for k in steps], errors) == pytest.approx(1, abs=0.1)

    check(VP0)
    for other in (PRINTED_VP, SubVP(t_min=0.0)):  # another drift, the same drift with another noise
        with pytest.raises(AssertionError, match="a residual of"):
            check(other)


@pytest.mark.equation("eq-mean-integral")
def test_mean_integral():
    x0 = 1.5

    def check(mean):  # m(t) = m(0) + int_0^t f(s) m(s) ds
        for t in (0.2, HALF, 1.0):
            integral = quad(lambda s: VP0.f(s) * mean(s), 0, t, epsabs=1e-12)[0]
            equal(f"the mean at {t}", mean(t), x0 + integral, 1e-7)

    def printed(t):  # the solution of E x_t = E x_0 + int f(s) E x_t ds
        return x0 / (1 - math.log(VP0.alpha(t)))

    check(lambda t: VP0.alpha(t) * x0)
    assert printed(HALF) == pytest.approx(x0 + quad(VP0.f, 0, HALF)[0] * printed(HALF), rel=1e-9)
    assert (printed(HALF) / x0, VP0.alpha(HALF)) == pytest.approx((0.441, 0.2812), abs=1e-3)
    with pytest.raises(AssertionError, match=r"the mean at 0\.2 is off"):
        check(printed)
    x = euler_maruyama(VP0, start_at(x0, 20_000), times(400, 0, HALF), generator=generator(12))
    error = VP0.sigma(HALF) / math.sqrt(len(x))
    near(mean=(x.mean(), math.exp(-B_HALF / 2) * x0, error))
    with pytest.raises(AssertionError, match="mean"):
        near(mean=(x.mean(), printed(HALF), error))


@pytest.mark.equation("eq-ito-mean-zero")
def test_ito_integral():
    n, steps = 20_000, 256
    path = BrownianPath(2 * steps, (n, 1), generator(13))
    increments = (
        math.sqrt(VP0.g2((t + s) / 2)) * path.increment(t, s) for t, s in pairwise(times(steps, 0, HALF))
    )
    integral = sum(increments)
    variance = quad(VP0.g2, 0, HALF)[0]
    near_moments(integral, 0, variance)
    near_gaussian_shape(integral)
    assert variance == pytest.approx(B_HALF)
    with pytest.raises(AssertionError, match=r"variance 2\.5"):  # "the standard Gaussian noise term"
        near_moments(integral, 0, 1)


@pytest.mark.equation("eq-mean-ode")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_mean_ode(schedule):
    start, end = schedule.t_min, 0.9
    solution = solve_ivp(lambda t, m: schedule.f(t) * m, (start, end), [2.0], rtol=1e-11, atol=1e-13)

    def check(mean):
        equal("the mean", mean, solution.y[0, -1], 1e-8)

    ratio = schedule.alpha(end) / schedule.alpha(start)
    check(2 * ratio)
    if not isinstance(schedule, VE):  # where f = 0 the slip of the index costs nothing
        with pytest.raises(AssertionError, match="the mean is off"):
            check(2 / (1 - math.log(ratio)))


@pytest.mark.equation("eq-variance-ode")
def test_variance_ode():
    for schedule in SCHEDULES:
        start, end = schedule.t_min, 0.9

        def slope(t, v, schedule=schedule):
            return 2 * schedule.f(t) * v + schedule.g2(t)

        moment = solve_ivp(slope, (start, end), [schedule.sigma(start) ** 2], rtol=1e-11, atol=1e-14)
        assert moment.y[0, -1] == pytest.approx(schedule.sigma(end) ** 2, rel=1e-8)

    # Not conditioned on x_0, its variance stays in: Cov x_t = alpha^2 Cov x_0 + sigma^2 I.
    n, t = 40_000, 0.2
    x0 = 1.5 * torch.randn(n, 1, dtype=torch.float64, generator=generator(14))
    x = euler_maruyama(VP0, x0, times(400, 0, t), generator=generator(15))
    near_moments(x, 0, VP0.alpha(t) ** 2 * 1.5**2 + VP0.sigma(t) ** 2)
    with pytest.raises(AssertionError, match="variance"):  # "Var x_t = sigma_t^2"
        near_moments(x, 0, VP0.sigma(t) ** 2)


@pytest.mark.equation("eq-gaussianity")
def test_gaussianity():
    n, x0 = 20_000, 1.2
    mean, variance = VP0.alpha(HALF) * x0, VP0.sigma(HALF) ** 2
    wiener = quad(lambda s: VP0.g2(s) / VP0.alpha(s) ** 2, 0, HALF, epsabs=1e-12)[0]
    assert VP0.alpha(HALF) ** 2 * wiener == pytest.approx(variance, rel=1e-9)

    def check(x):
        near_moments(x, mean, variance)
        near_gaussian_shape(x)

    check(euler_maruyama(VP0, start_at(x0, n), times(400, 0, HALF), generator=generator(16)))

    two_point = torch.ones(n, 1, dtype=torch.float64)  # both moments right, and no Gaussian
    two_point[::2] = -1
    x = mean + math.sqrt(variance) * two_point
    near_moments(x, mean, variance)
    with pytest.raises(AssertionError, match="kurtosis -2"):
        check(x)


@pytest.mark.equation("eq-vp-sde")
def test_vp_sde():
    n, x0 = 10_000, 1.0

    def walk(schedule, t):
        return euler_maruyama(schedule, start_at(x0, n), times(400, 0, t), generator=generator(17))

    def check(schedule):  # the kernel that both claim
        for t in (0.25, HALF, 1.0):
            B = 0.1 * t + 9.95 * t**2
            near_moments(walk(schedule, t), math.exp(-B / 2) * x0, 1 - math.exp(-B))

    check(VP0)
    with pytest.raises(AssertionError, match=r"mean 1\.25\d*, not 0\.72.*; variance 0\.05\d*, not 0\.47"):
        check(PRINTED_VP)
    near_moments(walk(PRINTED_VP, 1.0), 1.480, 0.798)  # it fails as the equation does, not as a simulation

    def moments(schedule, variance):
        """Mean factor and variance at t = 1 by a tight solve of the moment equations."""

        def slope(t, y):
            return [schedule.f(t) * y[0], 2 * schedule.f(t) * y[1] + schedule.g2(t)]

        return solve_ivp(slope, (0, 1), [1.0, variance], rtol=1e-11, atol=1e-13).y[:, -1]

    assert moments(VP0, 0.0) == pytest.approx([VP0.alpha(1.0), VP0.sigma(1.0) ** 2], rel=1e-7)
    assert moments(PRINTED_VP, 0.0) == pytest.approx([1.480, 0.798], abs=1e-3)  # the signal grows
    assert moments(PRINTED_VP, 1.0)[1] == pytest.approx(2.987, abs=1e-3)
    assert (VP0.f(HALF), VP0.g2(HALF)) == pytest.approx((-5.025, 10.05))
    assert (PRINTED_VP.f(HALF), PRINTED_VP.g2(HALF)) == pytest.approx((0.281, 0.921), abs=1e-3)


@pytest.mark.equation("eq-vp-coefficients")
def test_vp_coefficients():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)

    def check(schedule):  # what alpha = sqrt(1 - sigma^2) entails, by autodiff of alpha and sigma alone
        equal("alpha^2 + sigma^2", schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), 1e-12)
        derived = Custom(schedule.alpha, schedule.sigma, t_max=schedule.t_max)
        equal("f", schedule.f(t), derived.f(t), 1e-9)
        equal("g^2", schedule.g2(t), derived.g2(t), 1e-9)
        equal("f", schedule.f(t), -schedule.g2(t) / 2, 1e-12)

    check(VP0)
    check(Cosine())
    u = 0.01 + 0.9 * t**3  # any sigma^2 that rises: f = -g^2/2
    rising = Custom(lambda s: torch.sqrt(0.99 - 0.9 * s**3), lambda s: torch.sqrt(0.01 + 0.9 * s**3))
    torch.testing.assert_close(rising.g2(t), 2.7 * t**2 / (1 - u), rtol=1e-9, atol=0)
    torch.testing.assert_close(rising.f(t), -rising.g2(t) / 2, rtol=1e-9, atol=0)
    with pytest.raises(AssertionError, match=r"^f is off"):  # the claimed kernel has alpha^2 + sigma^2 = 1
        check(PRINTED_VP)
    with pytest.raises(AssertionError, match=r"^g\^2 is off"):
        equal("g^2", PRINTED_VP.g2(t), VP0.g2(t), 1e-9)


@pytest.mark.equation("eq-variance-preserving")
def test_variance_preserving():
    n = 10_000
    x0 = unit_data(n)

    def check(schedule):
        for t in (0.1, 0.3, 1.0):
            x = euler_maruyama(schedule, x0, times(400, 0, t), generator=generator(19))
            near_moments(x, 0, 1)

    check(VP0)
    with pytest.raises(AssertionError, match=r"variance 1\.[12]"):  # at 0.1, on its way to 2.99
        check(PRINTED_VP)
    with pytest.raises(AssertionError, match=r"variance 0\.\d"):
        check(SubVP(t_min=0.0))  # it has VP's drift, so it obeys the same (5): (5) is not enough
    assert SubVP().f(0.3) == VP().f(0.3)

    t, variance = 0.2, 2.25  # other data: Cov x_t = I + e^-B (Cov x_0 - I)
    x = euler_maruyama(VP0, 1.5 * x0, times(400, 0, t), generator=generator(20))
    near_moments(x, 0, 1 + math.exp(-quad(VP0.g2, 0, t)[0]) * (variance - 1))


@pytest.mark.equation("eq-vp-prior")
def test_vp_prior():
    def divergence(schedule):
        """KL(q(x_T | x_0 = 1) || N(0, 1)) by quadrature."""
        q, p = stats.norm(schedule.alpha(1.0), schedule.sigma(1.0)), stats.norm()
        return quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -9, 9, epsabs=1e-13, limit=200)[0]

    def check(schedule):  # exactly normal, to rounding
        found = divergence(schedule)
        assert found <= 1e-12, f"divergence {found:.1e}"

    with pytest.raises(AssertionError, match=r"divergence 2\.2e-05"):
        check(VP())
    check(VP(beta_max=60.0))  # normal as the integral of beta grows
    assert pytest.approx(4.036e-5, rel=1e-3) == ALPHA_BAR[-1]
    draws = prior(VE(), (40_000, 1), generator(21), dtype=torch.float64)
    near_moments(draws, 0, 50.0**2)
    near_moments(prior(VP(), (40_000, 1), generator(22)), 0, 1 - math.exp(-10.05))


# 3 Discretising forward


@pytest.mark.equation("eq-ivp")
@pytest.mark.equation("eq-euler")
def test_euler():
    # Gaussian data under VP: the flow is x_t = x_T std_t / std_T, std_t^2 = alpha^2 s^2 + sigma^2.
    s, steps = 0.6, [80, 160, 320, 640]
    law = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[0.0]], [[[s * s]]])))
    std = [math.sqrt((VP().alpha(t) * s) ** 2 + VP().sigma(t) ** 2) for t in (1.0, 1e-3)]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)

    def error(n):
        counted = Counted(ExactDenoiser(law, VP()))
        y = sample(counted, Euler(), x, VP().grid(n, "t"))
        assert counted.nfe == n
        return float((y - x * std[1] / std[0]).abs().max())

    errors = [error(n) for n in steps]
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.05)
    assert errors[-1] > 1e-4  # "y_i = y(x_i)": the numbers are near the solution, not on it


@pytest.mark.equation("eq-euler-maruyama")
def test_euler_maruyama():
    n, fine, steps = 2000, 4096, [16, 32, 64, 128]
    path = BrownianPath(fine, (n, 1), generator(23))
    x0 = torch.randn(n, 1, dtype=torch.float64, generator=generator(24))
    exact = math.exp(-B_END / 2) * x0  # x_1 = alpha_1 (x_0 + int g / alpha dw), on the fine grid
    for t, s in pairwise(times(fine)):
        m = (t + s) / 2
        exact += (
            math.sqrt(0.1 + 19.9 * m) * math.exp((0.1 * m + 9.95 * m**2 - B_END) / 2) * path.increment(t, s)
        )

    def check(walk):  # additive noise: strong order 1 on one shared path
        errors = [float((euler_maruyama(VP0, x0, times(k), path=walk) - exact).abs().mean()) for k in steps]
        order = empirical_order([1 / k for k in steps], errors)
        assert abs(order - 1) < 0.1, f"strong order {order:.2f}"

    check(path)
    with pytest.raises(AssertionError, match="strong order -"):
        check(StandardIncrements(path))  # the law of the increments, which the slide leaves out, as N(0, 1)

    counts = [250, 500, 1000]
    bias = [euler_variance(VP0, times(k, 0, HALF)) - VP0.sigma(HALF) ** 2 for k in counts]
    assert bias == pytest.approx([3.65e-3, 1.82e-3, 9.1e-4], rel=0.01)
    assert empirical_order([1 / k for k in counts], bias) == pytest.approx(1, abs=0.02)  # weak order 1


@pytest.mark.equation("eq-markov-chain")
def test_markov_chain():
    n, (t0, t1, t2) = 20_000, (0.1, 0.15, 0.2)
    x0 = torch.randn(n, 1, dtype=torch.float64, generator=generator(25)) ** 3  # a law far from Gaussian
    g = generator(26)
    x1 = euler_maruyama(VP0, x0, [t0, t1], generator=g)
    x2 = euler_maruyama(VP0, x1, [t1, t2], generator=g)
    assert torch.equal(x2, euler_maruyama(VP0, x0, [t0, t1, t2], generator=generator(26)))

    variance = VP0.g2(t1) * (t2 - t1)
    step = x2 - (1 + VP0.f(t1) * (t2 - t1)) * x1  # given the present, the next step is N(., b^2 dt)
    near_moments(step, 0, variance)
    near_gaussian_shape(step)
    error = math.sqrt(variance * float(torch.mean(x0**2)) / n)
    near(covariance=(torch.mean(step * x0), 0, error))  # whatever was before


@pytest.mark.equation("eq-ddpm-chain")
def test_ddpm_chain():
    n, x0 = 10_000, 2.0

    def check(betas):
        for i, x in enumerate(ddpm_chain(start_at(x0, n), betas[:200], generator(27))):
            if i in (50, 100, 200):
                near_moments(x, math.sqrt(ALPHA_BAR[i - 1]) * x0, 1 - ALPHA_BAR[i - 1])

    check(BETAS)
    marginal_variances = 1 - ALPHA_BAR  # sigma_t^2 where beta_i should stand
    with pytest.raises(AssertionError, match=r"mean 1\.5\d*, not 1\.9\d*; variance"):  # 2 x 0.762 after 50
        check(marginal_variances)
    factors = np.sqrt(np.cumprod(1 - marginal_variances))[[49, 99, 199]]
    assert factors == pytest.approx([0.762, 0.148, 6e-7], rel=0.05)
    assert np.sqrt(ALPHA_BAR)[[49, 99, 199]] == pytest.approx([0.985, 0.947, 0.812], abs=1e-3)

    # Nor is it what Euler-Maruyama of the VP-SDE gives: neither the signal nor the variance is the same.
    steps = VP_STEPS.tolist()
    with_signal, without = (
        torch.stack(list(ddpm_chain(start_at(x, 3), steps, generator(28))))[:, 0, 0] for x in (1, 0)
    )
    exact = np.sqrt(np.cumprod(1 - VP_STEPS.numpy()))

    equal("signal", (with_signal - without)[1:], exact, 1e-9)
    with pytest.raises(AssertionError, match="signal is off"):
        equal("signal", euler_signal(VP0, times(1000)), exact, 1e-9)
    assert euler_variance(VP0, times(1000), start=1.0) == pytest.approx(1.00476, abs=5e-5)
    near_moments(last(ddpm_chain(unit_data(n), steps, generator(29))), 0, 1)


@pytest.mark.equation("eq-ddpm-taylor")
def test_ddpm_taylor():
    steps = VP_STEPS.numpy()
    abar = np.cumprod(1 - steps)

    def check(signal, variance):
        """Close to DDPM's chain: beta^2/8 a step, 2 % of the signal after 1000 of them."""
        equal("signal", signal, np.sqrt(abar), 0.02)
        equal("variance", variance, 1 - abar[-1], 0.01)

    check(np.array(euler_signal(VP0, times(1000))), euler_variance(VP0, times(1000)))

    def chain(factors, noise):  # of x <- factor x + sqrt(noise) z: its signal and its variance
        variance = 0.0
        for factor, added in zip(factors, noise, strict=True):
            variance = factor**2 * variance + added
        return np.cumprod(factors), variance

    check(*chain(1 - steps / 2, steps))
    for sigma2 in (1 - abar, steps):  # as printed, and in its favour with beta for sigma^2
        signal, variance = chain(-sigma2 / 2, sigma2)
        with pytest.raises(AssertionError, match="signal is off"):
            check(signal, variance)
        with pytest.raises(AssertionError, match="variance is off"):
            check(np.sqrt(abar), variance)
    assert math.log10(abs(signal[9])) == pytest.approx(-40.4, abs=0.1)
    assert variance == pytest.approx(0.020, abs=1e-4)
    assert np.prod(1 - BETAS.numpy() / 2) == pytest.approx(0.006462, abs=1e-6)
    assert np.sqrt(ALPHA_BAR[-1]) == pytest.approx(0.006353, abs=1e-6)
    small = BETAS.numpy()
    assert np.abs(np.sqrt(1 - small) - (1 - small / 2)).max() == pytest.approx(5.05e-5, rel=0.01)


@pytest.mark.equation("eq-ddpm-forward")
def test_ddpm_forward():
    n, x0 = 10_000, 1.5
    for i, x in enumerate(ddpm_chain(start_at(x0, n), BETAS, generator(30)), start=-1):
        if i in (0, 9, 99, 999):  # q(x_i | x_0) of Ho et al. 2020, eq. 4, whatever i
            near_moments(x, math.sqrt(ALPHA_BAR[i]) * x0, 1 - ALPHA_BAR[i])
            near_gaussian_shape(x)
    # Its limit is the VP-SDE: halving the step halves the distance to the kernel.
    gaps = []
    for count in (250, 500, 1000):
        betas = [VP0.g2(t) / count for t in times(count)[:-1]]
        gaps.append(abs(float(np.sqrt(np.prod(1 - np.array(betas[: count // 2])))) - VP0.alpha(HALF)))
    assert empirical_order([1 / 250, 1 / 500, 1 / 1000], gaps) == pytest.approx(1, abs=0.05)


@pytest.mark.equation("eq-ve-sde")
def test_ve_sde():
    def ladder(n):
        return np.diff([VE0.sigma(t) ** 2 for t in times(n)])

    counts = [100, 1000, 10_000]
    errors = []
    for n in counts:  # the SDE is the limit of the ladder: its variance per step over dt tends to g^2
        g2 = np.array([VE0.g2(t) for t in times(n)[:-1]])
        errors.append(np.abs(1 - g2 / n / ladder(n)).max())
    assert errors == pytest.approx([0.083, 0.0085, 0.00085], rel=0.02)
    assert empirical_order([1 / n for n in counts], errors) == pytest.approx(1, abs=0.02)

    def check(variance):  # of N(x_0, sigma^2 - sigma_min^2) after 100 steps
        equal("variance", variance, 50.0**2 - 0.01**2, 1e-9)

    sigmas = [VE0.sigma(t) for t in times(100)]  # the package's ladder, each rung over the noise it drew
    rungs = torch.cat(list(ncsn_chain(start_at(0, 1), sigmas, generator(38)))).diff(dim=0)
    g = generator(38)
    rungs /= torch.cat([torch.randn(1, 1, dtype=torch.float64, generator=g) for _ in sigmas])
    check((rungs[1:] ** 2).sum())
    with pytest.raises(AssertionError, match="variance is off"):  # "obtained by Euler-Maruyama": 8.3 % short
        check(euler_variance(VE0, times(100)))
    assert euler_variance(VE0, times(100)) / 50.0**2 == pytest.approx(0.917, abs=1e-3)


@pytest.mark.equation("eq-ve-coefficients")
def test_ve_coefficients():
    t = torch.linspace(0.001, 1, 200, dtype=torch.float64)
    assert bool((VE().f(t) == 0).all())
    assert bool((VE().alpha(t) == 1).all())
    g2 = derivative(lambda u: 0.01**2 * 5000 ** (2 * u), t)
    torch.testing.assert_close(VE().g2(t), g2, rtol=1e-12, atol=0)


@pytest.mark.equation("eq-ve-sigma")
def test_ve_sigma():
    n, t, x0 = 20_000, 0.01, 1.0
    assert [VE0.sigma(s) for s in (0.0, HALF, 1.0)] == pytest.approx([0.01, math.sqrt(0.5), 50])
    assert math.sqrt(VE0.g2(HALF)) == pytest.approx(VE0.sigma(HALF) * math.sqrt(2 * math.log(5000)))

    def check(start):  # the kernel N(x_0, sigma(t)^2)
        x = euler_maruyama(VE0, start, times(200, 0, t), generator=generator(31))
        near_moments(x, x0, VE0.sigma(t) ** 2)

    smoothing = torch.randn(n, 1, dtype=torch.float64, generator=generator(32))
    check(start_at(x0, n) + VE0.sigma(0.0) * smoothing)
    with pytest.raises(AssertionError, match=r"variance 1\.8"):  # e-5, not 1.19e-4: from x_0 itself
        check(start_at(x0, n))
    x = euler_maruyama(VE0, start_at(x0, n), times(200, 0, t), generator=generator(31))
    near_moments(x, x0, VE0.sigma(t) ** 2 - VE0.sigma_min**2)
    ratio = [VE0.sigma(s) ** 2 / (VE0.sigma(s) ** 2 - VE0.sigma_min**2) for s in (1e-5, 1e-3, t, 0.1, HALF)]
    assert ratio == pytest.approx([5871, 59.2, 6.38, 1.2226, 1.0002], rel=1e-3)

    # The name: what explodes is the variance, and it need not do so exponentially.
    straight = Custom(torch.ones_like, lambda s: 50 * s)
    assert straight.f(HALF) == 0
    assert (straight.sigma(1.0), straight.g2(HALF)) == pytest.approx((50, 2 * 2500 * HALF))


@pytest.mark.equation("eq-ve-euler-maruyama")
def test_ve_euler_maruyama():
    n, steps = 5000, 1000
    sigmas = [VE0.sigma(t) for t in times(steps)]
    total = sigmas[-1] ** 2 - sigmas[0] ** 2
    zero = start_at(0, n)

    def check(x):
        near_moments(x, 0, total)

    check(euler_maruyama(VE0, zero, times(steps), generator=generator(33)))
    check(last(ncsn_chain(zero, sigmas[1:], generator(34))))

    def printed():  # dt outside the root
        x, g = zero, generator(35)
        for t, s in pairwise(times(steps)):
            x = x + math.sqrt(VE0.g2(t)) * (s - t) * torch.randn(n, 1, dtype=torch.float64, generator=g)
        return x

    with pytest.raises(AssertionError, match=r"variance 2\.\d*, not 2500"):
        check(printed())
    assert float(printed().var()) / total == pytest.approx(0.00099, rel=0.1)

    gaps = np.diff(np.square(sigmas))  # the second "=", a step at a time
    exact = [quad(VE0.g2, t, s, epsabs=0, epsrel=1e-12)[0] for t, s in pairwise(times(steps))]
    equal("variance of a step", exact, gaps, 1e-9)
    with pytest.raises(AssertionError, match="variance of a step is off"):  # even with dt under the root
        equal("variance of a step", [VE0.g2(t) / steps for t in times(steps)[:-1]], gaps, 1e-9)


@pytest.mark.equation("eq-ncsn-forward")
def test_ncsn_forward():
    n, x0 = 20_000, 0.7
    sigmas = [VE().sigma(t) for t in times(9)]

    def check(ladder):
        for x, sigma in zip(ladder[1:], sigmas, strict=True):
            near_moments(x, x0, sigma**2)

    chain = list(ncsn_chain(start_at(x0, n), sigmas, generator(36)))
    check(chain)
    with pytest.raises(AssertionError, match=r"variance (0|\S*e-\d+), not 0\.0001"):
        # sigma_0 = sigma_min in place of 0: the first level is missing
        check([x - chain[1] + x0 for x in chain])

    def check_path(ladder):  # as a Markov chain: Cov(x_i, x_j) = sigma_i^2 for i < j
        near_covariance(ladder[6], ladder[7], sigmas[5] ** 2)

    check_path(chain)
    eps = generator(37)
    alone = [start_at(x0, n) + s * torch.randn(n, 1, dtype=torch.float64, generator=eps) for s in sigmas]
    check([chain[0], *alone])  # NCSN of 2019 noises each level by itself: the same marginals,
    with pytest.raises(AssertionError, match="covariance"):  # but no chain
        check_path([chain[0], *alone])
