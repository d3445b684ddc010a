"""The Fokker-Planck equation, eq. (7), on a grid: conservative, positive, implicit in time."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import exprel
from torch import Tensor

from diffedu.checks import require_times

Array = NDArray[np.float64]


def solve(
    drift: Callable[[Tensor, float], Tensor],
    rho2: Callable[[float], float],
    p0: Tensor,
    x: Tensor,
    ts: Tensor | Sequence[float],
    dt: float | None = None,
) -> Tensor:
    """Densities (len(ts), n), per unit of x, of dx = drift(x, t) dt + rho(t) dw at the times ts.

    x (n,): centres of equal cells, through whose outer ends nothing flows. p0 (n,): density at ts[0]. drift
    maps states (m, 1) and a time to (m, 1), rho2 a time to rho^2 >= 0. ts strictly ascending, or descending:
    then the SDE runs in reverse time, its drift being dx/dt for dt < 0 as in `reverse_drift`. Between two
    times the steps are equal and at most dt, by default the spacing squared, with which the error is second
    order in the spacing (first order where rho = 0, the upwind scheme). Whatever dt, no density turns
    negative and mass is kept to rounding, which grows with rho^2 dt / h^2. Computed in float64; comes back
    like p0. No gradients are recorded.
    Raises ValueError for a grid, density, times, dt, drift or rho^2 other than these.
    Source: Chang & Cooper 1970, their weights; implicit Euler, coefficients from the middle of the step.
    Equations: eq-fokker-planck, eq-fokker-planck-family, eq-same-marginals
    """
    if x.ndim != 1 or len(x) < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite floats of shape (n,), n > 1; got {tuple(x.shape)}, {x.dtype}")
    gaps = x.double().diff()
    h = float(gaps.mean())
    slack = 4 * torch.finfo(x.dtype).eps * float(x.abs().max())
    if not (h > 0 and float((gaps - h).abs().max()) <= slack + 1e-9 * h):
        raise ValueError(f"x must ascend in equal steps; got steps from {gaps.min():.6g} to {gaps.max():.6g}")
    if p0.shape != x.shape or not p0.is_floating_point() or not bool((p0.isfinite() & (p0 >= 0)).all()):
        raise ValueError(
            f"p0 must be finite floats >= 0 of the shape of x, {tuple(x.shape)}; got {tuple(p0.shape)}, "
            f"{p0.dtype}, a smallest of {float(p0.min()) if p0.numel() else math.nan:.3g}"
        )
    dt = h * h if dt is None else dt
    if not 0 < dt < math.inf:
        raise ValueError(f"dt must be positive and finite; got {dt!r}")
    first = torch.as_tensor(ts, dtype=torch.float64).flatten()[:2].tolist()
    times = require_times(ts, -math.inf, math.inf, descending=first[-1:] < first[:1])

    faces = (0.5 * (x.double()[1:] + x.double()[:-1])).unsqueeze(1)
    p: Array = p0.double().cpu().numpy()
    densities = [p]
    for t, s in pairwise(times):
        steps = math.ceil(abs(s - t) / dt * (1 - 1e-12))
        step = (s - t) / steps
        for k in range(steps):
            middle = t + (k + 0.5) * step
            velocity, diffusion = _coefficients(drift, rho2, faces, middle)
            p = _implicit_step(p, math.copysign(1.0, step) * velocity, diffusion, h, abs(step))
        densities.append(p)
    return torch.from_numpy(np.stack(densities)).to(p0)


@torch.no_grad()
def _coefficients(
    drift: Callable[[Tensor, float], Tensor], rho2: Callable[[float], float], faces: Tensor, t: float
) -> tuple[Array, float]:
    """The drift at the faces and D = rho^2 / 2 at time t."""
    velocity, noise = drift(faces, t), float(rho2(t))
    if velocity.shape != faces.shape or not bool(velocity.isfinite().all()):
        raise ValueError(
            f"drift must give finite values of the shape of its x, {tuple(faces.shape)}; got "
            f"{tuple(velocity.shape)}, {int((~velocity.isfinite()).sum())} nan or inf at t = {t!r}"
        )
    if not 0 <= noise < math.inf:
        raise ValueError(f"rho2 must be a finite number of at least 0; got {noise!r} at t = {t!r}")
    return velocity.squeeze(1).double().cpu().numpy(), 0.5 * noise


def _implicit_step(p: Array, a: Array, D: float, h: float, dt: float) -> Array:
    """One implicit Euler step of d_t p = -d_x F, where cell i hands F = right p_i - left p_{i+1} to i + 1.

    With D constant, F = a p - D p' is the same all the way between two centres if right, left are max(+-a, 0)
    + (D / h) w / (e^w - 1), w = |a| h / D: central where diffusion rules, upwind as D -> 0, never negative.
    The matrix then has a positive diagonal, no other positive entry, and columns that sum to 1 (here h / dt):
    its inverse has no negative entry, so densities stay positive, and it keeps sums, so mass is kept.
    """
    mixing = D / h / exprel(np.abs(a) * h / max(D, 1e-300))
    right, left = np.maximum(a, 0) + mixing, np.maximum(-a, 0) + mixing
    bands = np.zeros((3, len(p)))  # above, on and below the diagonal
    bands[0, 1:], bands[1], bands[2, :-1] = -left, h / dt, -right
    bands[1, :-1] += right
    bands[1, 1:] += left
    solution: Array = solve_banded((1, 1), bands, p * (h / dt), overwrite_ab=True, check_finite=False)
    return solution
