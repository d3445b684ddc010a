"""Consistency students: distillation from the teachers, training without them; recipes, shipped files."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor, nn

from diffedu.checks import require_count
from diffedu.consistency import (
    ConsistencyFunction,
    Map,
    PseudoHuber,
    SquaredL2,
    cd_loss,
    ct_loss,
)
from diffedu.schedules import Schedule
from diffedu.sde import perturb
from diffedu.students import Place, Student
from diffedu.teachers import MOONS, SWISS_ROLL, shipped_net
from diffedu.training import Loss, Recipe, fit

PairLoss = Callable[[Map, Map, Tensor, Tensor, Tensor, Tensor], Tensor]  # (f, target, x0, t, s, eps) -> (B,)


@dataclass(frozen=True)
class Refinement:
    """How finely time is divided at step k of a training: from `first` intervals to `last`.

    N^2 grows evenly in k (algorithm 3's schedule, its N - 1 counted as intervals). The target's decay is
    mu^(first / N), so that the target's lag shrinks as the intervals do.
    Raises ValueError for counts below 1, last < first and a decay outside [0, 1).
    Source: Song et al. 2023, appendix C.
    """

    steps: int
    first: int
    last: int
    mu: float = 0.0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("last", self.last, require_count("first", self.first))
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie in [0, 1); got {self.mu!r}")

    def intervals_at(self, step: int) -> int:
        """N: how many intervals divide [t_min, t_max]."""
        square = self.first**2 + min(step / self.steps, 1.0) * ((self.last + 1) ** 2 - self.first**2)
        return min(max(math.ceil(math.sqrt(square) - 1), self.first), self.last)

    def decay_at(self, step: int) -> float:
        """mu: the decay of the slow copy that gives the target."""
        return float(self.mu ** (self.first / self.intervals_at(step)))


class Tracked(nn.Module):
    """A network, the slow copy that gives its targets, and the steps made: one state, resumed as one."""

    net: nn.Module
    target: nn.Module
    steps: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """target <- decay target + (1 - decay) net, and one more step made."""
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
        self.steps += 1


def levels(schedule: Schedule, n: int) -> Tensor:
    """n + 1 times from t_min up to t_max, (n + 1,) float64, closer where data of size 1 take shape.

    They are quantiles, evenly spaced, of a law of lam: half uniform, half N(1.2, 1), as in `draw_times`.
    """
    low, high = schedule.lam(schedule.t_max), schedule.lam(schedule.t_min)
    lam = np.linspace(low, high, 4001)
    bell = ndtr(lam - 1.2) - ndtr(low - 1.2)
    share = (lam - low) / (high - low) + bell / bell[-1]
    ts = schedule.t_of_lam(torch.from_numpy(np.interp(np.linspace(2, 0, n + 1), share, lam)))
    ts[0], ts[-1] = schedule.t_min, schedule.t_max
    return ts


@dataclass(frozen=True)
class ConsistencyStudent(Student, ABC):
    """A consistency function learned on the times of `levels`, refined as the training goes on.

    `restarts` holds, for each number of evaluations that is foreseen, the levels of the last grid from which
    sampling goes on after the first evaluation.
    """

    recipe: Recipe
    refinement: Refinement
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
        """What `fit` minimises over a `Tracked` network, (batch,)."""
        schedule, pairs, grids = self.teacher.schedule, self.pairs(data), dict[int, Tensor]()

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            assert isinstance(net, Tracked)
            step = int(net.steps)
            net.follow(self.refinement.decay_at(step))
            n = self.refinement.intervals_at(step)
            if n not in grids:
                grids[n] = levels(schedule, n).to(data)
            x0, eps = self.draw(data, self.batch, generator)
            i = torch.randint(n, (self.batch,), generator=generator, device=data.device)
            f, target = self.function(net.net), self.function(net.target)
            return pairs(f, target, x0, grids[n][i + 1], grids[n][i], eps)

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
        grid = levels(self.teacher.schedule, self.refinement.last).tolist()
        plans = {len(restart) + 1: [grid[-1], *(grid[i] for i in restart)] for restart in self.restarts}
        if evaluations not in plans:
            raise ValueError(f"evaluations must be one of {sorted(plans)}; got {evaluations!r}")
        return plans[evaluations]


@dataclass(frozen=True)
class ConsistencyDistilled(ConsistencyStudent):
    """Consistency distillation: from the teacher's weights, along its ODE by Heun, squared distances."""

    substeps: int = 2
    suffix: ClassVar[str] = "consistency"

    def start(self, seed: int) -> nn.Module:
        """The teacher's network, whose v-prediction makes a consistency function, whatever the seed."""
        return self.teacher.load().net.requires_grad_(True)

    def pairs(self, data: Tensor) -> PairLoss:
        """Consistency distillation's loss."""
        teacher = self.teacher.denoiser(self.teacher.load().net.to(data.device))

        def values(f: Map, target: Map, x0: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
            x = perturb(teacher.schedule, x0, t, eps)
            return cd_loss(f, target, teacher, x, t, s, substeps=self.substeps, distance=SquaredL2())

        return values


@dataclass(frozen=True)
class ConsistencyTrained(ConsistencyStudent):
    """Consistency training: from scratch, the same noise on both sides, pseudo-Huber distances."""

    distance: PseudoHuber = field(default_factory=PseudoHuber)
    taught: ClassVar[bool] = False
    suffix: ClassVar[str] = "consistency-training"

    def start(self, seed: int) -> nn.Module:
        """A network of that seed."""
        return self.teacher.untrained(seed)

    def pairs(self, data: Tensor) -> PairLoss:
        """Consistency training's loss."""

        def values(f: Map, target: Map, x0: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
            return ct_loss(f, target, self.teacher.schedule, x0, t, s, eps, distance=self.distance)

        return values


_REFINEMENT = Refinement(5000, 4, 16, 0.95)
SWISS_ROLL_CONSISTENCY, MOONS_CONSISTENCY = (
    ConsistencyDistilled(
        teacher, Recipe(5000, lr=2e-3, ema=0.998), _REFINEMENT, restarts=((), (8,), (10, 8, 6))
    )
    for teacher in (SWISS_ROLL, MOONS)
)
SWISS_ROLL_CONSISTENCY_TRAINED, MOONS_CONSISTENCY_TRAINED = (
    ConsistencyTrained(
        teacher, Recipe(8000, lr=2e-3, ema=0.999), _REFINEMENT, restarts=((), (8,), (10, 8, 6))
    )
    for teacher in (SWISS_ROLL, MOONS)
)
