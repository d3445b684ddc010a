"""Exponential Adams-Bashforth methods: the linear part exact, the rest a polynomial in past predictions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffedu.affine import Linear
from diffedu.checks import require_count, require_positive
from diffedu.denoiser import Denoiser, Prediction
from diffedu.phi import phi
from diffedu.schedules import Schedule

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# For each unit of lam: t is analytic in it, its nearest singularity a distance pi / 2 off the real line.
GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(12)


class Multistep(ABC):
    """A solver whose step combines the newest prediction with those of the steps before, newest first."""

    stochastic: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Linear]:
        """For each interval the numbers of x <- a x + b_0 p_0 + b_1 p_1 + ...; the first have fewer p."""

    @abstractmethod
    def reading(self, prediction: Prediction) -> Tensor:
        """The reading that the method combines, (B, *)."""

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        c: Linear,
        state: tuple[Tensor, ...] | None,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step over the interval of record c; x (B, *); the state is the last readings, newest first."""
        p = (self.reading(denoiser(x, c.t)), *(state or ()))[: len(c.b)]
        return c.combine(x, p), p


def _steps_in_lam(schedule: Schedule, ts: Sequence[float]) -> list[float]:
    """h = lam_s - lam_t of every interval t -> s; ValueError where alpha or sigma is 0."""
    lams = [schedule.lam(t) for t in ts]
    for t, lam in zip(ts, lams, strict=True):
        if not math.isfinite(lam):
            raise ValueError(f"an exponential step needs alpha, sigma > 0; got the time t = {t!r}")
    return [after - before for before, after in pairwise(lams)]


@dataclass(frozen=True)
class DPMSolverPP2M(Multistep):
    """DPM-Solver++(2M): the linear part exact in the data prediction, its slope from the step before.

    x_s = (sigma_s / sigma_t) x - alpha_s (e^(-h) - 1) D, D = x0 + (h / (2 h_1)) (x0 - x0_1), where h_1 and
    x0_1 are those of the step before; the first step has D = x0. Order 2.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    order: ClassVar[float] = 2.0

    def reading(self, prediction: Prediction) -> Tensor:
        """x0, (B, *)."""
        return prediction.x0

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Linear]:
        """For each interval the numbers of x <- a x + b_0 x0 + b_1 x0_1."""
        hs = _steps_in_lam(schedule, ts)
        records = []
        for i, (t, s) in enumerate(pairwise(ts)):
            a, b = schedule.sigma(s) / schedule.sigma(t), -schedule.alpha(s) * math.expm1(-hs[i])
            if i == 0:
                records.append(Linear(t, a, (b,)))
            else:
                w = hs[i] / (2 * hs[i - 1])
                records.append(Linear(t, a, (b * (1 + w), -b * w)))
        return records


@dataclass(frozen=True)
class DPMSolverPP3M(Multistep):
    """The multistep method of order 3 in the data prediction: a parabola in lam through three of them.

    x_s = (sigma_s / sigma_t) x + alpha_s [h phi_1(-h) x0 + h^2 phi_2(-h) D1 + h^3 phi_3(-h) D2]. With the
    divided differences d_1 = (x0 - x0_1) / h_1, d_2 = (x0_1 - x0_2) / h_2, d_12 = (d_1 - d_2) / (h_1 + h_2)
    the parabola has at lam_t the slope D1 = d_1 + h_1 d_12 and the second derivative D2 = 2 d_12. The
    official code of DPM-Solver++(3M) has D2 = d_12 and so the order 2. The first two steps are of order 1
    and 2; nothing is lowered at the last. Order 3.
    Source: Lu et al. 2022 (DPM-Solver++), eq. 8 with k = 3; Hochbruck & Ostermann 2010, section 2.5.
    """

    order: ClassVar[float] = 3.0

    def reading(self, prediction: Prediction) -> Tensor:
        """x0, (B, *)."""
        return prediction.x0

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Linear]:
        """For each interval the numbers of x <- a x + b_0 x0 + b_1 x0_1 + b_2 x0_2."""
        hs = _steps_in_lam(schedule, ts)
        records = []
        for i, (t, s) in enumerate(pairwise(ts)):
            h, alpha = hs[i], schedule.alpha(s)
            c0, c1, c2 = (alpha * h**k * phi(k, -h) for k in (1, 2, 3))  # the weights of x0, D1 and D2
            w1 = w2 = 0.0  # those of d_1 and d_2
            if i == 1:
                w1 = c1
            elif i > 1:
                h1, h2 = hs[i - 1], hs[i - 2]
                curve = (c1 * h1 + c2 * 2) / (h1 + h2)  # of d_1 - d_2
                w1, w2 = c1 + curve, -curve
            b = [c0]
            if i > 0:
                b = [c0 + w1 / hs[i - 1], -w1 / hs[i - 1]]
            if i > 1:
                b = [b[0], b[1] + w2 / hs[i - 2], -w2 / hs[i - 2]]
            records.append(Linear(t, schedule.sigma(s) / schedule.sigma(t), tuple(b)))
        return records


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS: the noise as a polynomial in t^(1/power) through the last `order` predictions, 1 to 4 of them.

    x_s = (alpha_s / alpha_t) x + alpha_s sum_j eps_j int_t^s L_j d(sigma / alpha), L_j the polynomial that is
    1 at the time of eps_j and 0 at the others. power = 1 is the paper's tAB-DEIS. But the noise is -sigma
    score, and near the data VP's sigma goes as sqrt(t): hence power = 2, at its best on the grid uniform in
    sqrt(t), `schedule.grid(n, 2)`. The integrals are taken in lam by Gauss's rule, to rounding. The first
    steps have the lower orders, the last is as the others; order 1 is DDIM.
    Raises ValueError for other orders and a power that is not positive and finite.
    Source: Zhang & Chen 2023 (DEIS), eq. 14 and 15. Equations: eq-lambda-integral
    """

    order: int
    power: float = 2.0

    def __post_init__(self) -> None:
        if require_count("order", self.order) > 4:
            raise ValueError(f"order must be 1, 2, 3 or 4; got {self.order!r}")
        require_positive("power", self.power)

    def reading(self, prediction: Prediction) -> Tensor:
        """eps, (B, *)."""
        return prediction.eps

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Linear]:
        """For each interval the numbers of x <- a x + b_0 eps + b_1 eps_1 + ..."""
        n, hs = len(ts) - 1, np.array(_steps_in_lam(schedule, ts))[:, None]
        shares, weights = _gauss_rule(float(abs(hs).max()))
        lams = np.array([[schedule.lam(t)] for t in ts[:-1]]) + hs * shares
        nodes = schedule.t_of_lam(torch.from_numpy(lams)).numpy() ** (1 / self.power)
        # alpha_s d(sigma / alpha) = -sigma_s e^(lam_s - lam) d lam
        sigmas = np.array([[schedule.sigma(s)] for s in ts[1:]])
        density = -sigmas * hs * weights * np.exp((1 - shares) * hs)
        z = np.array(ts)[:, None] ** (1 / self.power)
        rows: list[list[float]] = []
        for k in range(1, min(self.order, n) + 1):  # the k-th interval is of order k, then all of self.order
            i, end = k - 1, n if k == self.order else k
            past = [z[i - j : end - j] for j in range(k)]
            b = [(density[i:end] * _lagrange(past, j, nodes[i:end])).sum(1) for j in range(1, k)]
            b.insert(0, -(sigmas * np.expm1(hs))[i:end, 0] - sum(b))  # the L_j add up to 1
            rows += np.stack(b, axis=1).tolist()
        steps = zip(pairwise(ts), rows, strict=True)
        return [Linear(t, schedule.alpha(s) / schedule.alpha(t), tuple(b)) for (t, s), b in steps]


def _lagrange(nodes: Sequence[Array], j: int, z: Array) -> Array:
    """At the places z, the polynomial that is 1 at nodes[j] and 0 at the others."""
    value = np.ones_like(z)
    for k, other in enumerate(nodes):
        if k != j:
            value *= (z - other) / (nodes[j] - other)
    return value


def _gauss_rule(length: float) -> tuple[Array, Array]:
    """Nodes and weights on [0, 1], exact to rounding on a schedule for steps of this length in lam."""
    panels = math.ceil(length)
    nodes = (np.arange(panels)[:, None] + 0.5 * (1 + GAUSS_NODES)) / panels
    return nodes.ravel(), np.tile(0.5 * GAUSS_WEIGHTS / panels, panels)
