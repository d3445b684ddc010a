"""Networks that read a noisy sample and its noise level."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffedu.checks import require_count

GROUPS = 8  # of a group norm
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


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity; the condition scales and shifts between them.

    x (B, C, H, W), condition (B, `condition`) -> (B, C, H, W). The last convolution's weights start at 0: the
    block starts as the identity plus a constant for each channel.
    Source: He et al. 2016; the scale and shift, Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The block's output at x (B, C, H, W) and the condition (B, `condition`)."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = nn.functional.silu(self.norm2(h) * (1 + scale) + shift)
        output: Tensor = x + self.conv2(h)
        return output


class UNet(nn.Module):
    """A U-Net on images whose sides are multiples of 4 pixels, told the noise level and, if known, the class.

    x (B, `channels`, H, W), lam (B,), labels (B,) in 0 ... `classes` -> (B, `channels`, H, W). The label
    `classes`, and no labels at all, stand for an unknown class. A stem of 2 x 2 patches, `blocks[0]` residual
    blocks of `widths[0]` channels at half of the resolution, then `blocks[1]` of `widths[1]` at a quarter,
    `middle` more, and the same back up, where each level's outputs are added again.
    Raises ValueError for other sides. Source: Ronneberger et al. 2015; for diffusion, Ho et al. 2020.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        widths: tuple[int, int] = (64, 128),
        blocks: tuple[int, int] = (1, 2),
        middle: int = 1,
        condition: int = 128,
    ) -> None:
        super().__init__()
        (fine, coarse), (n_fine, n_coarse) = widths, blocks

        def stack(n: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(width, condition) for _ in range(n))

        self.embed = FourierEmbedding(32)
        self.level = nn.Sequential(nn.Linear(32, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.label = nn.Embedding(classes + 1, condition)
        self.stem = nn.Conv2d(channels, fine, 2, stride=2)
        self.fine_in = stack(n_fine, fine)
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse_in = stack(n_coarse, coarse)
        self.middle = stack(middle, coarse)
        self.coarse_out = stack(n_coarse, coarse)
        self.up = nn.Conv2d(coarse, fine, 1)
        self.fine_out = stack(n_fine, fine)
        self.norm = nn.GroupNorm(GROUPS, fine)
        self.head = nn.Conv2d(fine, 4 * channels, 3, padding=1)
        # a quarter faster on a CPU
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, lam: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output at x (B, C, H, W), lam (B,) and labels (B,): (B, C, H, W), in the dtype of x."""
        if x.ndim != 4 or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"x must be of shape (B, C, H, W), H and W multiples of 4; got {tuple(x.shape)}")
        known = self.label.weight[-1] if labels is None else self.label(labels)
        condition = nn.functional.silu(self.level(self.embed(lam)) + known)
        h, kept = self.stem(x), []
        for block in self.fine_in:
            kept.append(h := block(h, condition))
        h = self.down(h)
        for block in self.coarse_in:
            kept.append(h := block(h, condition))
        for block in self.middle:
            h = block(h, condition)
        for block in self.coarse_out:
            h = block(h + kept.pop(), condition)
        h = nn.functional.interpolate(self.up(h), scale_factor=2)
        for block in self.fine_out:
            h = block(h + kept.pop(), condition)
        h = self.head(nn.functional.silu(self.norm(h)))
        return nn.functional.pixel_shuffle(h, 2).to(x.dtype)


class Labelled(nn.Module):
    """A network with its labels (B,) filled in: x (B, *), lam (B,) -> (B, *), for `NetDenoiser`.

    Raises ValueError for a batch of another size.
    """

    def __init__(self, net: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """The network's output at x (B, *), lam (B,) and the labels."""
        if len(self.labels) != len(x):
            raise ValueError(f"x must have a row for each of the {len(self.labels)} labels; got {len(x)}")
        output: Tensor = self.net(x, lam, self.labels)
        return output
