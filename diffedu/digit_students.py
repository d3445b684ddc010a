"""Students of the network that draws digits: progressive distillation, consistency distillation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffedu import weights
from diffedu.consistency import ConsistencyFunction, cd_loss, multistep
from diffedu.consistency_students import Tracked
from diffedu.digit_training import DigitTraining, Draw, half_precision
from diffedu.digits import MNIST, DigitModel
from diffedu.distillation import progressive_loss, require_halving, snr_plus_one, step_shares
from diffedu.exponential import DDIM
from diffedu.networks import Labelled, UNet
from diffedu.refinement import Refinement, levels, planned_times
from diffedu.sampling import sample
from diffedu.sde import perturb
from diffedu.training import Loss, Recipe


@dataclass(frozen=True)
class DigitStudent(DigitTraining):
    """A network taught by the shipped one, with its shape and first weights; it must be told the class."""

    teacher: DigitModel

    def start(self, seed: int) -> nn.Module:
        """The teacher's network, whatever the seed."""
        return self.teacher.load().requires_grad_(True)

    def origin(self) -> dict[str, str]:
        """The noise schedule and the teacher."""
        return self.teacher.origin() | {"teacher_digest": weights.shipped(self.teacher.name)[1]["digest"]}


@dataclass(frozen=True)
class DigitsDistilled(DigitStudent):
    """Progressive distillation: students of fewer and fewer DDIM steps, each taught by the one before.

    `generations` has (number of steps, recipe), halving; the times are uniform in t. The first generation's
    teacher makes twice its steps. Raises ValueError for generations that do not halve.
    Source: Salimans & Ho 2022, algorithm 2. Equations: eq-step-halving, eq-algorithm-2
    """

    generations: tuple[tuple[int, Recipe], ...]

    def __post_init__(self) -> None:
        require_halving([n for n, _ in self.generations])

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        kept = ", ".join(str(n) for n, _ in self.generations)
        return f"progressive distillation of {self.teacher.name} to {kept} steps, a file for each"

    @property
    def stages(self) -> Mapping[int | None, Recipe]:
        """The generations."""
        return dict(self.generations)

    def with_stages(self, stages: Mapping[int | None, Recipe]) -> Self:
        """The same with other recipes."""
        return replace(self, generations=tuple((n, stages[n]) for n, _ in self.generations))

    def grid(self, n: int) -> Tensor:
        """The times of the student of n steps, (n + 1,) float64: for `sample` with `DDIM()`.

        Equations: eq-half-steps
        """
        return self.teacher.schedule.grid(n, "t")

    def stage_loss(self, key: int | None, before: nn.Module, draw: Draw) -> Loss:
        """The error in v against two steps of the network before, mean over pixels, (batch,)."""
        assert key is not None
        ts = self.grid(key)
        bounds = step_shares(self.teacher.schedule, ts).cumsum(0)[:-1]

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            x0, labels, eps, u = draw(generator)
            times = ts.to(x0)
            i = torch.bucketize(u, bounds.to(x0), right=True)
            student, teacher = (self.teacher.denoiser(each, labels) for each in (net, before))
            with half_precision(x0.device):
                error = progressive_loss(student, teacher, x0, times[i], times[i + 1], eps, snr_plus_one)
            return error / x0[0].numel()

        return values

    def examples(self, net: nn.Module, key: int | None = None) -> Tensor:
        """Five digits of each class in the student's steps, (50, 1, 28, 28), the same noise each time."""
        start, labels = self.teacher.example_starts(net)
        ts = self.grid(key or self.generations[-1][0])
        return sample(self.teacher.denoiser(net, labels), DDIM(), start, ts)

    def details(self, key: int | None) -> dict[str, object]:
        """All generations."""
        return {"student_steps": key, "generations": [[n, recipe.steps] for n, recipe in self.generations]}

    def load(self, n: int) -> UNet:
        """The student of n steps that comes with the package. Raises ValueError for one that does not."""
        return self.teacher.shipped(f"{self.name}-{n}")


@dataclass(frozen=True)
class DigitsConsistency(DigitStudent):
    """Consistency distillation on the times of `levels`: along the teacher's ODE by Heun, squared distances.

    `restarts` as in `planned_times`. Source: Song et al. 2023, algorithm 2.
    Equations: eq-consistency-algorithms
    """

    recipe: Recipe
    division: Refinement
    substeps: int = 1
    restarts: tuple[tuple[int, ...], ...] = ((),)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return f"a consistency model of {self.teacher.name}'s digits: {self.images:,} images"

    @property
    def stages(self) -> Mapping[int | None, Recipe]:
        """One."""
        return {None: self.recipe}

    def with_stages(self, stages: Mapping[int | None, Recipe]) -> Self:
        """The same with another recipe; the division of time keeps its share of it."""
        recipe = stages[None]
        return replace(self, recipe=recipe, division=replace(self.division, steps=recipe.steps))

    def start(self, seed: int) -> nn.Module:
        """The teacher's network and its slow copy, whatever the seed."""
        return Tracked(super().start(seed))

    def stage_loss(self, key: int | None, before: nn.Module, draw: Draw) -> Loss:
        """The squared distance over one interval of the division, mean over pixels, (batch,)."""
        schedule, teaching = self.teacher.schedule, self.teacher.load()

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            x0, labels, eps, u = draw(generator)
            run = net.module if isinstance(net, DistributedDataParallel) else net
            assert isinstance(run, Tracked)
            step = int(run.steps)
            run.follow(self.division.decay_at(step))
            n, gap = self.division.division_at(step)
            grid = levels(schedule, n).to(x0)
            i = (u * n).long() + 1
            t, s = grid[i], grid[(i - gap).clamp(min=0)]
            with half_precision(x0.device):
                error = cd_loss(
                    self.function(net, labels),
                    self.function(run.target, labels),
                    self.teacher.denoiser(teaching.to(x0.device), labels),
                    perturb(schedule, x0, t, eps),
                    t,
                    s,
                    substeps=self.substeps,
                )
            return error / x0[0].numel()

        return values

    def finished(self, net: nn.Module) -> nn.Module:
        """The network without its slow copy."""
        return net.get_submodule("net")

    def examples(self, net: nn.Module, key: int | None = None) -> Tensor:
        """Five digits of each class in one evaluation, (50, 1, 28, 28), the same noise each time."""
        start, labels = self.teacher.example_starts(net)
        return multistep(self.function(net, labels), start, self.times(1), self.teacher.schedule)

    def details(self, key: int | None) -> dict[str, object]:
        """The division of time and the steps of the teacher's solver in an interval."""
        return {"division": asdict(self.division), "substeps": self.substeps}

    def function(self, net: nn.Module, labels: Tensor) -> ConsistencyFunction:
        """The network read as a consistency function of digits of these classes, labels (B,)."""
        return ConsistencyFunction(Labelled(net, labels), self.teacher.schedule)

    def times(self, evaluations: int) -> list[float]:
        """The times for `multistep` with so many evaluations. Raises ValueError for a number not foreseen."""
        return planned_times(self.levels(), self.restarts, evaluations)

    def levels(self) -> Tensor:
        """The times at which the network was asked at the end of its training, rising, float64."""
        return levels(self.teacher.schedule, self.division.last)

    def load(self) -> UNet:
        """The network that comes with the package."""
        return self.teacher.shipped(self.name)


def _recipe(steps: int, lr: float, ema: float) -> Recipe:
    return Recipe(steps, lr=lr, ema=ema, beta2=0.99, warmup=20)


MNIST_DISTILLED = DigitsDistilled(
    "mnist-distill",
    MNIST,
    (
        (8, _recipe(450, 4e-4, 0.99)),
        (4, _recipe(600, 5e-4, 0.99)),
        (2, _recipe(900, 8e-4, 0.99)),
        (1, _recipe(1500, 1e-3, 0.995)),
    ),
)
_LESSONS = _recipe(2250, 1e-3, 0.995)
MNIST_CONSISTENCY = DigitsConsistency(
    "mnist-consistency",
    MNIST,
    _LESSONS,
    Refinement(_LESSONS.steps, 5, 10, 0.9),
    # Of the plans in `benchmarks.digit_few` those with the least Fréchet distance to the test digits, the
    # distance that is reported, of a thousand digits; but from starts of their own, which no row has
    restarts=((), (2,), (8, 5, 2), (8, 7, 6, 5, 4, 3, 2)),
)
