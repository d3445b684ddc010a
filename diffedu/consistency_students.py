"""Consistency students: distillation from the teachers, training without them; recipes, shipped files."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffedu.consistency import ConsistencyFunction, Map, cd_loss, euler_step, heun_step
from diffedu.mixtures import EmpiricalDenoiser
from diffedu.refinement import Division, Narrowing, Refinement, levels, planned_times
from diffedu.sde import perturb
from diffedu.students import Place, Student
from diffedu.teachers import MOONS, SWISS_ROLL, shipped_net
from diffedu.training import Loss, Recipe, fit

# (f, target, x0, t, s, eps, the number of intervals from s to t) -> (B,)
PairLoss = Callable[[Map, Map, Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Tracked(nn.Module):
    """A network, the slow copy that gives its targets, and the steps made: one state, resumed as one."""

    net: nn.Module
    target: nn.Module
    steps: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, *inputs: Tensor) -> Tensor:
        """What `net` gives."""
        output: Tensor = self.net(*inputs)
        return output

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """target <- decay target + (1 - decay) net, and one more step made."""
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
        self.steps += 1


@dataclass(frozen=True)
class ConsistencyStudent(Student, ABC):
    """A consistency function learned on the times of `levels`, refined as the training goes on.

    `restarts` holds, for each number of evaluations that is foreseen, the levels of the last grid from which
    sampling goes on after the first evaluation.
    """

    recipe: Recipe
    division: Division
    batch: int = 512
    restarts: tuple[tuple[int, ...], ...] = ((),)

    @abstractmethod
    def start(self, seed: int) -> nn.Module:
        """The network before training."""

    @abstractmethod
    def pairs(self, data: Tensor) -> PairLoss:
        """The loss of pairs of neighbouring times, on the data's device."""

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        kind = "distillation from the teacher" if self.taught else "training on the data of"
        return f"consistency {kind} {self.teacher.name}: {self.recipe.steps} steps of {self.batch}"

    def function(self, net: nn.Module) -> ConsistencyFunction:
        """The network read as a consistency function."""
        return ConsistencyFunction(net, self.teacher.schedule)

    def loss(self, data: Tensor) -> Loss:
        """What `fit` minimises over a `Tracked` network, (batch,).

        Each evaluation counts as one step of training: it moves the slow copy and the counter of steps. So
        evaluate it once for each step of the optimiser, and measure a trained network with another loss.
        """
        schedule, pairs, grids = self.teacher.schedule, self.pairs(data), dict[int, Tensor]()

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            assert isinstance(net, Tracked)
            step = int(net.steps)
            net.follow(self.division.decay_at(step))
            n, gap = self.division.division_at(step)
            if n not in grids:
                grids[n] = levels(schedule, n).to(data)
            x0, eps = self.draw(data, self.batch, generator)
            i = torch.randint(n, (self.batch,), generator=generator, device=data.device) + 1
            t, s = grids[n][i], grids[n][(i - gap).clamp(min=0)]
            return pairs(self.function(net.net), self.function(net.target), x0, t, s, eps, gap)

        return values

    def train(
        self,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        checkpoint: Place | None = None,
        every: int = 1000,
        progress: bool = True,
    ) -> ConsistencyFunction:
        """Train from the seed; `checkpoint`, `every` and `progress` as in `fit`."""
        generator = torch.Generator(device).manual_seed(seed)
        fitted = fit(
            Tracked(self.start(seed)).to(device),
            self.loss(self.teacher.data(seed).to(device)),
            self.recipe,
            generator,
            checkpoint=checkpoint,
            every=every,
            progress=progress,
        )
        return self.function(fitted.net.get_submodule("net"))

    def save(self, path: Place, f: ConsistencyFunction, seed: int) -> list[Path]:
        """Write the network with all that made it."""
        own = {k: v for k, v in asdict(self).items() if k not in ("teacher", "recipe", "restarts")}
        return [self.write(path, f.net, seed, asdict(self.recipe) | own)]

    def load(self) -> ConsistencyFunction:
        """The function that comes with the package, on the CPU, in evaluation mode."""
        return self.function(shipped_net(self.name))

    def times(self, evaluations: int) -> list[float]:
        """The times for `multistep` with so many evaluations. Raises ValueError for a number not foreseen."""
        return planned_times(levels(self.teacher.schedule, self.division.last), self.restarts, evaluations)


@dataclass(frozen=True)
class ConsistencyDistilled(ConsistencyStudent):
    """Consistency distillation: from the teacher's weights, along its ODE by Heun, squared distances.

    Source: Song et al. 2023, algorithm 2. Equations: eq-consistency-algorithms
    """

    substeps: int = 2
    suffix: ClassVar[str] = "consistency"

    def start(self, seed: int) -> nn.Module:
        """The teacher's network, whose v-prediction makes a consistency function, whatever the seed."""
        return self.teacher.load().net.requires_grad_(True)

    def pairs(self, data: Tensor) -> PairLoss:
        """Consistency distillation's loss."""
        teacher = self.teacher.denoiser(self.teacher.load().net.to(data.device))

        def values(f: Map, target: Map, x0: Tensor, t: Tensor, s: Tensor, eps: Tensor, gap: int) -> Tensor:
            x = perturb(teacher.schedule, x0, t, eps)
            return cd_loss(f, target, teacher, x, t, s, substeps=self.substeps)

        return values


@dataclass(frozen=True)
class ConsistencyTrained(ConsistencyStudent):
    """Consistency training: from scratch, no network but its own and its slow copy.

    `ct_loss` takes for E[x0 | x_t] the one x0 that made x_t; here the whole batch speaks, each of its points
    with its posterior weight, so that targets are nearly sure and squared distances serve. Steps over more
    than two intervals are Euler's, the others Heun's.
    Source: after Song et al. 2023, algorithm 3, whose single x0, Euler steps and growing grid are replaced by
    the batch's posterior mean (Xu, Tong & Jaakkola 2023, stable targets), Heun's steps and narrowing pairs
    (Geng et al. 2024).
    Equations: eq-consistency-algorithms
    """

    taught: ClassVar[bool] = False
    suffix: ClassVar[str] = "consistency-training"

    def start(self, seed: int) -> nn.Module:
        """A network of that seed."""
        return self.teacher.untrained(seed)

    def pairs(self, data: Tensor) -> PairLoss:
        """Consistency training's loss, with the batch's posterior mean."""
        schedule = self.teacher.schedule

        def values(f: Map, target: Map, x0: Tensor, t: Tensor, s: Tensor, eps: Tensor, gap: int) -> Tensor:
            batch, x = EmpiricalDenoiser(x0, schedule), perturb(schedule, x0, t, eps)
            return cd_loss(f, target, batch, x, t, s, step=heun_step if gap <= 2 else euler_step)

        return values


# A restart from a high level carries a sample in a million so far out that the roll's network does not bring
# it back; the moons' network does.
SWISS_ROLL_CONSISTENCY, MOONS_CONSISTENCY = (
    ConsistencyDistilled(
        teacher,
        Recipe(5500, lr=6e-3, ema=0.998),
        Refinement(5500, 10, 16, 0.98),
        restarts=restarts,
    )
    for teacher, restarts in ((SWISS_ROLL, ((), (9,), (10, 9, 8))), (MOONS, ((), (12,), (15, 13, 12))))
)
SWISS_ROLL_CONSISTENCY_TRAINED, MOONS_CONSISTENCY_TRAINED = (
    ConsistencyTrained(
        teacher,
        Recipe(6400, lr=8e-3, ema=0.998),
        Narrowing(6400, 24, 0.95),
        restarts=restarts,
    )
    for teacher, restarts in ((SWISS_ROLL, ((), (16,), (22, 16, 13))), (MOONS, ((), (18,), (22, 18, 15))))
)
