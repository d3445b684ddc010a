"""Solvers that solve the linear part of the equation exactly."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from diffedu.affine import Affine, EtaSolver, Linear
from diffedu.checks import require_count
from diffedu.denoiser import Denoiser
from diffedu.multistep import DEIS, DPMSolverPP2M, DPMSolverPP3M
from diffedu.phi import phi
from diffedu.schedules import Schedule

__all__ = ["DDIM", "DEIS", "DPMSolver", "DPMSolverPP2M", "DPMSolverPP3M", "fast_plan"]


@dataclass(frozen=True)
class DDIM(EtaSolver):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - n^2) eps + n z, with n = eta times the posterior's deviation.

    n^2 = eta^2 sigma_s^2 (1 - e^(-2h)), h = lam_s - lam_t. eta = 0 is the first-order exponential step on
    the probability-flow ODE (DPM-Solver-1), eta = 1 ancestral sampling. Order 1.
    Raises ValueError for eta < 0, and where eta > 1 asks for more noise than sigma_s.
    Source: Song, Meng & Ermon 2021, eq. 12, for any alpha and sigma.
    Equations: eq-ddim, eq-deterministic-ddim, eq-sigma-alpha, eq-exact-linear
    """

    eta: float = 0.0

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """Per interval the numbers of x <- a x + b eps + n z."""
        records = []
        for t, s in pairwise(ts):
            h, sigma_s = schedule.lam(s) - schedule.lam(t), schedule.sigma(s)
            if not math.isfinite(h):
                raise ValueError(f"DDIM needs alpha, sigma > 0; got a step from t = {t!r} to {s!r}")
            share = -(self.eta**2) * math.expm1(-2 * h)  # n^2 / sigma_s^2
            if share > 1:
                raise ValueError(
                    f"eta = {self.eta!r} asks for more noise than sigma at t = {s!r}; eta <= 1 never does"
                )
            # sqrt(sigma_s^2 - n^2) - alpha_s sigma_t / alpha_t, without cancellation
            b = -sigma_s * (math.expm1(h) + share / (1 + math.sqrt(1 - share)))
            n = sigma_s * math.sqrt(share) if self.eta else 0.0
            records.append(Affine(t, schedule.alpha(s) / schedule.alpha(t), b, n))
        return records


def fast_plan(nfe: int) -> tuple[int, ...]:
    """The orders of DPM-Solver-fast's steps, nfe evaluations in all: 3 as far as it goes, the rest below.

    Its grid has one step for each: `schedule.grid(len(plan))`. Raises ValueError for nfe < 1.
    Source: Lu et al. 2022 (DPM-Solver), section 3.4.
    """
    thirds, rest = divmod(require_count("nfe", nfe), 3)
    return (3,) * (thirds - 1) + (2, 1) if rest == 0 else (3,) * thirds + (rest,)


@dataclass(frozen=True, init=False)
class DPMSolver:
    """DPM-Solver-1, -2, -3: single steps of 1, 2, 3 evaluations of the noise, the linear part exact.

    `order` is 1, 2 or 3, or a plan of those, one for each step of the grid, such as `fast_plan(nfe)`. The
    times within a step divide it evenly in lam: r_1 = 1/2 for order 2; r_1 = 1/3, r_2 = 2/3 for order 3. The
    order of a plan is its highest. Raises ValueError for other orders and for a grid that a plan does not
    fit: it needs as many steps, len(plan) + 1 times.
    Source: Lu et al. 2022 (DPM-Solver), eq. 3.7, algorithms 1 and 2.
    Equations: eq-exponential-integral, eq-exact-step, eq-taylor-step, eq-derivative-estimate, eq-first-order,
    eq-dpm-solver-1, eq-dpm-solver-23, eq-ddim-is-dpm-1
    """

    order: int
    plan: tuple[int, ...] | None
    stochastic: ClassVar[bool] = False

    def __init__(self, order: int | Sequence[int]) -> None:
        plan = tuple(order) if isinstance(order, Sequence) else (order,)
        if not plan or any(isinstance(k, bool) or k not in (1, 2, 3) for k in plan):
            raise ValueError(f"order must be 1, 2 or 3, or a plan of those; got {order!r}")
        object.__setattr__(self, "order", max(plan))
        object.__setattr__(self, "plan", plan if isinstance(order, Sequence) else None)

    def __repr__(self) -> str:
        return f"DPMSolver({self.plan or self.order})"

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[list[Linear]]:
        """For each interval its stages: u <- a x + b_0 e_0 + b_1 e_1 + ..., e_j the noise at the u before."""
        plan = self.plan or (self.order,) * (len(ts) - 1)
        if len(plan) != len(ts) - 1:
            raise ValueError(
                f"a plan of {len(plan)} steps needs a grid of as many steps, {len(plan) + 1} times; "
                f"got {len(ts)} times"
            )
        steps = {1: _dpm_solver_1, 2: _dpm_solver_2, 3: _dpm_solver_3}
        return [steps[k](schedule, s, t) for k, (s, t) in zip(plan, pairwise(ts), strict=True)]

    def step(
        self, denoiser: Denoiser, x: Tensor, c: list[Linear], state: None, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, None]:
        """One step over the interval of record c; x (B, *)."""
        u, e = x, []
        for stage in c:
            e.append(denoiser(u, stage.t).eps)
            u = stage.combine(x, e)
        return u, None


# The papers' letters: from s to t by way of s_1 and s_2; h = lam_t - lam_s; e_j the noise at s_j. All are
# x_t = (alpha_t / alpha_s) x - sigma_t [h phi_1(h) e_0 + h^2 phi_2(h) e' + ...], e' the slope of eps in lam.


def _dpm_solver_1(schedule: Schedule, s: float, t: float) -> list[Linear]:
    h, a = _within(schedule, s, t)
    return [Linear(s, a, (-schedule.sigma(t) * math.expm1(h),))]


def _dpm_solver_2(schedule: Schedule, s: float, t: float) -> list[Linear]:
    h, a = _within(schedule, s, t)
    s_1 = schedule.t_of_lam(schedule.lam(s) + h / 2)
    (first,) = _dpm_solver_1(schedule, s, s_1)
    return [first, Linear(s_1, a, (0.0, -schedule.sigma(t) * math.expm1(h)))]


def _dpm_solver_3(schedule: Schedule, s: float, t: float) -> list[Linear]:
    h, a = _within(schedule, s, t)
    s_1, s_2 = (schedule.t_of_lam(schedule.lam(s) + r * h) for r in (1 / 3, 2 / 3))
    (first,) = _dpm_solver_1(schedule, s, s_1)
    h_2, a_2 = _within(schedule, s, s_2)
    sigma_2, sigma_t = schedule.sigma(s_2), schedule.sigma(t)
    slope_2 = -2 * sigma_2 * h_2 * phi(2, h_2)  # of D_1 = e_1 - e_0; r_2 / r_1 = 2
    slope = -1.5 * sigma_t * h * phi(2, h)  # of D_2 = e_2 - e_0; 1 / r_2 = 3/2
    return [
        first,
        Linear(s_1, a_2, (-sigma_2 * math.expm1(h_2) - slope_2, slope_2)),
        Linear(s_2, a, (-sigma_t * math.expm1(h) - slope, 0.0, slope)),
    ]


def _within(schedule: Schedule, s: float, t: float) -> tuple[float, float]:
    """h = lam_t - lam_s and alpha_t / alpha_s; ValueError where alpha or sigma is 0."""
    h = schedule.lam(t) - schedule.lam(s)
    if not math.isfinite(h):
        raise ValueError(f"DPM-Solver needs alpha, sigma > 0; got a step from t = {s!r} to {t!r}")
    return h, schedule.alpha(t) / schedule.alpha(s)
