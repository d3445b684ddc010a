"""What input is allowed; every refusal says what was wrong, what is allowed and which value came."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor


def per_sample(c: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient c(t), such as alpha, made to broadcast over the data dimensions of x.

    c: float, 0-dim or (B,). x: (B, *). A float comes back as it is; a tensor in the dtype and on the device
    of x, which the product with x so keeps, a (B,) one as (B, 1, ..., 1). Raises ValueError for any other
    shape and for an x that is not floating.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor; got dtype {x.dtype}")
    if not isinstance(c, Tensor):
        return c
    if c.ndim == 0:
        return c.to(x)
    if c.ndim != 1 or x.ndim == 0 or len(c) != len(x):
        raise ValueError(
            f"t must be one number or of shape (B,), one time per sample of x {tuple(x.shape)}; "
            f"got {tuple(c.shape)}"
        )
    return c.to(x).reshape(-1, *[1] * (x.ndim - 1))


def require_count(name: str, n: object, least: int = 1) -> int:
    """An int of at least `least`, or an error that names the argument and the value that came."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {n!r}")
    return int(n)


def _rounding(bound: float, eps: float) -> float:
    """How far arithmetic in a dtype of this eps may carry a time past a bound that it should not pass."""
    return eps * abs(bound) + min(max(2 * eps, 1e-12), 1e-6)


def in_interval(t: float | Tensor, low: float, high: float, name: str) -> float | Tensor:
    """Refuse what lies outside [low, high]; what is outside by rounding alone is put on the end."""
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise ValueError(f"{name} must be a float or a floating tensor; got dtype {t.dtype}")
        eps = torch.finfo(t.dtype).eps
        u = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        inside = (u >= low - _rounding(low, eps)) & (u <= high + _rounding(high, eps))
        if not bool(inside.all()):  # also refuses nan
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {float(u[~inside][0])!r}")
        return u.clamp(low, high)
    if isinstance(t, bool) or not isinstance(t, (int, float)):
        raise ValueError(f"{name} must be a float or a floating tensor; got {t!r}")
    if not low - _rounding(low, 1e-15) <= t <= high + _rounding(high, 1e-15):
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {t!r}")
    return min(max(float(t), low), high)


def require_state(x: object, name: str = "x") -> None:
    """Refuse a state that is not a floating (B, *) tensor of finite numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor; got {getattr(x, 'dtype', type(x))}")
    if x.ndim < 2:
        raise ValueError(f"{name} must be of shape (B, *); got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~x.isfinite()).sum())} nan or inf")


def require_times(ts: Tensor | Sequence[float], low: float, high: float, descending: bool) -> list[float]:
    """The times as floats, or an error unless two or more, strictly monotone and in [low, high]."""
    if isinstance(ts, (int, float)) or (isinstance(ts, Tensor) and ts.ndim != 1):
        raise ValueError(f"ts must be one row of times, two or more; got {ts!r}")
    eps = torch.finfo(ts.dtype).eps if isinstance(ts, Tensor) and ts.is_floating_point() else 1e-15
    values = [float(t) for t in (ts.tolist() if isinstance(ts, Tensor) else ts)]
    if len(values) < 2:
        raise ValueError(f"ts must hold two times or more; got {values}")
    for t in values:
        if not low - _rounding(low, eps) <= t <= high + _rounding(high, eps):  # also refuses nan
            raise ValueError(f"times must lie in [t_min, t_max] = [{low:g}, {high:g}]; got {t!r}")
    values = [min(max(t, low), high) for t in values]  # rounding alone is put on the end
    for t, s in pairwise(values):
        if (s >= t) if descending else (s <= t):
            way = "descend" if descending else "ascend"
            raise ValueError(f"times must strictly {way}; got {t!r} followed by {s!r}")
    return values


def require_eta(eta: float) -> None:
    """Refuse an eta that is negative or not finite."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be a finite number of at least 0; got {eta!r}")


def require_positive(name: str, value: float) -> None:
    """Refuse what is not a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number; got {value!r}")
