"""Two-dimensional toy data with the laws behind them, mixtures with an exact score; the digits of MNIST."""

import math
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import make_swiss_roll
from torch import Tensor

from diffedu import mnist_files
from diffedu.checks import require_count
from diffedu.mixtures import GaussianMixture

ROLL_NOISE, ROLL_SCALE = 0.5, 7.0
MOONS_NOISE, MOONS_CENTRE, MOONS_SCALE = 0.06, (0.5, 0.25), 1.45
RING_RADIUS, RING_STD, RING_COMPONENTS = 1.4, 0.1, 8


def swiss_roll(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points of the swiss roll, (n, 2) float32: scikit-learn's, noise 0.5, columns 0 and 2, over 7."""
    require_count("n", n)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    points, _ = make_swiss_roll(n, noise=ROLL_NOISE, random_state=seed)
    return torch.from_numpy(points[:, [0, 2]] / ROLL_SCALE).float()


def swiss_roll_law(nodes: int = 400) -> GaussianMixture:
    """The law of `swiss_roll` as a float64 mixture with a score.

    Its centres are Gauss-Legendre nodes along the curve: the integral over the curve, by quadrature. From
    400 to 800 nodes the log-density changes by less than 1e-9 wherever the data lie (see the tests).
    """
    u, w = np.polynomial.legendre.leggauss(require_count("nodes", nodes))
    angle = 1.5 * math.pi * (1 + (u + 1))  # scikit-learn's 1.5 pi (1 + 2 U), U uniform on [0, 1]
    curve = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1)
    return _isotropic(curve / ROLL_SCALE, w / 2, ROLL_NOISE / ROLL_SCALE)


def moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points of two half moons, (n, 2) float32: uniform angles on the half circles, noise 0.06, scaled."""
    require_count("n", n)
    angle = math.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    points = _half_circle(angle, lower) + MOONS_NOISE * torch.randn(n, 2, generator=generator)
    return (points - torch.tensor(MOONS_CENTRE)) * MOONS_SCALE


def moons_law(nodes: int = 200) -> GaussianMixture:
    """The law of `moons` as a float64 mixture with a score, `nodes` Gauss-Legendre nodes a half circle."""
    u, w = np.polynomial.legendre.leggauss(require_count("nodes", nodes))
    angle = torch.from_numpy(math.pi * (u + 1) / 2).repeat(2)
    lower = torch.arange(2 * nodes) >= nodes
    centres = (_half_circle(angle, lower) - torch.tensor(MOONS_CENTRE)) * MOONS_SCALE
    return _isotropic(centres.numpy(), np.tile(w / 4, 2), MOONS_NOISE * MOONS_SCALE)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points uniform on the eight dark squares of a 4 x 4 board over [-2, 2]^2, (n, 2) float32."""
    require_count("n", n)
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    corner = torch.stack([column, row], dim=1) - 2
    return corner + torch.rand(n, 2, generator=generator)


def ring(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points of eight Gaussians on a circle of radius 1.4, standard deviation 0.1, (n, 2) float32."""
    return ring_law().sample(n, generator).float()


def ring_law() -> GaussianMixture:
    """The law of `ring`, a float64 mixture of eight equal components."""
    angle = 2 * math.pi * np.arange(RING_COMPONENTS) / RING_COMPONENTS
    centres = RING_RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _isotropic(centres, np.full(RING_COMPONENTS, 1 / RING_COMPONENTS), RING_STD)


def mnist(split: str, root: str | Path | None = None, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """The handwritten digits of MNIST: images (n, 28, 28) uint8, 0 to 255, and labels (n,) int64, 0 to 9.

    split: "train", 60,000, or "test", 10,000, in the order of the original files. They come from the first
    of these: `root` or else the environment variable DIFFEDU_DATA, a folder of the original IDX files, plain
    or compressed by gzip, in it or in the MNIST/raw that torchvision makes; the cache, filled from public
    mirrors the first time. Only where no mirror answers, they are the 8,000 or 2,000 that the package ships
    (see `mnist_files.subset`), which one line on stderr says; full=True makes that an error and asks the
    mirrors anew. Every source is checked by its SHA-256.

    Raises ValueError for another split, for a file of that folder that is missing, damaged or not MNIST's,
    and with full=True where the digits are neither in the cache nor to be had.
    """
    images, labels = mnist_files.arrays(split, root, full=full)
    return images, labels.long()


def _half_circle(angle: Tensor, lower: Tensor) -> Tensor:
    upper_moon = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    return torch.where(lower.unsqueeze(1), lower_moon, upper_moon)


def _isotropic(centres: np.ndarray, weights: np.ndarray, std: float) -> GaussianMixture:
    means, w = torch.from_numpy(centres), torch.from_numpy(weights)
    covs = std**2 * torch.eye(2, dtype=torch.float64).expand(len(means), 2, 2)
    return GaussianMixture(w / w.sum(), means, covs.contiguous())
