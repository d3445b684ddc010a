"""The zoo: laws with known answers, and oracles that share no code with the package."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp

from diffedu.mixtures import EmpiricalDenoiser, ExactDenoiser, GaussianMixture
from diffedu.schedules import VE, VP, Cosine, Custom, SubVP

SCHEDULES = {
    "vp": VP(),
    "vp-other": VP(0.3, 7.0, t_min=1e-4),
    "vp-constant": VP(2.0, 2.0),
    "vp-from-0": VP(0.0, 20.0),
    "subvp": SubVP(),
    "ve": VE(),
    "ve-other": VE(0.3, 2.0, t_min=0.0),
    "cosine": Cosine(),
    "custom": Custom(lambda t: 1 / (1 + t**2), lambda t: 0.1 + t + t**3),
}
MAIN = {name: SCHEDULES[name] for name in ("vp", "subvp", "ve", "cosine", "custom")}


def mixture(weights, means, covs):
    return GaussianMixture(*(torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covs)))


def asym3():
    """Three anisotropic Gaussians in the plane (design/goals.md)."""
    covs = []
    for stds, angle in (((0.4, 0.15), 0.6), ((0.25, 0.25), -0.4), ((0.3, 0.1), 1.2)):
        axes = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        covs.append(axes @ np.diag(np.square(stds)) @ axes.T)
    return mixture([0.5, 0.3, 0.2], [[-1.2, 0.4], [0.8, 1.0], [0.5, -1.1]], np.array(covs))


def ring8():
    """Eight equal Gaussians on a circle of radius 1.4, standard deviation 0.1."""
    angle = np.arange(8) * math.pi / 4
    centres = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return mixture(np.full(8, 1 / 8), centres, np.tile(0.01 * np.eye(2), (8, 1, 1)))


def mix():
    """The audit's toy law on the line: mean 0.11, variance 1.2499."""
    return mixture([0.3, 0.7], [[-1.5], [0.8]], [[[0.09]], [[0.16]]])


def gaussian(mean=0.0, std=1.0, dim=1):
    """N(mean 1, std^2 I)."""
    return mixture([1.0], [[mean] * dim], std**2 * np.eye(dim)[None])


def point_mass(schedule, at):
    """The exact denoiser of data that is always the point `at` (D,)."""
    return EmpiricalDenoiser(torch.as_tensor(at, dtype=torch.float64)[None], schedule)


exact = ExactDenoiser
LAWS = {"asym3": asym3, "ring8": ring8, "mix": mix, "gaussian": gaussian}


def score(law, alpha, sigma, x):
    """The score of alpha x0 + sigma eps at x (B, D), by inverses and numpy."""
    w, mu, cov = law.weights.numpy(), alpha * law.means.numpy(), alpha**2 * law.covs.numpy()
    inverse = np.linalg.inv(cov + sigma**2 * np.eye(mu.shape[1]))
    gap = x[:, None, :] - mu
    pull = np.einsum("kde,bke->bkd", inverse, gap)
    log_joint = np.log(w) + 0.5 * np.linalg.slogdet(inverse)[1] - 0.5 * (gap * pull).sum(-1)
    r = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return -((r / r.sum(1, keepdims=True))[..., None] * pull).sum(1)


def flow(law, schedule, x, t, s):
    """The probability-flow ODE from x (B, D) at t to s: x / alpha in log(sigma / alpha), DOP853 at 1e-12."""

    def slope(u, flat):
        # t of u by the package's inverse, which test_schedules checks
        now = schedule.t_of_lam(min(max(-u, schedule.lam(schedule.t_max)), schedule.lam(schedule.t_min)))
        alpha, sigma = schedule.alpha(now), schedule.sigma(now)
        eps = -sigma * score(law, alpha, sigma, alpha * flat.reshape(x.shape))
        return (sigma / alpha * eps).ravel()

    start = (x / schedule.alpha(t)).ravel()
    solved = solve_ivp(
        slope, (-schedule.lam(t), -schedule.lam(s)), start, method="DOP853", rtol=1e-12, atol=1e-12
    )
    assert solved.success
    return schedule.alpha(s) * solved.y[:, -1].reshape(x.shape)


@cache
def asym3_reference():
    """x at t = 1 (400 points of the prior) and where VP's ODE takes them at 1e-3: computed once a session."""
    x = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.from_numpy(flow(asym3(), VP(), x.numpy(), 1.0, 1e-3))


def affine_step(solver, denoiser, t, s):
    """(A, c, n) of a step x -> A x + c + n z on the line, where the score is linear: by three probes."""
    probes = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    (record,) = solver.coefficients(denoiser.schedule, [t, s])

    def step(z):
        return solver.step(denoiser, probes, record, None, lambda: torch.full_like(probes, z))[0]

    silent, noisy = step(0.0), step(1.0)
    a, c = float(silent[1] - silent[0]), float(silent[0])
    assert abs(float(silent[2]) - (c - 2 * a)) < 1e-11 * (1 + abs(a) + abs(c))
    return a, c, float((noisy - silent)[0])


def propagate(solver, denoiser, ts, mean, variance):
    """Mean and variance after the steps of the grid ts, exactly, for a score that is linear in x."""
    for t, s in pairwise(ts):
        a, c, n = affine_step(solver, denoiser, float(t), float(s))
        mean, variance = a * mean + c, a * a * variance + n * n
    return mean, variance


def within(value, expected, standard_error, of=4.0):
    """Whether the mean of independent draws agrees with what it should be, to 4 standard errors."""
    gap = (torch.as_tensor(value) - torch.as_tensor(expected)).abs()
    return bool((gap <= of * torch.as_tensor(standard_error)).all())
