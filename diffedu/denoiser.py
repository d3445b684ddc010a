"""One prediction, four readings: x0, eps, score, v; and the denoisers that make it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffedu.checks import per_sample
from diffedu.schedules import Schedule

KINDS = ("eps", "x0", "score", "v")


class Prediction:
    """What a denoiser says of x_t = alpha x0 + sigma eps; any one of the readings gives the others.

    x and each reading: (B, *). Reading what is undefined (alpha = 0 or sigma = 0) raises ValueError.
    v := alpha eps - sigma x0 for every schedule. Equations: eq-readings
    """

    __slots__ = ("alpha", "kind", "sigma", "value", "x")

    def __init__(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, kind: str, value: Tensor
    ) -> None:
        self.x, self.alpha, self.sigma, self.kind, self.value = x, alpha, sigma, kind, value

    @property
    def eps(self) -> Tensor:
        """The noise, (B, *): (x - alpha x0) / sigma = -sigma score (Ho et al. 2020).

        Equations: eq-eps-definition
        """
        match self.kind:
            case "eps":
                return self.value
            case "score":
                return -self.sigma * self.value
            case "v":
                a2s2 = self.alpha**2 + self.sigma**2
                return _sum(self.sigma / a2s2, self.x, self.alpha / a2s2, self.value)
            case _:
                return (self.x - self.alpha * self.value) / self._nonzero("sigma", "eps")

    @property
    def x0(self) -> Tensor:
        """The clean data, (B, *): (x - sigma eps) / alpha."""
        match self.kind:
            case "x0":
                return self.value
            case "v":
                a2s2 = self.alpha**2 + self.sigma**2
                return _sum(self.alpha / a2s2, self.x, -self.sigma / a2s2, self.value)
            case _:
                return (self.x - self.sigma * self.eps) / self._nonzero("alpha", "x0")

    @property
    def score(self) -> Tensor:
        """The score, (B, *): -eps / sigma. Equations: eq-score-noise, eq-score-to-noise"""
        return self.value if self.kind == "score" else -self.eps / self._nonzero("sigma", "score")

    @property
    def v(self) -> Tensor:
        """The velocity, (B, *): alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.value if self.kind == "v" else self.alpha * self.eps - self.sigma * self.x0

    def _nonzero(self, name: str, reading: str) -> float | Tensor:
        value: float | Tensor = getattr(self, name)
        zero = bool((value == 0).any()) if isinstance(value, Tensor) else value == 0
        if zero:
            raise ValueError(f"the reading {reading} of a {self.kind} prediction is undefined at {name} = 0")
        return value


def _sum(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y; two kernels instead of three where b is a number."""
    return a * x + b * y if isinstance(b, Tensor) else torch.add(a * x, y, alpha=b)


class Denoiser(Protocol):
    """What samplers and losses use: a schedule, and (x (B, *), t) -> Prediction."""

    @property
    def schedule(self) -> Schedule:
        """The schedule whose x_t the denoiser reads."""

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The prediction at x (B, *) and t: float, 0-dim or (B,)."""


@dataclass(frozen=True)
class NetDenoiser:
    """A network net(x, lam) -> (B, *), lam (B,), read as eps, x0, score or v.

    Raises ValueError for an unknown kind, an x without data dimensions, and an output of another shape.
    """

    net: nn.Module
    schedule: Schedule
    kind: str = "eps"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {self.kind!r}")

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The network's prediction at x (B, *) and t: float, 0-dim or (B,)."""
        if x.ndim < 2:
            raise ValueError(f"x must be of shape (B, *); got {tuple(x.shape)}")
        alpha, sigma = per_sample(self.schedule.alpha(t), x), per_sample(self.schedule.sigma(t), x)
        lam = self.schedule.lam(t)
        lam = lam.to(x).expand(len(x)) if isinstance(lam, Tensor) else x.new_full((len(x),), lam)
        value = self.net(x, lam)
        if value.shape != x.shape:
            raise ValueError(
                f"the network must return the shape of x, {tuple(x.shape)}; got {tuple(value.shape)}"
            )
        return Prediction(x, alpha, sigma, self.kind, value)


def calls_per_evaluation(denoiser: Denoiser) -> int:
    """How many network calls one call of this denoiser costs: 1 unless it says otherwise."""
    return getattr(denoiser, "calls", 1)


class Counted:
    """A denoiser that counts its evaluations in `nfe`: one batch call is 1, a Guided one 2."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.schedule, self.nfe = denoiser, denoiser.schedule, 0
        self.calls = calls_per_evaluation(denoiser)

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The wrapped denoiser's prediction at x (B, *) and t."""
        self.nfe += self.calls
        return self.denoiser(x, t)


class Guided:
    """Classifier-free guidance: unconditional + weight (conditional - unconditional).

    weight 0 is the unconditional model, 1 the conditional one. Raises ValueError if the two denoisers'
    schedules differ or the weight is not finite. Source: Ho & Salimans 2022 (their w is weight - 1).
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, weight: float) -> None:
        if conditional.schedule != unconditional.schedule:
            raise ValueError(
                "the two denoisers must share one schedule; got "
                f"{conditional.schedule} and {unconditional.schedule}"
            )
        if not math.isfinite(weight):
            raise ValueError(f"the guidance weight must be a finite number; got {weight!r}")
        self.conditional, self.unconditional, self.weight = conditional, unconditional, weight
        self.schedule = conditional.schedule
        self.calls = calls_per_evaluation(conditional) + calls_per_evaluation(unconditional)

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The guided prediction at x (B, *) and t, of the conditional one's kind."""
        c, u = self.conditional(x, t), self.unconditional(x, t)
        base: Tensor = getattr(u, c.kind)
        return Prediction(x, c.alpha, c.sigma, c.kind, torch.lerp(base, c.value, self.weight))
