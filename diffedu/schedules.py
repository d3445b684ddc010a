"""The noise schedules: VP, sub-VP, VE, cosine, and one's own."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from diffedu.checks import in_interval
from diffedu.schedule import Schedule, T

__all__ = ["VE", "VP", "Cosine", "Custom", "Schedule", "SubVP"]

SNR_CHECK_POINTS = 10_000


@dataclass(frozen=True)
class _LinearBeta(Schedule):
    """beta(t) = beta_min + (beta_max - beta_min) t and its integral B(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta_min <= self.beta_max < math.inf and self.beta_max > 0):
            raise ValueError(
                "0 <= beta_min <= beta_max, beta_max > 0 is required; got "
                f"beta_min={self.beta_min!r}, beta_max={self.beta_max!r}"
            )

    def _beta(self, t: Any) -> Any:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _B(self, t: Any) -> Any:
        return (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def _t_of_B(self, m: ModuleType, B: Any) -> Any:
        slope = self.beta_max - self.beta_min
        return 2 * B / (self.beta_min + m.sqrt(self.beta_min**2 + 2 * slope * B))

    def _alpha(self, m: ModuleType, t: Any) -> Any:
        return m.exp(-0.5 * self._B(t))

    def _f(self, m: ModuleType, t: Any) -> Any:
        return -0.5 * self._beta(t)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving: dx = -beta x / 2 dt + sqrt(beta) dw, beta linear in t.

    Source: Song et al. 2021, eq. 11. Equations: eq-vp-sde, eq-vp-coefficients, eq-variance-preserving
    """

    def _sigma(self, m: ModuleType, t: Any) -> Any:
        return m.sqrt(-m.expm1(-self._B(t)))

    def _lam(self, m: ModuleType, t: Any) -> Any:
        B = self._B(t)
        return -0.5 * (B + m.log(-m.expm1(-B)))

    def _g2(self, m: ModuleType, t: Any) -> Any:
        return self._beta(t)

    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any:
        y = -2 * lam  # B = log(1 + e^y), written so that e^y cannot overflow
        return self._t_of_B(m, 0.5 * (y + abs(y)) + m.log1p(m.exp(-abs(y))))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-variance preserving: the drift of VP, g^2 = beta (1 - exp(-2 B)), sigma = 1 - exp(-B).

    Source: Song et al. 2021, eq. 13. Equations: eq-coefficients
    """

    def _sigma(self, m: ModuleType, t: Any) -> Any:
        return -m.expm1(-self._B(t))

    def _lam(self, m: ModuleType, t: Any) -> Any:
        B = self._B(t)
        return -0.5 * B - m.log(-m.expm1(-B))

    def _g2(self, m: ModuleType, t: Any) -> Any:
        return -self._beta(t) * m.expm1(-2 * self._B(t))

    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any:
        return self._t_of_B(m, 2 * m.asinh(0.5 * m.exp(-lam)))  # sigma/alpha = 2 sinh(B/2)


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    sigma(0) = sigma_min, not 0: the kernel is N(x_0, sigma(t)^2 I), so a path starts at x_0 + sigma_min z.
    Source: Song et al. 2021, appendix C. Equations: eq-ve-sde, eq-ve-coefficients, eq-ve-sigma
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "0 < sigma_min < sigma_max is required; got "
                f"sigma_min={self.sigma_min!r}, sigma_max={self.sigma_max!r}"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, m: ModuleType, t: Any) -> Any:
        return 0.0 * t + 1.0

    def _sigma(self, m: ModuleType, t: Any) -> Any:
        return self.sigma_min * m.exp(self._log_ratio * t)

    def _lam(self, m: ModuleType, t: Any) -> Any:
        return -math.log(self.sigma_min) - self._log_ratio * t

    def _f(self, m: ModuleType, t: Any) -> Any:
        return 0.0 * t

    def _g2(self, m: ModuleType, t: Any) -> Any:
        return 2 * self._log_ratio * self._sigma(m, t) ** 2

    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any:
        return -(lam + math.log(self.sigma_min)) / self._log_ratio


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2); f and g^2 are unbounded as t -> 1.

    Source: Nichol & Dhariwal 2021, in the form of Salimans & Ho 2022. Equations: eq-coefficients
    """

    _: KW_ONLY
    t_max: float = 0.999

    def _alpha(self, m: ModuleType, t: Any) -> Any:
        return m.sin(0.5 * math.pi * (1 - t))  # exactly 0 at t = 1

    def _sigma(self, m: ModuleType, t: Any) -> Any:
        return m.sin(0.5 * math.pi * t)

    def _lam(self, m: ModuleType, t: Any) -> Any:
        return m.log(self._alpha(m, t)) - m.log(self._sigma(m, t))

    def _f(self, m: ModuleType, t: Any) -> Any:
        return -0.5 * math.pi * self._sigma(m, t) / self._alpha(m, t)

    def _g2(self, m: ModuleType, t: Any) -> Any:
        return math.pi * self._sigma(m, t) / self._alpha(m, t)

    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any:
        return m.atan(m.exp(-lam)) * (2 / math.pi)


@dataclass(frozen=True, init=False)
class Custom(Schedule):
    """A schedule from two torch callables t -> alpha, t -> sigma; the rest by autodiff and bisection.

    Refused with ValueError where alpha or sigma is not positive and finite on [t_min, t_max], or where the
    SNR does not fall (checked on 10,000 points): there g^2 < 0 and no SDE (1) has this kernel.
    Equations: eq-coefficients, eq-snr-monotone
    """

    alpha_of_t: Callable[[Tensor], Tensor]
    sigma_of_t: Callable[[Tensor], Tensor]

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        *,
        t_min: float = 1e-3,
        t_max: float = 1.0,
    ) -> None:
        fields = {"alpha_of_t": alpha, "sigma_of_t": sigma, "t_min": t_min, "t_max": t_max}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        t = torch.linspace(self.t_min, self.t_max, SNR_CHECK_POINTS, dtype=torch.float64)
        for name, formula in (("alpha", self.alpha_of_t), ("sigma", self.sigma_of_t)):
            values = formula(t)
            if not isinstance(values, Tensor) or values.shape != t.shape:
                came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"{name} must map times (n,) to values (n,), in torch; got {came}")
            bad = ~(torch.isfinite(values) & (values > 0))
            if bool(bad.any()):
                i = int(bad.nonzero()[0])
                raise ValueError(
                    f"{name} must be positive and finite on [t_min, t_max] = [{self.t_min:g}, "
                    f"{self.t_max:g}]; got {name}({t[i]:.4g}) = {values[i]:.4g}"
                )
        rises = self._lam(torch, t).diff() >= 0
        if bool(rises.any()):
            i = int(rises.nonzero()[0])
            raise ValueError(
                "the signal-to-noise ratio must fall on all of [t_min, t_max] (where it rises, g^2 < 0); "
                f"it does not fall between t = {t[i]:.4g} and t = {t[i + 1]:.4g}"
            )

    def _evaluate(self, formula: Any, t: T, low: float, high: float, name: str = "t") -> T:
        if isinstance(t, Tensor):
            return super()._evaluate(formula, t, low, high, name)
        u = torch.tensor(in_interval(t, low, high, name), dtype=torch.float64)
        return cast(T, formula(torch, u).item())

    def _alpha(self, m: ModuleType, t: Any) -> Any:
        return self.alpha_of_t(t)

    def _sigma(self, m: ModuleType, t: Any) -> Any:
        return self.sigma_of_t(t)

    def _lam(self, m: ModuleType, t: Any) -> Any:
        return torch.log(self.alpha_of_t(t)) - torch.log(self.sigma_of_t(t))

    def _f(self, m: ModuleType, t: Any) -> Any:
        return _derivative(lambda u: self.alpha_of_t(u).log(), t)

    def _g2(self, m: ModuleType, t: Any) -> Any:
        return -2 * self.sigma_of_t(t) ** 2 * _derivative(lambda u: self._lam(torch, u), t)

    def _t_of_lam(self, m: ModuleType, lam: Any) -> Any:
        low, high = torch.full_like(lam, self.t_min), torch.full_like(lam, self.t_max)
        for _ in range(60):  # halves to below the spacing of float64
            middle = 0.5 * (low + high)
            later = self._lam(torch, middle) > lam
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return 0.5 * (low + high)


def _derivative(formula: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        u = t.detach().clone().requires_grad_(True)
        (slope,) = torch.autograd.grad((formula(u) + 0 * u).sum(), u)  # 0 * u: constants are fine
    return slope
