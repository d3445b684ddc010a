import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch
from problems import SCHEDULES
from scipy.integrate import quad, solve_ivp

from diffedu.schedules import VE, VP, Cosine, Custom, SubVP

OF_T = ("alpha", "sigma", "lam", "snr", "f", "g2")
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
RANDOM = np.random.default_rng(0)


def random_schedules(n=24):
    for _ in range(n):
        b0, b1, s0, s1 = RANDOM.uniform(size=4)
        t_min, t_max = 10 ** RANDOM.uniform(-5, -1), RANDOM.uniform(0.5, 0.999)
        ends = {"t_min": t_min, "t_max": t_max}
        yield VP(3 * b0, 3 * b0 + 20 * b1, **ends)
        yield SubVP(3 * b0, 3 * b0 + 20 * b1, **ends)
        yield VE(10 ** (-3 * s0), 10 ** (-3 * s0 + 0.5 + 3 * s1), **ends)
        yield Cosine(**ends)


def times(schedule, n=201):
    return torch.linspace(schedule.t_min, schedule.t_max, n, dtype=torch.float64)


def derivative(formula, t):
    t = t.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((formula(t) + 0 * t).sum(), t)
    return slope


def check_coefficients(schedule):
    t = times(schedule)
    f = derivative(lambda u: schedule.alpha(u).log(), t)
    sigma = schedule.sigma(t)
    g2 = derivative(lambda u: schedule.sigma(u) ** 2, t) - 2 * f * sigma**2
    torch.testing.assert_close(schedule.f(t), f, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(schedule.g2(t), g2, rtol=1e-11, atol=1e-14)
    slope = derivative(schedule.lam, t)
    torch.testing.assert_close(schedule.g2(t), -2 * sigma**2 * slope, rtol=1e-11, atol=1e-14)
    assert bool((schedule.g2(t) >= 0).all())
    assert bool((schedule.lam(t).diff() < 0).all())


def check_inverse(schedule):
    t = times(schedule)
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-12, atol=0)
    lam = torch.linspace(schedule.lam(schedule.t_max), schedule.lam(schedule.t_min), 201, dtype=torch.float64)
    back = schedule.lam(schedule.t_of_lam(lam))
    torch.testing.assert_close(back, lam, rtol=1e-12, atol=1e-12)
    for end in (schedule.t_min, schedule.t_max):
        assert schedule.t_of_lam(schedule.lam(end)) == end
        there = torch.tensor(end, dtype=torch.float64)
        assert float(schedule.t_of_lam(schedule.lam(there))) == end


@every
@pytest.mark.equation("eq-coefficients")
@pytest.mark.equation("eq-snr-monotone")
def test_f_and_g2_are_the_derivatives_of_alpha_and_sigma(schedule):
    check_coefficients(schedule)


@every
def test_lam_has_an_inverse_both_ways(schedule):
    check_inverse(schedule)


def test_coefficients_and_inverse_of_random_schedules():
    for schedule in random_schedules():
        check_coefficients(schedule)
        check_inverse(schedule)


@every
@pytest.mark.equation("eq-mean-ode")
@pytest.mark.equation("eq-variance-ode")
def test_alpha_and_sigma_solve_the_moment_equations(schedule):
    t = times(schedule, 9).tolist()

    def slope(now, y):
        now = min(max(now, schedule.t_min), schedule.t_max)
        return [schedule.f(now) * y[0], 2 * schedule.f(now) * y[1] + schedule.g2(now)]

    start = [schedule.alpha(t[0]), schedule.sigma(t[0]) ** 2]
    solved = solve_ivp(slope, (t[0], t[-1]), start, "DOP853", t, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(solved.y[0], [schedule.alpha(u) for u in t], rtol=1e-9)
    np.testing.assert_allclose(solved.y[1], [schedule.sigma(u) ** 2 for u in t], rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "vp-other", "vp-constant", "vp-from-0", "cosine"])
@pytest.mark.equation("eq-variance-preserving")
def test_alpha2_and_sigma2_sum_to_one(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    one = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    torch.testing.assert_close(one, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "vp-other", "vp-constant", "vp-from-0"])
@pytest.mark.equation("eq-vp-sde")
@pytest.mark.equation("eq-vp-coefficients")
def test_vp_is_the_integral_of_beta(name):
    schedule = SCHEDULES[name]
    for t in (0.01, 0.3, 0.77, 1.0):
        beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)
        assert schedule.g2(t) == pytest.approx(beta, rel=1e-14)
        assert schedule.f(t) == pytest.approx(-beta / 2, rel=1e-14)
        integral = quad(schedule.g2, schedule.t_min, t, epsabs=1e-14)[0]
        kept = schedule.alpha(t) / schedule.alpha(schedule.t_min)
        assert kept**2 == pytest.approx(math.exp(-integral), rel=1e-12)


@pytest.mark.equation("eq-ve-sde")
@pytest.mark.equation("eq-ve-coefficients")
@pytest.mark.equation("eq-ve-sigma")
def test_ve_has_no_drift_and_begins_at_sigma_min():
    schedule = VE(0.02, 30.0)
    assert (schedule.sigma(0.0), schedule.sigma(1.0)) == (0.02, pytest.approx(30.0, rel=1e-14))
    assert schedule.sigma(0.5) == pytest.approx(math.sqrt(0.02 * 30.0), rel=1e-14)
    for t in (0.001, 0.4, 1.0):
        assert (schedule.f(t), schedule.alpha(t)) == (0, 1)
        slope = (schedule.sigma(min(t + 1e-6, 1.0)) ** 2 - schedule.sigma(t - 1e-6) ** 2) / (
            min(t + 1e-6, 1.0) - (t - 1e-6)
        )
        assert schedule.g2(t) == pytest.approx(slope, rel=2e-5)  # one-sided at t = 1


def precise(schedule, t):
    """alpha, sigma, f, g2 in 50 digits, straight from the definitions."""
    t, mp = mpmath.mpf(t), mpmath
    match schedule:
        case VP() | SubVP():
            b0, b1 = mp.mpf(schedule.beta_min), mp.mpf(schedule.beta_max)
            beta, B = b0 + (b1 - b0) * t, b0 * t + (b1 - b0) * t**2 / 2
            alpha = mp.exp(-B / 2)
            if isinstance(schedule, VP):
                return alpha, mp.sqrt(1 - mp.exp(-B)), -beta / 2, beta
            return alpha, 1 - mp.exp(-B), -beta / 2, beta * (1 - mp.exp(-2 * B))
        case VE():
            low, ratio = mp.mpf(schedule.sigma_min), mp.mpf(schedule.sigma_max) / mp.mpf(schedule.sigma_min)
            sigma = low * ratio**t
            return mp.mpf(1), sigma, mp.mpf(0), 2 * mp.log(ratio) * sigma**2
        case Cosine():
            turn = mp.pi * t / 2
            return mp.cos(turn), mp.sin(turn), -mp.pi / 2 * mp.tan(turn), mp.pi * mp.tan(turn)


@pytest.mark.parametrize(
    "schedule",
    [
        VP(t_min=1e-9),
        VP(0.0, 20.0, t_min=1e-6),
        SubVP(t_min=1e-9),
        VE(t_min=0.0),
        Cosine(t_min=1e-9, t_max=1 - 1e-9),
    ],
    ids=repr,
)
def test_no_digit_is_lost_to_cancellation(schedule):
    t_max = schedule.t_max
    points = [schedule.t_min, 1e-6, 3e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, t_max - 1e-6, t_max - 3e-8, t_max]
    with mpmath.workdps(50):
        for t in points:
            alpha, sigma, f, g2 = precise(schedule, t)
            lam = mpmath.log(alpha / sigma)
            want = {"alpha": alpha, "sigma": sigma, "f": f, "g2": g2, "snr": alpha**2 / sigma**2}
            for name, value in want.items():
                formula = getattr(schedule, name)
                for got in (formula(t), float(formula(torch.tensor(t, dtype=torch.float64)))):
                    assert abs(got - value) <= 4e-14 * abs(value), (name, t, got, value)
            assert abs(schedule.lam(t) - lam) <= 4e-15 * max(1, abs(lam)), (t, schedule.lam(t), lam)
            back = schedule.t_of_lam(schedule.lam(t))
            # dt / dlam = -2 sigma^2 / g2 carries the rounding of lam
            slack = 1e-15 * max(1, abs(lam)) * abs(2 * sigma**2 / g2)
            assert abs(back - t) <= 8 * slack + 4e-16 * t


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_keeps_shape_and_dtype(schedule, dtype):
    for shape in [(), (5,), (5, 1), (2, 3, 1), (0,)]:
        u = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        t = (0.01 + 0.98 * u).to(dtype)
        for name in OF_T:
            value = getattr(schedule, name)(t)
            assert (value.shape, value.dtype) == (t.shape, dtype)
            # computed in float64 from the very time that came, then rounded once
            assert torch.equal(value, getattr(schedule, name)(t.double()).to(dtype))
        lam = schedule.lam(t)
        back = schedule.t_of_lam(lam)
        assert (back.shape, back.dtype) == (t.shape, dtype)


@every
def test_a_float_comes_back_for_a_float(schedule):
    t = np.float64(0.25)
    for name in OF_T:
        value = getattr(schedule, name)(0.25)
        assert type(value) is float
        assert value == pytest.approx(
            float(getattr(schedule, name)(torch.tensor(0.25, dtype=torch.float64))), rel=1e-14
        )
        assert type(getattr(schedule, name)(t)) is float
    assert type(schedule.t_of_lam(schedule.lam(0.25))) is float
    assert type(schedule.alpha(1)) is float


@every
def test_times_outside_the_domain_are_refused(schedule):
    for t in (-1e-6, 1 + 1e-6, math.nan, math.inf):
        for name in OF_T:
            with pytest.raises(ValueError, match="must lie in"):
                getattr(schedule, name)(t)
            with pytest.raises(ValueError, match="must lie in"):
                getattr(schedule, name)(torch.tensor([0.5, t], dtype=torch.float64))
    for name in ("lam", "snr", "f", "g2"):
        if schedule.t_min > 0:
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                with pytest.raises(ValueError, match=r"got 0\.0"):
                    getattr(schedule, name)(torch.tensor([0.5, 0.0], dtype=dtype))
    for name in ("alpha", "sigma"):
        assert all(math.isfinite(getattr(schedule, name)(end)) for end in (0.0, 1.0))
    with pytest.raises(ValueError, match="lam must lie in"):
        schedule.t_of_lam(schedule.lam(schedule.t_min) + 1e-3)
    with pytest.raises(ValueError, match="lam must lie in"):
        schedule.t_of_lam(schedule.lam(schedule.t_max) - 1e-3)


@every
def test_ends_survive_the_rounding_of_every_dtype(schedule):
    for end in (schedule.t_min, schedule.t_max):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            t = torch.tensor(end, dtype=dtype)
            assert float(schedule.lam(t)) == pytest.approx(schedule.lam(end), rel=0.02, abs=1e-2)


@every
@pytest.mark.equation("eq-snr")
def test_snr_is_the_ratio_of_the_energies(schedule):
    t = times(schedule)
    ratio = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    torch.testing.assert_close(schedule.snr(t), ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.snr(t).log(), 2 * schedule.lam(t), rtol=1e-12, atol=1e-13)


MEASURES = {
    "lam": lambda schedule, ts: schedule.lam(ts),
    "t": lambda schedule, ts: ts,
    "edm": lambda schedule, ts: (schedule.sigma(ts) / schedule.alpha(ts)) ** (1 / 7),
    2: lambda schedule, ts: ts**0.5,
    1.7: lambda schedule, ts: ts ** (1 / 1.7),
    0.5: lambda schedule, ts: ts**2,
}


@every
@pytest.mark.parametrize("spacing", MEASURES)
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_grids_are_uniform_in_what_they_are_named_after(schedule, spacing, n):
    ts = schedule.grid(n, spacing)
    assert (ts.dtype, ts.shape) == (torch.float64, (n + 1,))
    assert (float(ts[0]), float(ts[-1])) == (schedule.t_max, schedule.t_min)
    assert bool((ts.diff() < 0).all())
    measure = MEASURES[spacing](schedule, ts)
    span = measure[-1] - measure[0]
    uniform = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    torch.testing.assert_close((measure - measure[0]) / span, uniform, rtol=0, atol=1e-11)


def test_the_default_spacing_is_lam():
    assert torch.equal(VP().grid(10), VP().grid(10, "lam"))


@pytest.mark.parametrize(
    ("custom", "twin"),
    [
        (
            Custom(
                lambda t: torch.exp(-0.05 * t - 4.975 * t**2),
                lambda t: torch.sqrt(-torch.expm1(-0.1 * t - 9.95 * t**2)),
            ),
            VP(),
        ),
        (
            Custom(lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2), t_max=0.999),
            Cosine(),
        ),
        (Custom(torch.ones_like, lambda t: 0.01 * 5000**t), VE()),
    ],
    ids=["vp", "cosine", "ve"],
)
def test_custom_with_the_formulas_of_a_schedule_is_that_schedule(custom, twin):
    t = times(twin)
    for name in OF_T:
        torch.testing.assert_close(getattr(custom, name)(t), getattr(twin, name)(t), rtol=1e-11, atol=1e-13)
    lam = twin.lam(t)
    torch.testing.assert_close(custom.t_of_lam(lam), twin.t_of_lam(lam), rtol=1e-12, atol=0)
    torch.testing.assert_close(custom.grid(20, "edm"), twin.grid(20, "edm"), rtol=1e-12, atol=0)


def test_custom_works_where_gradients_are_off():
    schedule, want = SCHEDULES["custom"], SCHEDULES["custom"].g2(0.3)
    with torch.no_grad():
        assert schedule.g2(0.3) == want
    with torch.inference_mode():
        assert schedule.g2(0.3) == want
        assert float(schedule.g2(torch.tensor(0.3, dtype=torch.float64))) == pytest.approx(want)


@pytest.mark.parametrize("wave", [0.4, 0.05])
@pytest.mark.equation("eq-snr-monotone")
def test_custom_refuses_a_signal_to_noise_ratio_that_rises(wave):
    def alpha(t):
        return 0.5 + wave * torch.cos(6 * t)

    with pytest.raises(ValueError, match="signal-to-noise ratio must fall") as refusal:
        Custom(alpha, lambda t: torch.sqrt(1 - alpha(t) ** 2))
    # alpha rises from t = pi / 6 on: the message names the first interval of its grid where it does
    first = float(str(refusal.value).split("t = ")[1].split()[0])
    assert first == pytest.approx(math.pi / 6, abs=2e-4)


def test_infinite_ends_of_lam():
    for schedule in (VP(t_min=0.0), VP(0.0, 20.0, t_min=0.0), SubVP(t_min=0.0), Cosine(t_min=0.0, t_max=1.0)):
        assert schedule.lam(0.0) == math.inf == schedule.snr(0.0)
        assert schedule.t_of_lam(math.inf) == 0.0
        assert float(schedule.t_of_lam(torch.tensor(math.inf))) == 0.0
        with pytest.raises(ValueError, match=r"needs a finite lam at both ends.*inf"):
            schedule.grid(3)
        assert float(schedule.grid(3, "t")[-1]) == 0.0
    cosine = Cosine(t_min=0.0, t_max=1.0)
    assert cosine.alpha(1.0) == 0.0 == cosine.snr(1.0)
    assert cosine.lam(1.0) == -math.inf
    assert cosine.t_of_lam(-math.inf) == 1.0


def test_schedules_are_frozen_and_compare_by_value():
    assert VP() == VP(0.1, 20.0) != VP(0.1, 19.0)
    assert hash(VP()) == hash(VP(t_min=1e-3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        VP().beta_min = 1.0
    assert (Cosine().t_min, Cosine().t_max) == (1e-3, 0.999)
    for kind in (VP, SubVP, VE):
        assert (kind().t_min, kind().t_max) == (1e-3, 1.0)
        with pytest.raises(TypeError):
            kind(0.1, 20.0, 1e-3)
    with pytest.raises(TypeError):
        Cosine(1e-3)


@pytest.mark.cuda
def test_the_device_follows_the_time():
    t = torch.linspace(0.1, 0.9, 5, device="cuda")
    for schedule in SCHEDULES.values():
        for name in OF_T:
            value = getattr(schedule, name)(t)
            assert value.device == t.device
            torch.testing.assert_close(value.cpu(), getattr(schedule, name)(t.cpu()))
        assert schedule.t_of_lam(schedule.lam(t)).device == t.device
