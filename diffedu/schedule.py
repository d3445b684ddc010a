"""What a noise schedule is: alpha, sigma and everything that follows from them.

A schedule fixes the kernel q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I). The linear SDE with this kernel,
dx = f(t) x dt + g(t) dw, and the half log-SNR lambda = log(alpha / sigma) are then determined.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from diffedu.checks import in_interval, require_count

T = TypeVar("T", bound=float | Tensor)  # a float comes back for a float, a tensor for a tensor


@dataclass(frozen=True)
class Schedule(ABC):
    """What every schedule has: alpha, sigma on [0, 1]; lam, snr, f, g2 on [t_min, t_max]; grids.

    A time is a float (a float comes back) or a floating tensor of any shape (same shape and dtype
    come back; computed in float64). A time outside the domain raises ValueError.
    """

    _: KW_ONLY
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_min < self.t_max <= 1.0:
            raise ValueError(
                f"0 <= t_min < t_max <= 1 is required; got t_min={self.t_min!r}, t_max={self.t_max!r}"
            )

    # Each formula is written once. `m` is the module `math` for a float and `torch` for a tensor.
    @abstractmethod
    def _alpha(self, m: ModuleType, t: Any) -> Any: ...
    @abstractmethod
    def _sigma(self, m: ModuleType, t: Any) -> Any: ...
    @abstractmethod
    def _lam(self, m: ModuleType, t: Any) -> Any: ...
    @abstractmethod
    def _f(self, m: ModuleType, t: Any) -> Any: ...
    @abstractmethod
    def _g2(self, m: ModuleType, t: Any) -> Any: ...
    @abstractmethod
    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any: ...

    def alpha(self, t: T) -> T:
        """Amplitude of the signal at time t in [0, 1]. Equations: eq-kernel, eq-mean-ode"""
        return self._evaluate(self._alpha, t, 0.0, 1.0)

    def sigma(self, t: T) -> T:
        """Standard deviation of the noise at time t in [0, 1]. Equations: eq-kernel, eq-variance-ode"""
        return self._evaluate(self._sigma, t, 0.0, 1.0)

    def lam(self, t: T) -> T:
        """Half log-SNR, log(alpha / sigma).

        Source: Lu et al. 2022 (DPM-Solver), section 2. Equations: eq-half-log-snr
        """
        return self._evaluate(self._lam, t, self.t_min, self.t_max)

    def snr(self, t: T) -> T:
        """Signal-to-noise ratio alpha^2 / sigma^2 = exp(2 lam). Equations: eq-snr"""
        return self._evaluate(lambda m, u: m.exp(2 * self._lam(m, u)), t, self.t_min, self.t_max)

    def f(self, t: T) -> T:
        """Drift coefficient, d log(alpha) / dt.

        Source: Kingma et al. 2021 (VDM). Equations: eq-coefficients, eq-f-restated
        """
        return self._evaluate(self._f, t, self.t_min, self.t_max)

    def g2(self, t: T) -> T:
        """Squared diffusion coefficient, d sigma^2/dt - 2 (d log alpha/dt) sigma^2.

        Source: Kingma et al. 2021 (VDM), appendix. Equations: eq-coefficients, eq-snr-monotone, eq-g2-lambda
        """
        return self._evaluate(self._g2, t, self.t_min, self.t_max)

    def t_of_lam(self, lam: T) -> T:
        """The time in [t_min, t_max] whose half log-SNR is lam; ValueError where there is none.

        Equations: eq-half-log-snr
        """
        low, high = self.lam(self.t_max), self.lam(self.t_min)
        t = self._evaluate(self._t_of_lam, lam, low, high, "lam")
        # The ends come back exactly, also where lam is infinite there.
        if isinstance(t, Tensor) and isinstance(lam, Tensor):
            inside = t.clamp(self.t_min, self.t_max).masked_fill(lam >= high, self.t_min)
            return cast(T, inside.masked_fill(lam <= low, self.t_max))
        if lam >= high or lam <= low:
            return cast(T, float(self.t_min if lam >= high else self.t_max))
        return cast(T, min(max(t, self.t_min), self.t_max))

    def grid(self, n: int, spacing: str | float = "lam") -> Tensor:
        """n + 1 times from t_max down to t_min, (n + 1,) float64.

        spacing: "lam" uniform in half log-SNR, "t" uniform in time, "edm" uniform in (sigma/alpha)^(1/7)
        (Karras et al. 2022, eq. 5), or a number p > 0: uniform in t^(1/p).
        Raises ValueError for n that is no positive int and for an unknown spacing.
        Equations: eq-time-grid
        """
        require_count("n", n)
        u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)

        def between(start: float, end: float) -> Tensor:
            return start + (end - start) * u

        if spacing == "t":
            ts = between(self.t_max, self.t_min)
        elif spacing == "lam" or spacing == "edm":
            lam0, lam1 = self.lam(self.t_max), self.lam(self.t_min)
            if math.isinf(lam0) or math.isinf(lam1):
                raise ValueError(
                    f"spacing {spacing!r} needs a finite lam at both ends; got lam={lam0} at t_max="
                    f"{self.t_max} and lam={lam1} at t_min={self.t_min}: move t_max or t_min inwards"
                )
            if spacing == "lam":
                lams = between(lam0, lam1)
            else:
                lams = -7 * between(math.exp(-lam0 / 7), math.exp(-lam1 / 7)).log()
            ts = self.t_of_lam(lams.clamp(lam0, lam1))
        elif isinstance(spacing, (int, float)) and 0 < spacing < math.inf:
            ts = between(self.t_max ** (1 / spacing), self.t_min ** (1 / spacing)) ** spacing
        else:
            raise ValueError(f'spacing must be "lam", "t", "edm" or a finite number p > 0; got {spacing!r}')
        ts[0], ts[-1] = self.t_max, self.t_min
        return ts

    def _evaluate(
        self,
        formula: Callable[[ModuleType, Any], Any],
        t: T,
        low: float,
        high: float,
        name: str = "t",
    ) -> T:
        u = in_interval(t, low, high, name)
        if isinstance(t, Tensor):
            return cast(T, formula(torch, u).to(t.dtype))
        try:
            return cast(T, formula(math, u))
        except (ValueError, ZeroDivisionError, OverflowError):
            # An infinite limit, such as log 0, which torch gives and math refuses.
            return cast(T, formula(torch, torch.tensor(u, dtype=torch.float64)).item())
