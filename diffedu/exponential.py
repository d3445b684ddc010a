"""Solvers that solve the linear part of the equation exactly."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffedu.denoiser import Denoiser
from diffedu.schedules import Schedule
from diffedu.solvers import Affine, EtaSolver


@dataclass(frozen=True)
class DDIM(EtaSolver):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - n^2) eps + n z, with n = eta times the posterior's deviation.

    n^2 = eta^2 sigma_s^2 (1 - e^(-2h)), h = lam_s - lam_t. eta = 0 is the first-order exponential step on
    the probability-flow ODE (DPM-Solver-1), eta = 1 ancestral sampling. Order 1.
    Raises ValueError for eta < 0, and where eta > 1 asks for more noise than sigma_s.
    Source: Song, Meng & Ermon 2021, eq. 12, for any alpha and sigma.
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


class Multistep(NamedTuple):
    """x <- a x + b (x0 + w (x0 - the x0 before))."""

    t: float
    a: float
    b: float
    w: float


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M): the linear part exact in the data prediction, its slope from the step before.

    x_s = (sigma_s / sigma_t) x - alpha_s (e^(-h) - 1) D, D = x0 + (h / (2 h_before)) (x0 - x0_before); the
    first step has D = x0. Order 2. Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = False

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> list[Multistep]:
        """For each interval the numbers of x <- a x + b (x0 + w (x0 - the x0 before))."""
        records, before = [], math.inf
        for t, s in pairwise(ts):
            h = schedule.lam(s) - schedule.lam(t)
            a, b = schedule.sigma(s) / schedule.sigma(t), -schedule.alpha(s) * math.expm1(-h)
            records.append(Multistep(t, a, b, h / (2 * before)))
            before = h
        return records

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        c: Multistep,
        state: Tensor | None,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """One step over the interval of record c; x (B, *); the state is the x0 of the step before."""
        x0 = denoiser(x, c.t).x0
        slope = x0 if state is None else torch.lerp(state, x0, 1 + c.w)
        return torch.add(c.a * x, slope, alpha=c.b), x0
