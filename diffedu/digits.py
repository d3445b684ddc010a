"""The network that draws MNIST's digits: recipe, training, shipped file."""

import contextlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffedu import mnist_files, weights
from diffedu.checks import require_count
from diffedu.data import mnist
from diffedu.denoiser import NetDenoiser
from diffedu.multistep import DPMSolverPP2M
from diffedu.networks import Labelled, UNet
from diffedu.objectives import dsm_loss
from diffedu.runlog import RunLog
from diffedu.sampling import prior, sample
from diffedu.schedules import Cosine
from diffedu.training import Loss, Recipe, fit

if TYPE_CHECKING:
    from accelerate import Accelerator

CLASSES, SIDE = 10, 28


def to_floats(images: Tensor) -> Tensor:
    """Images of 0 ... 255, (n, 28, 28) uint8, as floats in [-1, 1], (n, 1, 28, 28).

    Raises ValueError for another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"images must be uint8 of shape (n, {SIDE}, {SIDE}); got {images.dtype}, {tuple(images.shape)}"
        )
    return images.unsqueeze(1).float() / 127.5 - 1


def half_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Networks in bfloat16 where the processor multiplies it, else as they are."""
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
        able = device.type == "cpu" and (known.get("amx_bf16", False) or known.get("avx512_bf16", False))
    return torch.autocast(device.type, torch.bfloat16) if able else contextlib.nullcontext()


@dataclass(frozen=True)
class DigitModel:
    """A v-prediction U-Net for digits and all that its training depends on besides the seed.

    A share `unknown` of the training images comes without its label, so that one network learns the law of
    each class and that of all digits (Ho & Salimans 2022).
    """

    name: str
    recipe: Recipe
    batch: int = 64
    unknown: float = 0.3
    schedule: Cosine = field(default_factory=Cosine)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return f"the U-Net on MNIST's digits: {self.images:,} images in batches of {self.batch}"

    @property
    def images(self) -> int:
        """The budget: how many images the training sees."""
        return self.recipe.steps * self.batch

    def with_budget(self, images: int) -> "DigitModel":
        """The same for another number of images, rounded up to whole batches; the warmup keeps its share.

        Raises ValueError for a number below 1.
        """
        steps = math.ceil(require_count("images", images) / self.batch)
        warmup = round(self.recipe.warmup * steps / self.recipe.steps)
        return replace(self, recipe=replace(self.recipe, steps=steps, warmup=min(warmup, steps - 1)))

    def untrained(self, seed: int) -> UNet:
        """The network before training; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
            return UNet(classes=CLASSES)

    def denoiser(self, net: nn.Module, labels: Tensor | None = None) -> NetDenoiser:
        """The network read as a v-prediction: of digits of these classes, labels (B,), or of any digits."""
        return NetDenoiser(net if labels is None else Labelled(net, labels), self.schedule, "v")

    def loss(self, images: Tensor, labels: Tensor, part: tuple[int, int] = (0, 1)) -> Loss:
        """What `fit` minimises: denoising score matching in v, mean over pixels, (batch,).

        images (n, 28, 28) uint8, labels (n,). The times are stratified: one in each of `batch` equal parts of
        [t_min, t_max]. Of the whole batch only part i of k, `part` = (i, k), goes through the network, for
        training by k processes. Raises ValueError where k does not divide the batch.
        """
        (index, count), low, high = part, self.schedule.t_min, self.schedule.t_max
        if self.batch % count:
            raise ValueError(f"the batch must be a multiple of the {count} processes; got {self.batch}")

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            n, device = self.batch, images.device
            rows = torch.randint(len(images), (n,), generator=generator, device=device)
            u = torch.rand(n, generator=generator, device=device)
            t = low + (high - low) * (torch.arange(n, device=device) + u) / n
            hidden = torch.rand(n, generator=generator, device=device) < self.unknown
            eps = torch.randn(n, 1, SIDE, SIDE, generator=generator, device=device)
            x0, y = to_floats(images[rows]), labels[rows].masked_fill(hidden, CLASSES)
            x0, y, t, eps = (a[index::count] for a in (x0, y, t, eps))
            with half_precision(device):
                error = dsm_loss(self.denoiser(net, y), x0, t, eps, weight="v")
            return error / x0[0].numel()

        return values

    def train(
        self,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        checkpoint: str | Path | None = None,
        every: int = 250,
        progress: bool = True,
        root: str | Path | None = None,
        subset: bool = False,
        log: str | Path | None = None,
        accelerator: "Accelerator | None" = None,
    ) -> "Trained":
        """Train from the seed on all of MNIST, `root` as in `data.mnist`, or on the shipped subset.

        `checkpoint`, `every`, `progress` and `accelerator` as in `fit`; `log`: a file for `RunLog`.
        """
        device = torch.device(device)
        images, labels = mnist_files.subset("train") if subset else mnist("train", root, full=True)
        images, labels = images.to(device), labels.long().to(device)
        part = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        data_digest = weights.digest({"images": images, "labels": labels})
        made = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "recipe"}
        fitted = fit(
            self.untrained(seed).to(device),
            self.loss(images, labels, part),
            self.recipe,
            torch.Generator(device).manual_seed(seed),
            checkpoint=checkpoint,
            every=every,
            progress=progress,
            batch=self.batch,
            made=made | {"seed": str(seed), "data_digest": data_digest},
            watch=None if log is None else RunLog(log, self.batch, self.recipe.lr_at, self.examples),
            accelerator=accelerator,
        )
        return Trained(fitted.net, data_digest, subset)

    def examples(self, net: nn.Module) -> Tensor:
        """Five digits of each class in 10 steps, (50, 1, 28, 28), the same noise each time."""
        device = next(net.parameters()).device
        labels = torch.arange(CLASSES, device=device).repeat_interleave(5)
        start = prior(self.schedule, (len(labels), 1, SIDE, SIDE), torch.Generator(device).manual_seed(0))
        return sample(self.denoiser(net, labels), DPMSolverPP2M(), start, self.schedule.grid(10))

    def save(self, path: str | Path, trained: "Trained", seed: int) -> list[Path]:
        """Write the network, its numbers rounded to float16, with all that made it.

        Command, recipe, schedule, seed, revision, digests of data and tensors. Returns the files written.
        """
        tensors = {name: value.half() for name, value in trained.net.state_dict().items()}
        recipe = asdict(self.recipe) | {"batch": self.batch, "unknown": self.unknown}
        metadata = {
            "command": f"python -m diffedu.train {self.name} --seed {seed} --images {self.images} "
            f"--batch {self.batch} --lr {self.recipe.lr} --ema {self.recipe.ema}"
            + (" --subset" if trained.subset else ""),
            "recipe": json.dumps(recipe),
            "schedule": repr(self.schedule),
            "seed": str(seed),
            "data_digest": trained.data_digest,
            "digest": weights.digest(tensors),
            "revision": weights.revision(),
            "torch": torch.__version__,
        }
        weights.write(path, tensors, metadata)
        return [Path(path)]

    def load(self) -> UNet:
        """The network that comes with the package, float32 on the CPU, in evaluation mode."""
        net = self.untrained(0)
        net.load_state_dict(weights.shipped(self.name)[0])
        return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Trained:
    """A trained network, the digest of the data that trained it, and whether they are the shipped subset."""

    net: nn.Module
    data_digest: str
    subset: bool = False


MNIST = DigitModel("mnist", Recipe(steps=6500, lr=1.5e-3, ema=0.999, beta2=0.99, warmup=200))
