"""Networks that read a noisy sample and its noise level."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffedu.checks import require_count

LAM_LIMIT = 10.0  # log-SNR is clipped to [-20, 20], as in Salimans & Ho 2022


class FourierEmbedding(nn.Module):
    """Sines and cosines of lam at `dim / 2` fixed frequencies: lam (B,) -> (B, dim).

    The wavelengths fall geometrically from 8 to 1/10 of the range [-10, 10], to which lam is clipped.
    Raises ValueError for an odd dim. Source: Tancik et al. 2020; the fixed ladder, Vaswani et al. 2017.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if require_count("dim", dim) % 2:
            raise ValueError(f"dim must be even; got {dim}")
        wavelengths = torch.logspace(math.log2(8.0), math.log2(0.1), dim // 2, base=2.0)
        frequencies = 2 * math.pi / (2 * LAM_LIMIT * wavelengths)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, lam: Tensor) -> Tensor:
        """The features of lam (B,): (B, dim)."""
        angle = lam.clamp(-LAM_LIMIT, LAM_LIMIT).unsqueeze(-1) * self.get_buffer("frequencies")
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class MLP(nn.Module):
    """A multilayer perceptron on [x, embedding of lam]: x (B, D), lam (B,) -> (B, D).

    `depth` hidden layers of `width` units with SiLU. Raises ValueError for sizes below 1.
    """

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3, embedding: int = 32) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("width", width), ("depth", depth)):
            require_count(name, size)
        self.embed = FourierEmbedding(embedding)
        layers: list[nn.Module] = []
        sizes = [dim + embedding, *[width] * depth]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """The output at x (B, D) and lam (B,): (B, D)."""
        output: Tensor = self.layers(torch.cat([x, self.embed(lam)], dim=-1))
        return output
