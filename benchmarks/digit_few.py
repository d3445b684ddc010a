"""Digits in one to eight evaluations: undistilled solvers, progressive students, the consistency model.

`python -m benchmarks.digit_few` prints what plans of restarts of the consistency model are worth.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Generator, Tensor, nn

from benchmarks.digit_methods import Method, marched
from benchmarks.digit_paths import Marching
from benchmarks.digits import CHUNK, starts
from benchmarks.training import seeded
from diffedu import weights
from diffedu.consistency import multistep
from diffedu.data import mnist
from diffedu.digit_metrics import accuracy, frechet
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digits import MNIST
from diffedu.exponential import DDIM, DPMSolverPP2M
from diffedu.refinement import planned_times
from diffedu.sampling import sample

STUDENTS = JUMPS = (1, 2, 4, 8)
UNDISTILLED = Marching("DDIM, t grid", DDIM(), "t")  # the students' own grid
BETTER = Marching("DPM-Solver++(2M), beside students", DPMSolverPP2M())
BETTER_EVALUATIONS = (1, 2, 3, 5)

# Distances over those of the base network with ten evaluations, the same starts and labels, to be at most
# the goal. None: no goal was set, and the row has as many blocks as the others, so that they compare.
TEACHER = ("DPM-Solver++(2M)", 10)
GOALS: dict[tuple[str, int], float | None] = {
    **{(UNDISTILLED.name, n): None for n in STUDENTS},
    **{(BETTER.name, n): None for n in BETTER_EVALUATIONS},
    ("progressive student", 8): None,
    ("progressive student", 4): 1.15,
    ("progressive student", 2): 1.3,
    ("progressive student", 1): 1.6,
    ("consistency model", 1): 2.0,
    ("consistency model", 2): 1.5,
    ("consistency model", 4): None,
    ("consistency model", 8): None,
}
BEST_SEEN = {  # Fréchet distance at n = 1,000; for a teacher of 4.8
    ("DDIM, t grid", 8): 6.6,
    ("DDIM, t grid", 4): 14.9,
    ("DDIM, t grid", 2): 73.0,
    ("DDIM, t grid", 1): 1380.0,
    ("progressive student", 4): 7.6,
    ("progressive student", 2): 9.0,
    ("progressive student", 1): 14.0,
}


def files() -> list[str]:
    """The names of the shipped students."""
    return [*(weights.numbered(MNIST_DISTILLED.name, n).name for n in STUDENTS), MNIST_CONSISTENCY.name]


def methods(net: nn.Module, digest: str) -> list[Method]:
    """All that are measured: of the base network with its digest, and of its students."""
    return [
        *(marched(UNDISTILLED, n, net, digest) for n in STUDENTS),
        *(marched(BETTER, n, net, digest) for n in BETTER_EVALUATIONS),
        *map(distilled, STUDENTS),
        *map(consistent, JUMPS),
    ]


def distilled(n: int) -> Method:
    """The student of n steps."""
    net = MNIST_DISTILLED.load(n)
    digest = weights.shipped(f"{MNIST_DISTILLED.name}-{n}")[1]["digest"]

    def draw(x: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return sample(MNIST.denoiser(net, labels), DDIM(), x, MNIST_DISTILLED.grid(n))

    return Method("progressive student", n, n, "t", f"{n} steps, student {digest}", draw)


def consistent(n: int) -> Method:
    """The consistency model in n jumps."""
    net, times = MNIST_CONSISTENCY.load(), MNIST_CONSISTENCY.times(n)
    digest = weights.shipped(MNIST_CONSISTENCY.name)[1]["digest"]

    def draw(x: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return multistep(MNIST_CONSISTENCY.function(net, labels), x, times, MNIST.schedule, generator)

    made = f"jumps from {', '.join(f'{t:.6f}' for t in times)}, consistency model {digest}"
    return Method("consistency model", n, n, "trained levels", made, draw)


# What restarts were chosen from, and the starts for that, of which no row is measured
PLANS = [
    *((k,) for k in range(1, 9)),
    *((6, 4, 2), (4, 3, 2), (5, 3, 2), (3, 2, 1), (5, 2, 1), (7, 4, 2), (8, 5, 2), (8, 5, 3)),
    *((7, 6, 5, 4, 3, 2, 1), (8, 6, 5, 4, 3, 2, 1), (9, 8, 6, 5, 4, 2, 1)),
    *((8, 7, 6, 5, 4, 3, 2), (9, 7, 6, 5, 4, 3, 2), (9, 8, 7, 6, 5, 4, 3)),
]
CHOICE_SEED = 7


def tried(
    net: nn.Module, known: Tensor, plans: Iterable[Sequence[int]], seed: int = CHOICE_SEED
) -> Iterator[tuple[Sequence[int], float, float]]:
    """Each plan of restarts, the Fréchet distance of a block of the network's digits by it, their accuracy.

    A plan lists the levels, of those of the training's end, from which the jumps after the first start. The
    distance is to the 10,000 test digits. known: the labels, a block of which is drawn as for the rows.
    """
    x, labels = starts(known, seed)
    grid = MNIST_CONSISTENCY.levels()
    for plan in plans:
        times, generator = planned_times(grid, [plan], len(plan) + 1), seeded(1)
        digits = torch.cat(
            [
                multistep(MNIST_CONSISTENCY.function(net, b), a, times, MNIST.schedule, generator)
                for a, b in zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True)
            ]
        ).clamp(-1, 1)
        yield plan, frechet(digits), accuracy(digits, labels)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan, fd, right in tried(MNIST_CONSISTENCY.load(), mnist("train", full=True)[1].long(), PLANS):
        print(f"restarts {plan}: FD {fd:.3f}, accuracy {right:.1%}", flush=True)
