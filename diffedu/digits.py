"""The network that draws MNIST's digits: recipe, training, shipped file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from diffedu import weights
from diffedu.denoiser import NetDenoiser
from diffedu.digit_training import CLASSES, SIDE, DigitTraining, Draw, half_precision, to_floats
from diffedu.multistep import DPMSolverPP2M
from diffedu.networks import Labelled, UNet
from diffedu.objectives import dsm_loss
from diffedu.sampling import prior, sample
from diffedu.schedules import Cosine
from diffedu.training import Loss, Recipe, Restarted

__all__ = ["CLASSES", "MNIST", "SIDE", "DigitModel", "half_precision", "to_floats"]


@dataclass(frozen=True)
class DigitModel(DigitTraining):
    """A v-prediction U-Net for digits and all that its training depends on besides the seed.

    A share `unknown` of the training images comes without its label, so that one network learns the law of
    each class and that of all digits (Ho & Salimans 2022).
    """

    recipe: Recipe
    schedule: Cosine = field(default_factory=Cosine)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return f"the U-Net on MNIST's digits: {self.images:,} images in batches of {self.batch}"

    @property
    def stages(self) -> Mapping[int | None, Recipe]:
        """One."""
        return {None: self.recipe}

    def with_stages(self, stages: Mapping[int | None, Recipe]) -> Self:
        """The same with another recipe."""
        return replace(self, recipe=stages[None])

    def origin(self) -> dict[str, str]:
        """The noise schedule."""
        return {"schedule": repr(self.schedule)}

    def untrained(self, seed: int) -> UNet:
        """The network before training; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
            return UNet(classes=CLASSES)

    def start(self, seed: int) -> nn.Module:
        """The untrained network."""
        return self.untrained(seed)

    def denoiser(self, net: nn.Module, labels: Tensor | None = None) -> NetDenoiser:
        """The network read as a v-prediction: of digits of these classes, labels (B,), or of any digits."""
        return NetDenoiser(net if labels is None else Labelled(net, labels), self.schedule, "v")

    def loss(self, images: Tensor, labels: Tensor, part: tuple[int, int] = (0, 1)) -> Loss:
        """What `fit` minimises on images (n, 28, 28) uint8 and labels (n,), `part` as in `batches`."""
        return self.stage_loss(None, nn.Identity(), self.batches(images, labels, part))

    def stage_loss(self, key: int | None, before: nn.Module, draw: Draw) -> Loss:
        """Denoising score matching in v, mean over pixels, (batch,); times evenly from [t_min, t_max]."""
        low, high = self.schedule.t_min, self.schedule.t_max

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            x0, labels, eps, u = draw(generator)
            t = low + (high - low) * u
            with half_precision(x0.device):
                error = dsm_loss(self.denoiser(net, labels), x0, t, eps, weight="v")
            return error / x0[0].numel()

        return values

    def examples(self, net: nn.Module, key: int | None = None) -> Tensor:
        """Five digits of each class in 10 steps, (50, 1, 28, 28), the same noise each time."""
        start, labels = self.example_starts(net)
        return sample(self.denoiser(net, labels), DPMSolverPP2M(), start, self.schedule.grid(10))

    def example_starts(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """Noise (50, 1, 28, 28), the same each time, and five labels of each class, where the network is."""
        device = next(net.parameters()).device
        labels = torch.arange(CLASSES, device=device).repeat_interleave(5)
        return prior(
            self.schedule, (len(labels), 1, SIDE, SIDE), torch.Generator(device).manual_seed(0)
        ), labels

    def load(self) -> UNet:
        """The network that comes with the package, float32 on the CPU, in evaluation mode."""
        return self.shipped(self.name)

    def shipped(self, name: str) -> UNet:
        """A network of this shape that comes with the package, float32 on the CPU, in evaluation mode."""
        net = self.untrained(0)
        net.load_state_dict(weights.shipped(name)[0])
        return net.eval().requires_grad_(False)


_RECIPE = Restarted(steps=15_000, lr=1.5e-3, ema=0.999, beta2=0.99, warmup=200, restart=6500)
MNIST = DigitModel("mnist", _RECIPE, unknown=0.3)
