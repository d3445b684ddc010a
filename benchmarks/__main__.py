"""The command `python -m benchmarks`, run from the repository's root."""

import argparse
from inspect import signature
from pathlib import Path

import torch

from benchmarks import digit_steps, digits, few_steps, report, sde, solvers, training

BENCHMARKS = {
    "sde": (sde, "stochastic samplers: distance to the data against evaluations"),
    "solvers": (solvers, "solvers of the ODE: error against evaluations, order, overhead"),
    "few_steps": (few_steps, "one to four evaluations: students beside their teacher"),
    "training": (training, "the toy teachers: excess against CPU seconds of training"),
    "digits": (digits, "MNIST: Fréchet distance and class accuracy of samples, training speed"),
    "digit_steps": (digit_steps, "MNIST in fewer steps: solvers by evaluations, distance to data and path"),
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
    for option in ("seeds", "samples", "pairs"):
        parser.add_argument(
            f"--{option}", type=int, help=f"how many {option}, instead of the goals' own number"
        )
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS, help="folder of the JSON (benchmarks/results)"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}; got {', '.join(unknown)}")
    asked = {k: getattr(options, k) for k in ("seeds", "samples", "pairs") if getattr(options, k) is not None}
    if any(n < 1 for n in asked.values()):
        parser.error(f"numbers must be 1 or more; got {asked}")
    torch.set_num_threads(1)
    for name in options.names:
        module, what = BENCHMARKS[name]
        print(f"{name}: {what}")
        known = {k: n for k, n in asked.items() if k in signature(module.measure).parameters}
        files = {"out": options.out} if "out" in signature(module.measure).parameters else {}
        results = module.measure(**known, **files)
        print(module.show(results))
        command = " ".join(["python -m benchmarks", name, *(f"--{k} {n}" for k, n in known.items())])
        report.write(options.out / f"{name}.json", command, results)
        getattr(module, "finish", lambda: None)()


if __name__ == "__main__":
    main()
