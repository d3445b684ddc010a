"""Dormand and Prince's adaptive Runge-Kutta method on the probability-flow ODE."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffedu.checks import require_positive
from diffedu.denoiser import Denoiser
from diffedu.schedules import Schedule
from diffedu.sde import reverse_drift

# Dormand & Prince 1980, table 2: the times and weights of the stages after the first; the last stage is the
# solution of order 5. ERROR is its distance from the one of order 4.
STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # scipy's


class Pace(NamedTuple):
    """What the next interval inherits: the slope where it starts and the length of step to try."""

    slope: Tensor
    dt: float


@dataclass(frozen=True)
class RK45:
    """The embedded pair of orders 5 and 4 on the probability-flow ODE in t, its steps as the error allows.

    The times of the grid are output times: steps are shortened to end on them, and their length and last
    slope are kept from one to the next. A step is taken when for each sample of the batch the root mean
    square of error / (atol + rtol |x|) is at most 1, so that no sample's error hides in the mean of the
    others; it costs 6 evaluations, taken or not. Raises ValueError for tolerances that are not positive and
    finite or that the dtype of x cannot resolve, ArithmeticError where the step would vanish. Order 5.
    Source: Dormand & Prince 1980; for this ODE, Song et al. 2021, section 4.3.
    Equations: eq-plain-integral, eq-black-box
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    order: ClassVar[float] = 5.0
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive("rtol", self.rtol)
        require_positive("atol", self.atol)

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[tuple[float, float]]:
        """The intervals (t, s) themselves: what happens inside of them the errors decide."""
        return list(pairwise(ts))

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        c: tuple[float, float],
        state: Pace | None,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Pace]:
        """As many steps as it takes from t to s, c = (t, s); x (B, *)."""
        t, s = c
        slope, dt = state or self._start(denoiser, x, t, s)
        while t != s:
            last = abs(dt) >= abs(s - t)
            now = s - t if last else dt
            end = s if last else t + dt
            y, slopes = x, [slope]
            for share, weights in STAGES:
                y = _combine(x, now, weights, slopes)
                slopes.append(reverse_drift(denoiser, y, end if share == 1 else t + share * now, 0.0))
            error = self._size(
                _combine(torch.zeros_like(x), now, ERROR, slopes), torch.maximum(x.abs(), y.abs())
            )
            factor = min(GROW, max(SHRINK, SAFETY * error**-0.2)) if 0 < error < math.inf else SHRINK
            if error <= 1:
                t, x, slope = end, y, slopes[-1]
                factor = GROW if error == 0 else factor
                dt = max(dt, factor * now, key=abs) if last else factor * dt
            else:
                dt = min(factor, 1.0) * now
                if t + dt / 16 == t:
                    raise ArithmeticError(
                        f"no step is short enough for rtol = {self.rtol!r}, atol = {self.atol!r}; "
                        f"got the error {error:.3g} times too large with {now!r} at t = {t!r}"
                    )
        return x, Pace(slope, dt)

    def _start(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Pace:
        """The slope at x and a first step along which x changes by a hundredth (Hairer et al. 1993, II.4)."""
        if self.rtol < (least := 4 * torch.finfo(x.dtype).eps):
            raise ValueError(f"rtol must be at least {least:.3g} for {x.dtype}; got {self.rtol!r}")
        slope = reverse_drift(denoiser, x, t, 0.0)
        size, speed = self._size(x, x.abs()), self._size(slope, x.abs())
        dt = 0.01 * size / speed if min(size, speed) > 1e-5 else 1e-6
        return Pace(slope, math.copysign(dt, s - t))

    def _size(self, v: Tensor, x: Tensor) -> float:
        """The largest over the batch of the root mean square of v / (atol + rtol |x|)."""
        if not v.numel():
            return 0.0
        return float((v / (self.atol + self.rtol * x)).flatten(1).square().mean(1).amax().sqrt())


def _combine(x: Tensor, dt: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + dt (w_1 k_1 + w_2 k_2 + ...)."""
    for w, k in zip(weights, slopes, strict=True):
        if w:
            x = torch.add(x, k, alpha=dt * w)
    return x
