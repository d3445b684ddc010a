"""Steps that combine the state with predictions and noise; their numbers are taken once for a whole grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class AffineSolver(ABC):
    """A solver of order 1 whose step over an interval is one `Affine`."""

    order: ClassVar[float] = 1.0

    @abstractmethod
    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """For each interval of the times ts the numbers of x <- a x + b eps + n z."""

    def step(
        self, denoiser: Denoiser, x: Tensor, c: Affine, state: None, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, None]:
        """One step over the interval of record c; x (B, *)."""
        return c.apply(denoiser, x, noise), None


@dataclass(frozen=True)
class EtaSolver(AffineSolver):
    """An `AffineSolver` whose noise is scaled by eta >= 0, none at eta = 0. ValueError for eta < 0."""

    eta: float

    def __post_init__(self) -> None:
        require_eta(self.eta)

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise: eta > 0."""
        return self.eta > 0


class Linear(NamedTuple):
    """x <- a x + b_0 p_0 + b_1 p_1 + ..., where p_0 is the prediction at t and the others are known."""

    t: float
    a: float
    b: tuple[float, ...]

    def combine(self, x: Tensor, p: Sequence[Tensor]) -> Tensor:
        """a x + sum of b_j p_j; x and each p_j (B, *)."""
        x = self.a * x
        for b, prediction in zip(self.b, p, strict=True):
            if b:
                x = torch.add(x, prediction, alpha=b)
        return x
