import math
import re

import numpy as np
import pytest
import torch
from problems import exact, mix
from scipy.stats import norm

from diffedu.fokker_planck import solve
from diffedu.metrics import empirical_order
from diffedu.schedules import VE, VP
from diffedu.sde import forward_drift, reverse_drift

EARLY, LATE = 0.05, 0.4
DENOISER = exact(mix(), VP())


def cells(h, half=6.0):
    n = round(2 * half / h)
    return (torch.arange(n, dtype=torch.float64) + 0.5) * h - half


def density(schedule, t, x):
    """The marginal of `mix` at t, by scipy."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    parts = ((0.3, -1.5, 0.09), (0.7, 0.8, 0.16))
    values = sum(w * norm.pdf(x.numpy(), alpha * m, math.sqrt(alpha**2 * v + sigma**2)) for w, m, v in parts)
    return torch.from_numpy(values)


def forward_family(eta):
    """The drift of (8), forward in time, with rho = eta g."""

    def drift(x, t):
        return VP().f(t) * x - 0.5 * (1 - eta**2) * VP().g2(t) * DENOISER(x, t).score

    return drift


def family_error(clock, ratio, h):
    """L1 distance of the solution from the exact marginal, at the end of [EARLY, LATE] run either way."""
    eta, x = math.sqrt(ratio), cells(h)
    if clock == "forward":
        ts, drift = (EARLY, LATE), forward_family(eta)
    else:
        ts, drift = (LATE, EARLY), lambda x, t: reverse_drift(DENOISER, x, t, eta)
    start = density(VP(), ts[0], x)
    p = solve(drift, lambda t: ratio * VP().g2(t), start, x, ts)
    assert float(p.min()) >= 0
    assert abs(float((p[-1] - start).sum()) * h) < 1e-10
    return float((p[-1] - density(VP(), ts[1], x)).abs().sum()) * h


@pytest.mark.parametrize("clock", ["forward", "backward"])
@pytest.mark.parametrize(
    ("ratio", "order", "least"), [(0, 1, 0.08), (0.5, 2, 6e-3), (1, 2, 6e-3), (2, 2, 6e-3)]
)
@pytest.mark.equation("eq-fokker-planck-family")
@pytest.mark.equation("eq-same-marginals")
def test_the_whole_family_has_the_exact_marginals_to_the_order_of_the_mesh(clock, ratio, order, least):
    mesh = [0.1, 0.05, 0.025]
    errors = [family_error(clock, ratio, h) for h in mesh]
    assert errors[1] < least
    assert empirical_order(mesh, errors) > order - 0.1
    assert empirical_order(mesh, errors) < order + 0.1


@pytest.mark.equation("eq-fokker-planck")
def test_the_forward_sde_goes_straight_in_and_every_time_comes_out():
    for schedule, half in ((VP(), 6.0), (VE(0.1, 3.0), 12.0)):
        x, ts = cells(0.05, half), [0.1, 0.25, 0.5, 0.8]
        p = solve(
            lambda x, t, s=schedule: forward_drift(s, x, t), schedule.g2, density(schedule, 0.1, x), x, ts
        )
        exact_p = torch.stack([density(schedule, t, x) for t in ts])
        assert torch.equal(p[0], exact_p[0])
        assert float((p - exact_p).abs().max()) < 2e-3
        assert float((p.sum(1) * 0.05 - 1).abs().max()) < 1e-7  # what lies beyond the grid
        assert float((p.sum(1) - p[0].sum()).abs().max()) < 1e-10


def test_a_wrong_sign_of_time_or_score_is_seen():
    """The check has teeth: the noise of eta = 1 with the drift of another member misses the marginal."""
    x = cells(0.05)
    p = solve(forward_family(0.0), VP().g2, density(VP(), EARLY, x), x, (EARLY, LATE))[-1]
    assert float((p - density(VP(), LATE, x)).abs().sum()) * 0.05 > 0.05
    p = solve(lambda x, t: VP().f(t) * x, VP().g2, density(VP(), LATE, x), x, (LATE, EARLY))[-1]
    assert float((p - density(VP(), EARLY, x)).abs().sum()) * 0.05 > 0.05


@pytest.mark.parametrize("h", [0.5, 0.1])
@pytest.mark.parametrize("dt", [1e-3, 1.0, 1e3])
def test_a_stationary_law_stays_to_rounding(h, dt):
    """The fluxes of Chang & Cooper vanish on exp(-x^2 / 2) exactly: their point, on any mesh."""
    x = cells(h)
    p0 = (-0.5 * x**2).exp()
    p = solve(lambda x, t: -x, lambda t: 2.0, p0, x, [0.0, 20 * dt], dt)
    torch.testing.assert_close(p[-1], p0, rtol=1e-9, atol=1e-14)


def test_what_is_found_after_long_is_the_stationary_law():
    x = cells(0.1)
    p0 = torch.zeros_like(x)
    p0[3] = 10.0
    p = solve(lambda x, t: -x, lambda t: 2.0, p0, x, [0.0, 100.0], dt=0.5)
    assert float((p[-1] - torch.from_numpy(norm.pdf(x.numpy()))).abs().max()) < 1e-7


@pytest.mark.parametrize("rho2", [0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e3])
def test_mass_and_positivity_hold_whatever_the_diffusion_and_the_step(rho2):
    x = cells(0.05)
    p0 = torch.where(x.abs() < 0.5, 1.0, 0.0).double()  # with jumps and exact zeros
    for dt in (1e-3, 0.1, 10.0):
        for ts in ([0.0, 10 * dt, 20 * dt], [20 * dt, 10 * dt, 0.0]):
            p = solve(lambda x, t: 30 * torch.sin(3 * x + t) - x**3, lambda t: rho2, p0, x, ts, dt)
            assert float(p.min()) >= 0
            rounding = 1e-14 * rho2 * dt / 0.05**2  # of matrix entries that large
            assert float((p.sum(1) - p0.sum()).abs().max()) * 0.05 < max(1e-10, rounding)


def test_without_diffusion_mass_moves_with_the_drift():
    x = cells(0.02)
    p0 = torch.from_numpy(norm.pdf(x.numpy(), -2, 0.5))
    p = solve(lambda x, t: torch.full_like(x, 2.0), lambda t: 0.0, p0, x, [0.0, 1.0])[-1]
    assert float((x * p).sum()) * 0.02 == pytest.approx(0.0, abs=1e-9)  # upwind: the mean is exact
    spread = float((x**2 * p).sum()) * 0.02
    assert spread == pytest.approx(0.25 + 2 * 0.02 + 4 * 0.02**2, rel=1e-3)  # + |a| h + a^2 dt: its diffusion
    assert float(solve(lambda x, t: 0 * x, lambda t: 0.0, p0, x, [0.0, 1.0], 0.1).sub(p0).abs().max()) < 1e-15


def test_steps_divide_the_interval_and_sit_in_its_middle():
    x, seen = cells(0.5), []

    def drift(x, t):
        seen.append(t)
        return 0 * x

    solve(drift, lambda t: 0.0, torch.ones_like(x), x, [0.0, 0.5, 0.6], dt=0.2)
    np.testing.assert_allclose(seen, [1 / 12, 0.25, 5 / 12, 0.55])
    seen.clear()
    solve(drift, lambda t: 0.0, torch.ones_like(x), x, [1.0, 0.0])
    np.testing.assert_allclose(seen, [0.875, 0.625, 0.375, 0.125])  # h^2 = 1/4


def test_the_density_decides_the_dtype_and_no_gradient_is_kept():
    x = cells(0.25).float()
    net = torch.nn.Linear(1, 1).double()
    p = solve(lambda x, t: net(x), lambda t: 1.0, torch.ones_like(x), x, torch.tensor([0.5, 0.1]))
    assert (p.dtype, p.requires_grad, p.shape) == (torch.float32, False, (2, len(x)))


@pytest.mark.cuda
def test_the_device_follows_the_density():
    x = cells(0.25).cuda()
    p = solve(lambda x, t: -x, lambda t: 1.0, torch.ones_like(x), x, [0.0, 0.1])
    assert p.device.type == "cuda"


X = cells(0.5)
ONES = torch.ones_like(X)


def run(drift=lambda x, t: -x, rho2=lambda t: 1.0, p0=ONES, x=X, ts=(0.0, 1.0), dt=None):
    return solve(drift, rho2, p0, x, ts, dt)


REFUSED = {
    "x matrix": (lambda: run(x=X[:, None]), "x must be finite floats of shape (n,)", "(24, 1)"),
    "x short": (lambda: run(x=X[:1], p0=ONES[:1]), "n > 1", "(1,)"),
    "x integers": (lambda: run(x=torch.arange(24)), "x must be finite floats", "torch.int64"),
    "x nan": (lambda: run(x=X / 0), "x must be finite", "(24,)"),
    "x uneven": (lambda: run(x=X**3), "ascend in equal steps", "from 0.03125 to 45.4"),
    "x falls": (lambda: run(x=-X), "ascend in equal steps", "-0.5"),
    "p0 shape": (lambda: run(p0=ONES[1:]), "p0 must be finite floats >= 0 of the shape of x, (24,)", "(23,)"),
    "p0 negative": (lambda: run(p0=-ONES), ">= 0", "-1"),
    "p0 nan": (lambda: run(p0=ONES * math.nan), "finite", "nan"),
    "p0 integers": (lambda: run(p0=ONES.long()), "finite floats", "torch.int64"),
    "dt 0": (lambda: run(dt=0.0), "dt must be positive and finite", "0.0"),
    "dt nan": (lambda: run(dt=math.nan), "dt must be positive and finite", "nan"),
    "ts repeat": (lambda: run(ts=[0.0, 0.0]), "strictly ascend", "0.0 followed by 0.0"),
    "ts turn": (lambda: run(ts=[0.0, 1.0, 0.5]), "strictly ascend", "1.0 followed by 0.5"),
    "ts turn back": (lambda: run(ts=[1.0, 0.0, 0.5]), "strictly descend", "0.0 followed by 0.5"),
    "ts one": (lambda: run(ts=[0.5]), "two times or more", "[0.5]"),
    "ts none": (lambda: run(ts=[]), "two times or more", "[]"),
    "ts number": (lambda: run(ts=0.5), "two or more", "0.5"),
    "ts nan": (lambda: run(ts=[0.0, math.nan]), "must lie in", "nan"),
    "drift shape": (lambda: run(drift=lambda x, t: x[:, 0]), "the shape of its x, (23, 1)", "(23,)"),
    "drift nan": (
        lambda: run(drift=lambda x, t: x * math.nan, ts=[0.0, 0.25]),
        "finite",
        "23 nan",
        "t = 0.125",
    ),
    "rho2 negative": (lambda: run(rho2=lambda t: -t), "at least 0", "-0.125", "t = 0.125"),
    "rho2 nan": (lambda: run(rho2=lambda t: math.nan), "finite number", "nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_what_is_allowed_and_what_came(case):
    call, *fragments = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as refusal:
        call()
    for fragment in fragments:
        assert fragment in str(refusal.value)
