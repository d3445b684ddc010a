"""The command `python -m benchmarks`, run from the repository's root."""

import argparse
from inspect import signature
from pathlib import Path

import torch

from benchmarks import few_steps, report, sde, solvers, training

BENCHMARKS = {
    "sde": (sde, "stochastic samplers: distance to the data against evaluations"),
    "solvers": (solvers, "solvers of the ODE: error against evaluations, order, overhead"),
    "few_steps": (few_steps, "one to four evaluations: students beside their teacher"),
    "training": (training, "the toy teachers: excess against CPU seconds of training"),
}


def main() -> None:
    """Measure, print the tables beside the goals, write one JSON file a benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the package on the problems of the goals; print tables and write JSON.",
        epilog="; ".join(f"{name}: {what}" for name, (_, what) in BENCHMARKS.items()),
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        default=list(BENCHMARKS),
        help=f"which (default all): {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--seeds", type=int, help="how many seeds, instead of the goals' own number")
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS, help="folder of the JSON (benchmarks/results)"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}; got {', '.join(unknown)}")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"--seeds must be 2 or more; got {options.seeds}")
    torch.set_num_threads(1)
    for name in options.names:
        module, what = BENCHMARKS[name]
        print(f"{name}: {what}")
        seeded = options.seeds is not None and "seeds" in signature(module.measure).parameters
        results = module.measure(**({"seeds": options.seeds} if seeded else {}))
        print(module.show(results))
        seeds = f" --seeds {options.seeds}" if seeded else ""
        report.write(options.out / f"{name}.json", f"python -m benchmarks {name}{seeds}", results)


if __name__ == "__main__":
    main()
