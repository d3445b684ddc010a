"""Distances between samples, and the order of a method from its errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffedu.checks import require_count

DIRECTIONS, DIRECTION_SEED = 128, 0


def _check_sample(name: str, value: Tensor) -> None:
    if value.ndim != 2 or len(value) < 2 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be floats of shape (n, D), n >= 2; got {tuple(value.shape)}, {value.dtype}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite; got {int((~value.isfinite()).sum())} nan or inf")


def _check_pair(x: Tensor, y: Tensor, equal: bool = False) -> None:
    _check_sample("x", x)
    _check_sample("y", y)
    if x.shape[1] != y.shape[1] or (equal and len(x) != len(y)):
        raise ValueError(
            f"x and y must have the same {'shape' if equal else 'D'}; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )


def _directions(x: Tensor) -> Tensor:
    """(D, 128) unit vectors: equispaced over the half circle in 2D, from a fixed seed beyond."""
    if x.shape[1] == 1:
        return torch.ones(1, 1).to(x)
    if x.shape[1] == 2:
        angle = torch.arange(DIRECTIONS, dtype=torch.float64) * (math.pi / DIRECTIONS)
        return torch.stack([angle.cos(), angle.sin()]).to(x)
    g = torch.Generator().manual_seed(DIRECTION_SEED)
    v = torch.randn(x.shape[1], DIRECTIONS, generator=g, dtype=torch.float64)
    unit: Tensor = v / v.norm(dim=0)
    return unit.to(x)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j| in float64, (n, m), from differences: the product form loses half of the digits."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def sliced_w2(x: Tensor, y: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two samples of equal size, x and y (n, D).

    The root of the mean over 128 directions of the squared 1D distance (Bonneel et al. 2015); in 2D the
    directions are equispaced, beyond they come from a fixed seed. Raises ValueError for unequal sizes.
    """
    _check_pair(x, y, equal=True)
    directions = _directions(x)
    gaps = _sorted_rows((x @ directions).mT) - _sorted_rows((y @ directions).mT)
    return math.sqrt(float(gaps.square().mean()))


def _sorted_rows(values: Tensor) -> Tensor:
    """Each row in ascending order; on the CPU by NumPy, whose sort is several times as fast as torch's."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.detach().contiguous().numpy(), axis=1))


def sliced_energy(x: Tensor, y: Tensor) -> float:
    """Root of the sliced energy distance, mean over 128 directions of 2 int (F - G)^2, x (n, D), y (m, D).

    In one dimension it is the energy distance of Székely & Rizzo 2013.
    """
    _check_pair(x, y)
    directions = _directions(x)
    a, b = (x @ directions).mT.contiguous(), (y @ directions).mT.contiguous()
    values, order = torch.cat([a, b], dim=1).sort(dim=1)
    jump = torch.cat([a.new_full((len(x),), 1 / len(x)), a.new_full((len(y),), -1 / len(y))])
    gap = jump[order].cumsum(dim=1)[:, :-1]  # F - G between neighbouring values
    return math.sqrt(float(2 * (gap.square() * values.diff(dim=1)).sum(dim=1).mean()))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Squared energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| (Székely & Rizzo 2013), x (n, D), y (m, D).

    The V-statistic, so that it is never negative and 0 for x = y. In float64; memory n m numbers.
    """
    _check_pair(x, y)
    return float(2 * _distances(x, y).mean() - _distances(x, x).mean() - _distances(y, y).mean())


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Unbiased squared maximum mean discrepancy, kernel exp(-|x-y|^2 / (2 bandwidth^2)).

    x (n, D), y (m, D). Source: Gretton et al. 2012, eq. 3. Raises ValueError unless bandwidth > 0.
    """
    _check_pair(x, y)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive; got {bandwidth!r}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-_distances(a, b).square() / (2 * bandwidth**2))

    n, m = len(x), len(y)
    within_x = (kernel(x, x).sum() - n) / (n * (n - 1))
    within_y = (kernel(y, y).sum() - m) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel(x, y).mean())


@dataclass(frozen=True)
class Moments:
    """What the Fréchet distance knows of a sample of n: its mean (D,) and covariance (D, D), in float64.

    Raises ValueError for other shapes, for what is not finite, and for a covariance that is not symmetric.
    """

    mean: Tensor
    cov: Tensor
    n: int

    def __post_init__(self) -> None:
        require_count("n", self.n, 2)
        mean, cov = self.mean, self.cov
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and cov must be of shape (D,) and (D, D); got {tuple(mean.shape)}, {tuple(cov.shape)}"
            )
        for name, value in (("mean", mean), ("cov", cov)):
            if value.dtype != torch.float64 or not bool(torch.isfinite(value).all()):
                bad = int((~value.isfinite()).sum())
                raise ValueError(f"{name} must be finite and float64; got {value.dtype}, {bad} nan or inf")
        if not torch.allclose(cov, cov.mT, rtol=1e-9, atol=1e-12 * float(cov.abs().max())):
            raise ValueError(f"cov must be symmetric; got one that differs by {(cov - cov.mT).abs().max()}")


def moments(x: Tensor) -> Moments:
    """The mean and the unbiased covariance of a sample x (n, D), n >= 2."""
    return _moments("x", x)


def _moments(name: str, x: Tensor) -> Moments:
    _check_sample(name, x)
    x = x.double()
    return Moments(x.mean(0), torch.cov(x.mT).reshape(x.shape[1], -1), len(x))


def frechet_distance(x: Tensor | Moments, y: Tensor | Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to x and y, samples (n, D) or their moments.

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Dowson & Landau 1982), in float64. Two samples of one
    law lie apart by about 1/n_x + 1/n_y times a constant: compare only values of equal numbers of samples.
    """
    a = x if isinstance(x, Moments) else _moments("x", x)
    b = y if isinstance(y, Moments) else _moments("y", y)
    if len(a.mean) != len(b.mean):
        shapes = ((m.n, len(m.mean)) for m in (a, b))
        raise ValueError("x and y must have the same D; got {} and {}".format(*shapes))
    values, axes = torch.linalg.eigh(a.cov)
    root = axes * values.clamp(min=0).sqrt() @ axes.mT
    root_trace = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    mean_part = (a.mean - b.mean).square().sum()
    return float(mean_part + a.cov.trace() + b.cov.trace() - 2 * root_trace)


def empirical_order(h: Sequence[float] | Tensor, err: Sequence[float] | Tensor) -> float:
    """Slope of log err on log h by least squares: the order that a convergence study shows.

    h, err: equally many positive numbers, at least two. Raises ValueError otherwise.
    """
    a = torch.as_tensor(h, dtype=torch.float64)
    b = torch.as_tensor(err, dtype=torch.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"h and err must be equally many, two or more; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not bool((a > 0).all() and (b > 0).all() and torch.isfinite(a + b).all()):
        raise ValueError(f"h and err must be positive; got {a.tolist()} and {b.tolist()}")
    u, v = a.log() - a.log().mean(), b.log() - b.log().mean()
    if not bool(u.square().sum() > 0):
        raise ValueError(f"h must take two different values or more; got {a.tolist()}")
    return float((u * v).sum() / u.square().sum())
