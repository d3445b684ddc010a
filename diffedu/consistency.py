"""Consistency models: the ODE's solution map learned, from a teacher (CD) or without one (CT).

Everything is written in x / alpha and r = sigma / alpha, in which every schedule's probability-flow ODE is
dy / dr = eps, the ODE that Song et al. 2023 write for alpha = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from diffedu.checks import per_sample, require_count, require_state, require_times
from diffedu.denoiser import Denoiser
from diffedu.exponential import DPMSolver
from diffedu.sampling import Solver, sample
from diffedu.schedules import Schedule
from diffedu.sde import perturb, randn_like

Map = Callable[[Tensor, float | Tensor], Tensor]  # (x (B, *), t) -> (B, *), the point at t_min
Distance = Callable[[Tensor, Tensor], Tensor]  # two (B, *) -> (B,)


class OneStep(Protocol):
    """One step of a solver on the ODE, for times that may differ from sample to sample."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The state at s from x (B, *) at t; t and s: floats, 0-dim or (B,)."""


@dataclass(frozen=True)
class ConsistencyFunction:
    """f(x, t) = c_skip x - c_out net(c_in x, lam): from x (B, *) at t to the ODE's solution at t_min.

    With r = sigma / alpha, d = r - r_min and data of standard deviation `scale`:
    c_skip = (alpha_min / alpha) scale^2 / (d^2 + scale^2), c_out = alpha_min scale d / sqrt(r^2 + scale^2),
    c_in = 1 / sqrt(alpha^2 scale^2 + sigma^2), so that f(x, t_min) = x exactly whatever the network. For VP
    and scale 1 the network's output is a v-prediction's, up to r_min: a teacher's weights are a good start.
    t: float, 0-dim or (B,). Raises ValueError for a scale that is not positive.
    Source: Song et al. 2023 (consistency models), eq. 5 and appendix C, there with alpha = 1.
    Equations: eq-consistency-function, eq-boundary-condition
    """

    net: nn.Module
    schedule: Schedule
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive; got {self.scale!r}")

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The solution at t_min, (B, *)."""
        skip, out, into = (per_sample(c, x) for c in self.coefficients(t))
        lam = self.schedule.lam(t)
        lam = lam.to(x).expand(len(x)) if isinstance(lam, Tensor) else x.new_full((len(x),), lam)
        value: Tensor = skip * x - out * self.net(into * x, lam)
        return value

    def coefficients(self, t: float | Tensor) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """c_skip, c_out, c_in at t, each of the shape of t; no division by alpha."""
        # t_min in the shape and dtype of t, so that at t_min both roundings are the same
        start = torch.full_like(t, self.schedule.t_min) if isinstance(t, Tensor) else self.schedule.t_min
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        first, sigma_min = self.schedule.alpha(start), self.schedule.sigma(start)
        gap = (first * sigma - sigma_min * alpha) / first  # alpha (r - r_min): 0 at t_min
        skip = first * alpha * self.scale**2 / (gap**2 + alpha * alpha * self.scale**2)
        size = (alpha**2 * self.scale**2 + sigma**2) ** 0.5
        return skip, first * self.scale * gap / size, 1 / size


@dataclass(frozen=True)
class SolutionMap:
    """The ODE's own solution map: x (B, *) at t to t_min by `steps` steps of a solver, uniform in lam.

    With an `ExactDenoiser` the yardstick of every consistency function. One solve for each distinct time.
    Raises ValueError for t outside [t_min, t_max].
    Equations: eq-consistency-idea, eq-consistency-function
    """

    denoiser: Denoiser
    solver: Solver = field(default_factory=lambda: DPMSolver(3))
    steps: int = 200

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The solution at t_min, (B, *); t: float, 0-dim or (B,)."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            return self._solve(x, float(t))
        found = torch.empty_like(x)
        for time in sorted(set(t.tolist())):
            found[t == time] = self._solve(x[t == time], time)
        return found

    def _solve(self, x: Tensor, t: float) -> Tensor:
        schedule = self.denoiser.schedule
        low, high, rounding = schedule.t_min, schedule.t_max, 1e-6  # a float32 time may lie beside t_min
        if not low * (1 - rounding) <= t <= high * (1 + rounding):
            raise ValueError(f"t must lie in [t_min, t_max] = [{low:g}, {high:g}]; got {t!r}")
        if t <= low * (1 + rounding):
            return x.clone()
        return sample(self.denoiser, self.solver, x, replace(schedule, t_max=t).grid(self.steps))


@torch.no_grad()
def multistep(
    f: Map,
    x: Tensor,
    ts: Tensor | Sequence[float],
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples at t_min, (B, *): f at ts[0], then for each further time noise up to it and f again.

    x is the state at ts[0]; ts strictly descending in (t_min, t_max], one time or more; len(ts) evaluations.
    The noise is the forward process's from t_min to t. Raises ValueError for other times and states.
    Source: Song et al. 2023, algorithm 1. Equations: eq-one-step, eq-consistency-algorithms
    """
    require_state(x)
    times = require_times([*map(float, ts), schedule.t_min], schedule.t_min, schedule.t_max, descending=True)
    first, sigma_min = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
    x = f(x, times[0])
    for t in times[1:-1]:
        ratio = schedule.alpha(t) / first
        noise = math.sqrt(schedule.sigma(t) ** 2 - (ratio * sigma_min) ** 2)
        x = f(ratio * x + noise * randn_like(x, generator), t)
    return x


@dataclass(frozen=True)
class SquaredL2:
    """The distance |a - b|^2, (B,): its minimiser is the mean. For targets that are sure, as a teacher's."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distances of a and b, (B, *)."""
        return (a - b).square().flatten(1).sum(1)


@dataclass(frozen=True)
class PseudoHuber:
    """The distance sqrt(|a - b|^2 + c^2) - c, (B,): its gradient is never longer than 1. For noisy targets.

    Raises ValueError for c that is not positive. Source: Song & Dhariwal 2023, section 3.3.
    """

    c: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c must be positive; got {self.c!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distances of a and b, (B, *)."""
        square = (a - b).square().flatten(1).sum(1)
        return square / ((square + self.c**2).sqrt() + self.c)  # without cancellation


def euler_step(denoiser: Denoiser, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
    """Euler's step in r on dy / dr = eps, which is DDIM's: the state (B, *) at s from x at t. Order 1.

    t, s: floats, 0-dim or (B,). Source: Song et al. 2023, eq. 6. Equations: eq-training-pair
    """
    ratio, move = _scaled(denoiser.schedule, t, s)
    return per_sample(ratio, x) * x + per_sample(move, x) * denoiser(x, t).eps


def heun_step(denoiser: Denoiser, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
    """Heun's step in r on dy / dr = eps: the state (B, *) at s from x at t. Order 2.

    t, s: floats, 0-dim or (B,). Source: Karras et al. 2022, algorithm 1. Equations: eq-training-pair
    """
    ratio, move = (per_sample(c, x) for c in _scaled(denoiser.schedule, t, s))
    eps = denoiser(x, t).eps
    return ratio * x + move * (eps + denoiser(ratio * x + move * eps, s).eps) / 2


def _scaled(
    schedule: Schedule, t: float | Tensor, s: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """alpha_s / alpha_t and alpha_s (r_s - r_t)."""
    alpha_t, alpha_s = _wide(schedule.alpha, t), _wide(schedule.alpha, s)
    ratio = alpha_s / alpha_t
    return ratio, _wide(schedule.sigma, s) - ratio * _wide(schedule.sigma, t)


def _wide(function: Callable[[float | Tensor], float | Tensor], t: float | Tensor) -> float | Tensor:
    """A schedule's function at t in float64: its differences over a short interval keep their digits."""
    return function(t.double() if isinstance(t, Tensor) and t.device.type != "mps" else t)


def cd_loss(
    f: Map,
    target: Map,
    teacher: Denoiser,
    x: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    *,
    step: OneStep = heun_step,
    substeps: int = 1,
    distance: Distance | None = None,
) -> Tensor:
    """Consistency distillation: the distance of f(x, t) to target(x_s, s), (B,), x_s by the teacher.

    x (B, *) at t: draws of the forward kernel; s < t: floats, 0-dim or (B,). The teacher's ODE is solved
    from t to s by `substeps` equal steps in lam. No gradient flows through the target, which is f's slow
    copy or f itself. The distance is `SquaredL2()` unless given.
    Source: Song et al. 2023, algorithm 2. Equations: eq-training-pair, eq-consistency-loss
    """
    require_count("substeps", substeps)
    with torch.no_grad():
        goal, now = x, t
        lam_t, lam_s = teacher.schedule.lam(t), teacher.schedule.lam(s)
        for k in range(1, substeps + 1):
            nearer = lam_t + (lam_s - lam_t) * (k / substeps)
            then = s if k == substeps else teacher.schedule.t_of_lam(nearer)
            goal, now = step(teacher, goal, now, then), then
        goal = target(goal, s)
    return (distance or SquaredL2())(f(x, t), goal)


def ct_loss(
    f: Map,
    target: Map,
    schedule: Schedule,
    x0: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    eps: Tensor,
    *,
    distance: Distance | None = None,
) -> Tensor:
    """Consistency training: the distance of f(x_t, t) to target(x_s, s), (B,), both of one x0 and one eps.

    x0, eps (B, *); s < t: floats, 0-dim or (B,). The pair is Euler's step with the denoiser's value replaced
    by x0, right on average only: at the exact map the loss is not 0. The distance is `PseudoHuber()` unless
    given. Source: Song et al. 2023, algorithm 3. Equations: eq-consistency-loss
    """
    with torch.no_grad():
        goal = target(perturb(schedule, x0, s, eps), s)
    return (distance or PseudoHuber())(f(perturb(schedule, x0, t, eps), t), goal)
