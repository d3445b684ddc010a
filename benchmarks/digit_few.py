"""Digits in one to eight evaluations: undistilled DDIM, progressive students, the consistency model."""

from torch import Generator, Tensor, nn

from benchmarks.digit_methods import Method, marched
from benchmarks.digit_paths import Marching
from diffedu import weights
from diffedu.consistency import multistep
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digits import MNIST
from diffedu.exponential import DDIM
from diffedu.sampling import sample

STUDENTS = (1, 2, 4, 8)
JUMPS = (1, 2)
UNDISTILLED = Marching("DDIM, t grid", DDIM(), "t")  # the students' own grid

# Distances over those of the base network with ten evaluations, the same starts and labels
TEACHER = ("DPM-Solver++(2M)", 10)
GOALS = {
    ("progressive student", 4): 1.15,
    ("progressive student", 2): 1.3,
    ("progressive student", 1): 1.6,
    ("consistency model", 1): 2.0,
    ("consistency model", 2): 1.5,
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
