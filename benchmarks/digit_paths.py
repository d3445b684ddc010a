"""Solvers of the digits' ODE, and how far from its exact paths they end, by evaluations of the network."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.kept import Kept
from benchmarks.training import seeded
from diffedu.digit_metrics import features
from diffedu.digits import CLASSES, MNIST, SIDE
from diffedu.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP2M, DPMSolverPP3M
from diffedu.sampling import Solver, prior, sample
from diffedu.solvers import Euler, Heun

# A grid is uniform in lam between these values, which were chosen on starts that are not measured.
DECISIVE = (-3.0, 4.0)
JUMPS = "jumps to {:g}, from {:g}".format(*DECISIVE)  # its name


class Marching(NamedTuple):
    """A solver of the base network's ODE on its grid: one of the schedule's spacings, or JUMPS.

    That is uniform in lam where the guess of the digit changes, with one long step on either side: what
    stands still costs an exponential step no error.
    """

    name: str
    solver: Solver
    spacing: str | float = "lam"
    calls: int = 1  # evaluations a step

    def steps(self, evaluations: int) -> int:
        """How many steps so many evaluations pay for; what is left over is not spent."""
        return evaluations // self.calls

    def times(self, evaluations: int) -> list[float]:
        """The times of its steps, from t_max down to t_min."""
        schedule, steps = MNIST.schedule, self.steps(evaluations)
        if self.spacing != JUMPS:
            return [float(t) for t in schedule.grid(steps, self.spacing)]
        low, high = DECISIVE
        inner = torch.linspace(low, high, steps - 1, dtype=torch.float64).tolist()
        return [schedule.t_max, *map(schedule.t_of_lam, inner), schedule.t_min]

    def end(self, net: nn.Module, evaluations: int, x: Tensor, labels: Tensor) -> Tensor:
        """Where it leads digits of these labels from x at t_max."""
        with torch.no_grad():
            return sample(MNIST.denoiser(net, labels), self.solver, x, self.times(evaluations))


SOLVERS = [
    Marching("Euler", Euler(), "t"),
    Marching("Heun", Heun(), "t", 2),
    Marching("DDIM", DDIM()),
    Marching("DPM-Solver-2", DPMSolver(2), "lam", 2),
    Marching("DPM-Solver-3", DPMSolver(3), "lam", 3),
    Marching("DPM-Solver++(2M)", DPMSolverPP2M()),
    Marching("DEIS(3)", DEIS(3), 2),  # chapter 10's choice for ten evaluations
]
JUMPING = Marching("DPM-Solver++(2M), jumps", DPMSolverPP2M(), JUMPS)
# Of these the paths alone are measured.
BESIDE = [Marching("DPM-Solver++(3M)", DPMSolverPP3M()), Marching("DEIS(3), lam grid", DEIS(3))]
# Evaluations of the paths from a few starts to the exact trajectory, and of pictures of some of them alone
EVALUATIONS = (1, 2, 3, 5, 10, 20, 50, 200)
PICTURED, FINEST = (10, 20, 50), 1000
PER_CLASS = 2  # starts of each class
REFERENCE_EVALUATIONS = 600


def few_starts() -> tuple[Tensor, Tensor]:
    """Noise for the paths, (20, 1, 28, 28), and its labels: 0 ... 9, twice."""
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    return prior(MNIST.schedule, (len(labels), 1, SIDE, SIDE), seeded(41_000)), labels


def rms(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root of the mean square of x - reference over images and pixels, and its standard error."""
    return root_mean((x - reference).double().square().flatten(1).mean(1))


def root_mean(squares: Tensor) -> tuple[float, float]:
    """Root of the mean of (n,) squares, and its standard error if they are independent."""
    value = float(squares.mean().sqrt())
    return value, float(squares.std()) / math.sqrt(len(squares)) / (2 * value)


def to_bytes(x: Tensor) -> Tensor:
    """Digits as uint8, (n, 28, 28)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[:, 0]


def paths(kept: Kept, net: nn.Module, digest: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The errors of the solvers at the end of a few paths of the network's ODE; and pictures of the ends.

    In pixels and in the classifier's features, where it bounds what the solver can do to the root of the
    Fréchet distance.

    The reference is DPM-Solver-3 with so many evaluations that its distance from DPM-Solver++(3M) with as
    many, which has another formula and other errors, is far below all that is measured.
    """
    x, labels = few_starts()

    def end(marching: Marching, evaluations: int, n: int = len(x)) -> Tensor:
        name = f"{marching.solver!r}, {marching.steps(evaluations)} steps, {marching.spacing}, {n} starts"

        def make() -> dict[str, Tensor]:
            start = time.process_time()
            found = marching.end(net, evaluations, x[:n], labels[:n])
            print(f"  {name}: {time.process_time() - start:.0f} CPU s", flush=True)
            return {"end": found}

        return kept.of(f"{name}, network {digest}", make)["end"]

    reference = end(Marching("", DPMSolver(3), "lam", 3), REFERENCE_EVALUATIONS)
    seen = features(reference.clamp(-1, 1))
    gap, _ = rms(end(Marching("", DPMSolverPP3M()), REFERENCE_EVALUATIONS), reference)
    print(f"  two solvers with {REFERENCE_EVALUATIONS} evaluations: {gap:.2g} apart", flush=True)
    lines, pictures = [], {"reference": reference}
    for marching in [*SOLVERS, *BESIDE]:
        for n in EVALUATIONS:
            if steps := marching.steps(n):
                here = end(marching, n)
                value, error = rms(here, reference)
                shift = (features(here.clamp(-1, 1)) - seen).double()
                in_features, its_error = root_mean(shift.square().sum(1))
                lines.append(
                    {
                        "method": marching.name,
                        "grid": str(marching.spacing),
                        "evaluations": n,
                        "used": steps * marching.calls,
                        "rms": value,
                        "standard_error": error,
                        "feature_rms": in_features,
                        "feature_error": its_error,
                    }
                )
                print(f"  {marching.name}, {n}: {value:.2g} from the trajectory", flush=True)
    for marching in SOLVERS:
        for n in PICTURED:
            pictures[f"{marching.name}, {n}"] = to_bytes(end(marching, n)[:CLASSES])
        pictures[f"{marching.name}, {FINEST}"] = to_bytes(end(marching, FINEST, CLASSES))
    of_reference = {"evaluations": REFERENCE_EVALUATIONS, "gap": gap, "starts": len(x)}
    return {"reference": of_reference, "paths": lines}, pictures
