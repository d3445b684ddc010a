"""What the trainings of the digits' networks share: data, batches, budget, stages, files."""

import contextlib
import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from diffedu import mnist_files, weights
from diffedu.checks import require_count
from diffedu.data import mnist
from diffedu.runlog import RunLog
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


class Batch(NamedTuple):
    """Digits x0 (b, 1, 28, 28), labels (b,), noise of the shape of x0, and places u (b,) in [0, 1)."""

    x0: Tensor
    labels: Tensor
    eps: Tensor
    u: Tensor


Draw = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class DigitTraining(ABC):
    """The training of a network of digits, or of one after another, each from the one before.

    A share `unknown` of the images comes without its label. `stages` has a recipe for each network; its key
    is what `weights.numbered` puts into the network's file name.
    """

    name: str
    _: KW_ONLY
    batch: int = 64
    unknown: float = 0.0

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it is, in a line."""

    @property
    @abstractmethod
    def stages(self) -> Mapping[int | None, Recipe]:
        """The recipe of each network, in the order of training."""

    @abstractmethod
    def with_stages(self, stages: Mapping[int | None, Recipe]) -> Self:
        """The same with other recipes."""

    @abstractmethod
    def start(self, seed: int) -> nn.Module:
        """The network before the first stage."""

    @abstractmethod
    def stage_loss(self, key: int | None, before: nn.Module, draw: Draw) -> Loss:
        """What the stage minimises; `before` is the network that it starts from, in evaluation mode."""

    @abstractmethod
    def examples(self, net: nn.Module, key: int | None = None) -> Tensor:
        """Five digits of each class by the stage's network, (50, 1, 28, 28), the same noise each time."""

    def finished(self, net: nn.Module) -> nn.Module:
        """The network as it is kept, without what only its training needed."""
        return net

    def details(self, key: int | None) -> dict[str, object]:
        """What the file tells of the stage's recipe besides the recipe itself."""
        return {}

    def origin(self) -> dict[str, str]:
        """What the file tells of where the network comes from."""
        return {}

    @property
    def images(self) -> int:
        """The budget: how many images the training sees."""
        return self.batch * sum(recipe.steps for recipe in self.stages.values())

    def with_budget(self, images: int) -> Self:
        """The same for another number of images, rounded up to whole batches; every stage keeps its share.

        Raises ValueError for a number below 1.
        """
        share = require_count("images", images) / self.images
        return self.with_stages({key: recipe.scaled(share) for key, recipe in self.stages.items()})

    def batches(self, images: Tensor, labels: Tensor, part: tuple[int, int] = (0, 1)) -> Draw:
        """Random batches of images (n, 28, 28) uint8 with labels (n,); unknown ones become `CLASSES`.

        The places are stratified: one in each of `batch` equal parts of [0, 1). Of the whole batch only part
        i of k, `part` = (i, k), is given, for training by k processes.
        Raises ValueError where k does not divide the batch.
        """
        index, count = part
        if self.batch % count:
            raise ValueError(f"the batch must be a multiple of the {count} processes; got {self.batch}")

        def draw(generator: torch.Generator) -> Batch:
            n, device = self.batch, images.device
            rows = torch.randint(len(images), (n,), generator=generator, device=device)
            u = torch.rand(n, generator=generator, device=device)
            hidden = torch.rand(n, generator=generator, device=device) < self.unknown
            eps = torch.randn(n, 1, SIDE, SIDE, generator=generator, device=device)
            x0, y = to_floats(images[rows]), labels[rows].masked_fill(hidden, CLASSES)
            u = (torch.arange(n, device=device) + u) / n
            return Batch(*(values[index::count] for values in (x0, y, eps, u)))

        return draw

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

        `checkpoint`, `every`, `progress` and `accelerator` as in `fit`; `log`: a file for `RunLog`. Each
        stage has its own checkpoint and log, numbered by its key.
        """
        device = torch.device(device)
        images, labels = mnist_files.subset("train") if subset else mnist("train", root, full=True)
        images, labels = images.to(device), labels.long().to(device)
        part = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        data_digest = weights.digest({"images": images, "labels": labels})
        made = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "recipe"}
        made |= self.origin() | {"seed": str(seed), "data_digest": data_digest}
        generator, draw = torch.Generator(device).manual_seed(seed), self.batches(images, labels, part)
        net, nets = self.start(seed).to(device), dict[int | None, nn.Module]()
        for key, recipe in self.stages.items():
            watch = None
            if log is not None:
                watch = RunLog(weights.numbered(log, key), self.batch, recipe.lr_at, self._pictures(key))
            before = copy.deepcopy(net).eval().requires_grad_(False)
            fitted = fit(
                net,
                self.stage_loss(key, before, draw),
                recipe,
                generator,
                checkpoint=None if checkpoint is None else weights.numbered(checkpoint, key),
                every=every,
                progress=progress,
                batch=self.batch,
                made=made,
                watch=watch,
                accelerator=accelerator,
            )
            nets[key] = self.finished(fitted.net)
            net = copy.deepcopy(nets[key]).requires_grad_(True)
        return Trained(nets, data_digest, subset)

    def _pictures(self, key: int | None) -> Callable[[nn.Module], Tensor]:
        return lambda net: self.examples(self.finished(net), key)

    def save(self, path: str | Path, trained: "Trained", seed: int) -> list[Path]:
        """Write the networks, their numbers rounded to float16, with all that made them.

        Command, recipe, seed, revision, digests of data and tensors. Returns the files written.
        """
        command = f"python -m diffedu.train {self.name} --seed {seed} --images {self.images}"
        command += f" --batch {self.batch}"
        if len(self.stages) == 1:
            (only,) = self.stages.values()
            command += f" --lr {only.lr} --ema {only.ema}"
        files = []
        for key, net in trained.nets.items():
            tensors = {name: value.half() for name, value in net.state_dict().items()}
            recipe = asdict(self.stages[key]) | {"batch": self.batch, "unknown": self.unknown}
            metadata = {
                "command": command + (" --subset" if trained.subset else ""),
                "recipe": json.dumps(recipe | self.details(key)),
                "seed": str(seed),
                "data_digest": trained.data_digest,
                "digest": weights.digest(tensors),
                "revision": weights.revision(),
                "torch": torch.__version__,
            }
            files.append(weights.numbered(path, key))
            weights.write(files[-1], tensors, metadata | self.origin())
        return files


@dataclass(frozen=True)
class Trained:
    """Trained networks by their stages, the digest of their data, whether these are the shipped subset."""

    nets: Mapping[int | None, nn.Module]
    data_digest: str
    subset: bool = False

    @property
    def net(self) -> nn.Module:
        """The last stage's network."""
        return list(self.nets.values())[-1]
