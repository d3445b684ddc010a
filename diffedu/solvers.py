"""Solvers that treat the drift as a black box, deterministic and stochastic."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffedu.affine import Affine, AffineSolver, EtaSolver
from diffedu.checks import require_count
from diffedu.denoiser import Denoiser
from diffedu.runge_kutta import RK45
from diffedu.sampling import Solver
from diffedu.schedules import Schedule

__all__ = [
    "RK45",
    "Ancestral",
    "AnnealedLangevin",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
]


def _euler(schedule: Schedule, t: float, dt: float, eta: float) -> Affine:
    """A step dt of Euler-Maruyama on dx = [f x + (1 + eta^2) g^2 eps / (2 sigma)] dt + eta g dw, all at t."""
    f, g2, sigma = schedule.f(t), schedule.g2(t), schedule.sigma(t)
    if sigma == 0:
        raise ValueError(f"the score is undefined where sigma = 0; got a step from t = {t!r}")
    if not (math.isfinite(f) and math.isfinite(g2)):
        raise ValueError(f"f and g^2 must be finite; got f = {f}, g^2 = {g2} at t = {t!r}")
    noise = eta * math.sqrt(g2 * abs(dt))
    return Affine(t, 1 + f * dt, 0.5 * (1 + eta**2) * g2 / sigma * dt, noise)


@dataclass(frozen=True)
class EulerMaruyama(EtaSolver):
    """Euler-Maruyama on the reverse-time family with noise eta g; eta = 1 the reverse SDE, 0 the ODE.

    x_s = x_t + [f x - (1 + eta^2) g^2 score / 2] (s - t) + eta g sqrt(t - s) z. Weak order 1.
    Raises ValueError for eta < 0. Source: Anderson 1982; Song et al. 2021, section 3.
    Equations: eq-reverse-em, eq-vp-reverse-em
    """

    eta: float = 1.0

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """Per interval the numbers of x <- a x + b eps + n z."""
        return [_euler(schedule, t, s - t, self.eta) for t, s in pairwise(ts)]


@dataclass(frozen=True)
class Ancestral(AffineSolver):
    """DDPM's sampler: a draw from the posterior q(x_s | x_t, x0) at the predicted x0. Weak order 1.

    With q = 1 - SNR_t / SNR_s: mean (alpha_s / alpha_t) (x - q sigma_t eps), deviation sigma_s sqrt(q).
    Source: Ho et al. 2020, algorithm 2, with the posterior variance, for any alpha and sigma.
    Equations: eq-ancestral
    """

    stochastic: ClassVar[bool] = True

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """Per interval the numbers of x <- a x + b eps + n z."""
        records = []
        for t, s in pairwise(ts):
            q = -math.expm1(2 * (schedule.lam(t) - schedule.lam(s)))
            a = schedule.alpha(s) / schedule.alpha(t)
            records.append(Affine(t, a, -a * q * schedule.sigma(t), schedule.sigma(s) * math.sqrt(q)))
        return records


@dataclass(frozen=True)
class ReverseDiffusion(AffineSolver):
    """The forward chain's own coefficients, reversed: x <- (2 - a) x + v score + sqrt(v) z. Weak order 1.

    a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2 are those of x_t = a x_s + sqrt(v) z; for VE it
    is NCSN's reverse step. Source: Song et al. 2021, eq. 46. Equations: eq-reverse-em, eq-ve-reverse-em
    """

    stochastic: ClassVar[bool] = True

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """Per interval the numbers of x <- a x + b eps + n z."""
        records = []
        for t, s in pairwise(ts):
            q = -math.expm1(2 * (schedule.lam(t) - schedule.lam(s)))  # v = q sigma_t^2
            a, sigma = schedule.alpha(t) / schedule.alpha(s), schedule.sigma(t)
            records.append(Affine(t, 2 - a, -q * sigma, sigma * math.sqrt(q)))
        return records


@dataclass(frozen=True)
class AnnealedLangevin:
    """At each new time s, n_steps of Langevin dynamics at that fixed noise level; no step between levels.

    x <- x + e score + sqrt(2 e) z with e = 2 (snr sigma_s)^2: the step size of Song & Ermon 2019,
    algorithm 1, proportional to sigma^2, in the parameter of Song et al. 2021, algorithm 4, whose batch
    norms |z| / |score| are replaced by sigma, their value where noise outweighs the data. A Markov-chain
    method: it approaches p_s as n_steps grows and snr falls. Raises ValueError for n_steps < 1 or snr <= 0.
    Equations: eq-annealed-langevin
    """

    n_steps: int
    snr: float
    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("n_steps", self.n_steps)
        if not 0 < self.snr < math.inf:
            raise ValueError(f"snr must be positive; got {self.snr!r}")

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """For each interval t -> s the numbers of one Langevin step at s."""
        records = []
        for s in ts[1:]:
            sigma = schedule.sigma(s)
            if sigma == 0:
                raise ValueError(f"Langevin dynamics needs sigma > 0; got the time {s!r}")
            records.append(Affine(s, 1.0, -2 * self.snr**2 * sigma, 2 * self.snr * sigma))
        return records

    def step(
        self, denoiser: Denoiser, x: Tensor, c: Affine, state: None, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, None]:
        """n_steps Langevin steps at the level of record c; x (B, *)."""
        for _ in range(self.n_steps):
            x = c.apply(denoiser, x, noise)
        return x, None


class PredictorCorrector:
    """A step of the predictor, then n_steps of Langevin dynamics at the time it arrives at.

    Order and state are the predictor's. Raises ValueError as `AnnealedLangevin`.
    Source: Song et al. 2021, algorithm 1.
    """

    stochastic = True

    def __init__(self, predictor: Solver, n_steps: int, snr: float) -> None:
        self.predictor, self.corrector = predictor, AnnealedLangevin(n_steps, snr)
        self.order = predictor.order

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[tuple[Any, Affine]]:
        """For each interval the predictor's record and the corrector's."""
        pairs = zip(
            self.predictor.coefficients(schedule, ts), self.corrector.coefficients(schedule, ts), strict=True
        )
        return list(pairs)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        c: tuple[Any, Affine],
        state: Any,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Any]:
        """One predictor step and its corrections; x (B, *)."""
        x, state = self.predictor.step(denoiser, x, c[0], state, noise)
        x, _ = self.corrector.step(denoiser, x, c[1], None, noise)
        return x, state


@dataclass(frozen=True)
class Euler(AffineSolver):
    """Euler's method on the probability-flow ODE dx/dt = f x - g^2 score / 2, in t. Order 1.

    Source: Song et al. 2021, eq. 13. Equations: eq-euler, eq-noise-ode
    """

    stochastic: ClassVar[bool] = False

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Affine]:
        """Per interval the numbers of x <- a x + b eps + n z."""
        return [_euler(schedule, t, s - t, eta=0.0) for t, s in pairwise(ts)]


@dataclass(frozen=True)
class Heun:
    """Heun's method on the probability-flow ODE in t, of 2 evaluations a step. Order 2.

    x_s = x + (s - t) (k_1 + k_2) / 2, k_1 the slope at x and t, k_2 that at x + (s - t) k_1 and s: the mean
    of x and of where two Euler steps of length s - t lead, the second with the coefficients of s.
    Source: Süli & Mayers 2003, section 12.5; for this ODE, Karras et al. 2022, algorithm 1.
    Equations: eq-plain-integral, eq-black-box
    """

    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = False

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[tuple[Affine, Affine]]:
        """For each interval the two Euler steps."""
        lengths = [(t, s, s - t) for t, s in pairwise(ts)]
        return [(_euler(schedule, t, dt, 0.0), _euler(schedule, s, dt, 0.0)) for t, s, dt in lengths]

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        c: tuple[Affine, Affine],
        state: None,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, None]:
        """One step over the interval of record c; x (B, *)."""
        first, second = c
        end = second.apply(denoiser, first.apply(denoiser, x, noise), noise)
        return torch.lerp(x, end, 0.5), None
