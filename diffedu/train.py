"""The command `python -m diffedu.train`: trains a network of the book and writes its file."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffedu.teachers import MOONS, SWISS_ROLL, Teacher
from diffedu.weights import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffedu.train",
        description="Train a network of the book and write it, with all that made it, to a safetensors file.",
        epilog="The files that come with the package: --seed 0 --out diffedu/pretrained/NAME.safetensors",
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for teacher in (SWISS_ROLL, MOONS):
        command = commands.add_parser(
            teacher.name,
            help=f"the teacher on {teacher.name} data: {teacher.recipe.steps} steps of {teacher.batch}",
        )
        command.set_defaults(teacher=teacher)
        command.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default 0)")
        command.add_argument(
            "--out",
            type=Path,
            default=Path(f"{teacher.name}.safetensors"),
            help=f"the file to write (default {teacher.name}.safetensors, here)",
        )
        command.add_argument(
            "--checkpoint",
            type=Path,
            help="a file to save the run's state in, and to go on from if it exists",
        )
        command.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    options = parser.parse_args(arguments)
    try:
        train_teacher(options.teacher, options.seed, options.out, options.checkpoint, options.device)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def train_teacher(
    teacher: Teacher, seed: int, out: Path, checkpoint: Path | None, device: str | None
) -> None:
    """Train a teacher and write its file; prints what was written. Raises ValueError for an absent device."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors; got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)  # an unwritable place is found out before the training
    start = time.process_time()
    denoiser = teacher.train(seed, device=pick_device(device), checkpoint=checkpoint)
    seconds = time.process_time() - start
    teacher.save(out, denoiser, seed)
    print(f"{out}: {teacher.name}, seed {seed}, {seconds:.0f} CPU s, digest {read(out)[1]['digest'][:16]}")


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
