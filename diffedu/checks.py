"""What input is allowed; every refusal says what was wrong, what is allowed and which value came."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor


def per_sample(t: float | Tensor, x: Tensor) -> float | Tensor:
    """A time (or any coefficient), shaped so that it broadcasts over the data dimensions of x.

    t: float, 0-dim or (B,). x: (B, *). Returns t itself where it is one number, else (B, 1, ..., 1).
    Raises ValueError for any other shape.
    """
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    if t.ndim != 1 or len(t) != len(x):
        raise ValueError(
            f"t must be one number or of shape ({len(x)},), one time per sample; got {tuple(t.shape)}"
        )
    return t.reshape(-1, *[1] * (x.ndim - 1))


def require_count(name: str, n: object, least: int = 1) -> int:
    """An int of at least `least`, or an error that names the argument and the value that came."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {n!r}")
    return int(n)


def in_interval(t: float | Tensor, low: float, high: float, name: str) -> float | Tensor:
    """Refuse what lies outside [low, high]; what is outside by rounding alone is put on the end."""
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise ValueError(f"{name} must be a float or a floating tensor; got dtype {t.dtype}")
        slack = 2 * torch.finfo(t.dtype).eps
        inside = (t >= low - slack * max(1, abs(low))) & (t <= high + slack * max(1, abs(high)))
        if not bool(inside.all()):  # also refuses nan
            raise ValueError(
                f"{name} must lie in [{low:g}, {high:g}]; got values from {t.min():g} to {t.max():g}"
            )
        work = torch.float32 if t.device.type == "mps" else torch.float64
        return t.to(work).clamp(low, high)
    if isinstance(t, bool) or not isinstance(t, (int, float)):
        raise ValueError(f"{name} must be a float or a floating tensor; got {t!r}")
    if not low - 1e-12 * max(1, abs(low)) <= t <= high + 1e-12 * max(1, abs(high)):
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
    if isinstance(ts, Tensor) and ts.ndim != 1:
        raise ValueError(f"ts must be one row of times; got the shape {tuple(ts.shape)}")
    rounding = torch.finfo(ts.dtype).eps if isinstance(ts, Tensor) and ts.is_floating_point() else 1e-12
    values = [float(t) for t in ts]
    if len(values) < 2:
        raise ValueError(f"ts must hold two times or more; got {values}")
    for t in values:
        if not low - rounding <= t <= high + rounding:  # also refuses nan
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
