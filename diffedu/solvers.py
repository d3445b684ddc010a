"""Solvers that treat the drift as a black box, deterministic and stochastic."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffedu.checks import require_eta
from diffedu.denoiser import Denoiser
from diffedu.schedules import Schedule


class Affine(NamedTuple):
    """One step x <- a x + b eps(x, t) + n z, its numbers taken once for the whole grid."""

    t: float
    a: float
    b: float
    n: float = 0.0

    def apply(self, denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """The state (B, *) after the step from x (B, *)."""
        x = torch.add(self.a * x, denoiser(x, self.t).eps, alpha=self.b)
        return torch.add(x, noise(), alpha=self.n) if self.n else x


def _euler_coefficients(schedule: Schedule, ts: Sequence[float], eta: float) -> list[Affine]:
    """Euler-Maruyama of dx = [f x + (1 + eta^2) g^2 eps / (2 sigma)] dt + eta g dw on the grid ts."""
    records = []
    for t, s in pairwise(ts):
        dt, f, g2, sigma = s - t, schedule.f(t), schedule.g2(t), schedule.sigma(t)
        if sigma == 0:
            raise ValueError(f"the score is undefined where sigma = 0; got a step from t = {t!r}")
        noise = eta * math.sqrt(g2 * abs(dt))
        records.append(Affine(t, 1 + f * dt, 0.5 * (1 + eta**2) * g2 / sigma * dt, noise))
    return records


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama on the reverse-time family with noise eta g; eta = 1 the reverse SDE, 0 the ODE.

    x_s = x_t + [f x - (1 + eta^2) g^2 score / 2] (s - t) + eta g sqrt(t - s) z. Weak order 1.
    Raises ValueError for eta < 0. Source: Anderson 1982; Song et al. 2021, section 3.
    """

    eta: float = 1.0
    order: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require_eta(self.eta)

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise: eta > 0."""
        return self.eta > 0

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """For each interval the numbers of x <- a x + b eps + n z."""
        return _euler_coefficients(schedule, ts, self.eta)

    def step(
        self, denoiser: Denoiser, x: Tensor, c: Affine, state: None, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, None]:
        """One step over the interval of record c; x (B, *)."""
        return c.apply(denoiser, x, noise), None


@dataclass(frozen=True)
class Euler:
    """Euler's method on the probability-flow ODE dx/dt = f x - g^2 score / 2, in t. Order 1.

    Source: Song et al. 2021, eq. 13. Equations: eq-euler
    """

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = False

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """For each interval the numbers of x <- a x + b eps."""
        return _euler_coefficients(schedule, ts, eta=0.0)

    def step(
        self, denoiser: Denoiser, x: Tensor, c: Affine, state: None, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, None]:
        """One step over the interval of record c; x (B, *)."""
        return c.apply(denoiser, x, noise), None
