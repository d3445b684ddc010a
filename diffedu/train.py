"""The command `python -m diffedu.train`: trains a network of the book and writes its file."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from diffedu.consistency_students import (
    MOONS_CONSISTENCY,
    MOONS_CONSISTENCY_TRAINED,
    SWISS_ROLL_CONSISTENCY,
    SWISS_ROLL_CONSISTENCY_TRAINED,
)
from diffedu.students import MOONS_DISTILLED, SWISS_ROLL_DISTILLED
from diffedu.teachers import MOONS, SWISS_ROLL
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
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffedu.train",
        description="Train a network of the book and write it, with all that made it, to a safetensors file.",
        epilog="The files that come with the package: --seed 0 --out diffedu/pretrained/NAME.safetensors",
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for network in networks():
        command = commands.add_parser(network.name, help=network.summary)
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
    options = parser.parse_args(arguments)
    try:
        train(options.network, options.seed, options.out, options.checkpoint, options.device)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def train(network: Network, seed: int, out: Path, checkpoint: Path | None, device: str | None) -> None:
    """Train a network and write its file, or files; prints what was written.

    Raises ValueError for an absent device and an `out` that is no safetensors file.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors; got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)  # an unwritable place is found out before the training
    start = time.process_time()
    trained = network.train(seed, device=pick_device(device), checkpoint=checkpoint)
    seconds = time.process_time() - start
    for file in network.save(out, trained, seed):
        digest = read(file)[1]["digest"][:16]
        print(f"{file}: {network.name}, seed {seed}, {seconds:.0f} CPU s, digest {digest}")


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
