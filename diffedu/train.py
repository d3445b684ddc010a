"""The command `python -m diffedu.train`: trains a network of the book and writes its file."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from diffedu.checks import require_count
from diffedu.classifier import CLASSIFIER
from diffedu.consistency_students import (
    MOONS_CONSISTENCY,
    MOONS_CONSISTENCY_TRAINED,
    SWISS_ROLL_CONSISTENCY,
    SWISS_ROLL_CONSISTENCY_TRAINED,
)
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digit_training import DigitTraining
from diffedu.digits import MNIST
from diffedu.students import MOONS_DISTILLED, SWISS_ROLL_DISTILLED
from diffedu.teachers import MOONS, SWISS_ROLL
from diffedu.training import Restarted
from diffedu.weights import read


class Network(Protocol):
    """What the command trains: a teacher, or a student of one."""

    @property
    def name(self) -> str:
        """The command's name for it."""

    @property
    def summary(self) -> str:
        """What it is, in a line."""

    def train(self, seed: int, *, device: torch.device, checkpoint: Path | None) -> Any:
        """The network trained from the seed."""

    def save(self, path: Path, trained: Any, seed: int) -> list[Path]:
        """Write what `train` gave; the files written."""


def networks() -> list[Network]:
    """All that the command can train."""
    return [
        SWISS_ROLL,
        MOONS,
        SWISS_ROLL_DISTILLED,
        MOONS_DISTILLED,
        SWISS_ROLL_CONSISTENCY,
        MOONS_CONSISTENCY,
        SWISS_ROLL_CONSISTENCY_TRAINED,
        MOONS_CONSISTENCY_TRAINED,
        MNIST,
        MNIST_DISTILLED,
        MNIST_CONSISTENCY,
        CLASSIFIER,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffedu.train",
        description="Train a network of the book and write it, with all that made it, to a safetensors file.",
        epilog="The files that come with the package: --seed 0 --out diffedu/pretrained/NAME.safetensors. "
        "On several GPUs or machines: accelerate launch -m diffedu.train mnist",
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for network in networks():
        command = commands.add_parser(network.name, help=network.summary, description=network.summary)
        command.set_defaults(network=network)
        command.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default 0)")
        command.add_argument(
            "--out",
            type=Path,
            default=Path(f"{network.name}.safetensors"),
            help=f"the file to write (default {network.name}.safetensors, here)",
        )
        command.add_argument(
            "--checkpoint",
            type=Path,
            help="a file to save the run's state in, and to go on from if it exists",
        )
        command.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
        if isinstance(network, DigitTraining):
            add_digit_options(command, network)
    options = vars(parser.parse_args(arguments))
    try:
        network = options.pop("network")
        if isinstance(network, DigitTraining):
            network = sized(network, options)
        train(network, **options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def add_digit_options(command: argparse.ArgumentParser, training: DigitTraining) -> None:
    """The options of a training of digits."""
    restarts = [r.restart for r in training.stages.values() if isinstance(r, Restarted)]
    again = "".join(
        f" With that budget and that batch it does so twice, the second time from image "
        f"{n * training.batch:,} on; any other budget or batch has one such cycle."
        for n in restarts
    )
    command.description = (
        f"Trains {training.summary}, by default. The learning rate rises at the start, then falls as a "
        f"cosine.{again} The average of the weights is what is written. After an interruption the same "
        "command with the same --checkpoint goes on where it stood."
    )
    command.add_argument(
        "--images",
        type=int,
        default=training.images,
        help=f"the budget: how many images the training sees, repetitions counted ({training.images})",
    )
    command.add_argument(
        "--batch", type=int, default=training.batch, help=f"images a step ({training.batch})"
    )
    if len(training.stages) == 1:
        (recipe,) = training.stages.values()
        command.add_argument(
            "--lr", type=float, default=recipe.lr, help=f"Adam's learning rate ({recipe.lr:g})"
        )
        command.add_argument(
            "--ema", type=float, default=recipe.ema, help=f"decay of the weights' average ({recipe.ema:g})"
        )
    command.add_argument(
        "--every", type=int, default=250, help="steps between two checkpoints and two lines of the log (250)"
    )
    command.add_argument("--log", type=Path, help="a file for a line of JSON now and then, samples beside it")
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--root",
        type=Path,
        help="the folder of MNIST's original files (default: DIFFEDU_DATA, else they are downloaded once)",
    )
    source.add_argument(
        "--subset", action="store_true", help="train on the few digits that come with the package, offline"
    )


def sized(training: DigitTraining, options: dict[str, Any]) -> DigitTraining:
    """The training with what the options say of its recipes, which are taken out of them."""
    stages, changes = training.stages, {name: options.pop(name) for name in ("lr", "ema") if name in options}
    training = training.with_stages({key: replace(recipe, **changes) for key, recipe in stages.items()})
    batch = require_count("--batch", options.pop("batch"))
    return replace(training, batch=batch).with_budget(options.pop("images"))


def train(
    network: Network,
    seed: int,
    out: Path,
    checkpoint: Path | None,
    device: str | None,
    **options: Any,
) -> None:
    """Train a network and write its file, or files; prints what was written.

    Raises ValueError for an absent device and an `out` that is no safetensors file.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors; got {out}")
    for file in filter(None, (out, checkpoint, options.get("log"))):
        require_writable(file.parent)
    place = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        options["accelerator"] = accelerator = processes(network, place)
        place = accelerator.device
    start = time.process_time()
    run: Callable[..., Any] = network.train
    trained = run(seed, device=place, checkpoint=checkpoint, **options)
    seconds = time.process_time() - start
    if "accelerator" in options and not options["accelerator"].is_main_process:
        return
    for file in network.save(out, trained, seed):
        digest = read(file)[1]["digest"][:16]
        print(f"{file}: {network.name}, seed {seed}, {seconds:.0f} CPU s, digest {digest}")


def processes(network: Network, device: torch.device) -> Any:
    """The accelerator of one among several processes. Raises ValueError for a network that one trains."""
    if not isinstance(network, DigitTraining):
        raise ValueError(
            f"{network.name} is trained by one process; got WORLD_SIZE={os.environ['WORLD_SIZE']}"
        )
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("several processes need Hugging Face accelerate: pip install accelerate") from error
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def require_writable(folder: Path) -> None:
    """Make the folder, and find out before the training whether it can be written to: OSError where not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best available for None. Raises ValueError for one that is absent."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that this machine has; got {name!r} ({reason})") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
