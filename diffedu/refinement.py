"""How time is divided while a consistency function is learned, and how slowly its target follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from diffedu.checks import require_count
from diffedu.schedules import Schedule


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


def planned_times(grid: Tensor, restarts: Sequence[Sequence[int]], evaluations: int) -> list[float]:
    """The times for `multistep` with so many evaluations: the grid's last, then those of a plan of restarts.

    grid: `levels`; a plan lists indices into it. Raises ValueError where no plan has that many evaluations.
    """
    plans = {len(restart) + 1: restart for restart in restarts}
    if evaluations not in plans:
        raise ValueError(f"evaluations must be one of {sorted(plans)}; got {evaluations!r}")
    return [float(grid[-1]), *(float(grid[i]) for i in plans[evaluations])]


class Division(Protocol):
    """A curriculum: `last` intervals at its end."""

    @property
    def last(self) -> int:
        """How many intervals divide time at the end."""

    def division_at(self, step: int) -> tuple[int, int]:
        """At that step the number of intervals, and how many of them lie between the two times of a pair."""

    def decay_at(self, step: int) -> float:
        """The decay of the slow copy that gives the target."""


@dataclass(frozen=True)
class Refinement:
    """How finely time is divided at step k of a training: from `first` intervals to `last`.

    N^2 grows evenly in k: algorithm 3's schedule, which counts levels, N + 1, but never fewer than `first`
    intervals, where it begins with `first` levels. The target's decay is mu^(first / N): the finer the grid,
    the slower the target follows.
    Raises ValueError for counts below 1, last < first and a decay outside [0, 1).
    Source: Song et al. 2023, appendix C. Equations: eq-consistency-algorithms
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

    def division_at(self, step: int) -> tuple[int, int]:
        """The number of intervals, and how many of them lie between the two times of a pair: one."""
        return self.intervals_at(step), 1

    def decay_at(self, step: int) -> float:
        """mu: the decay of the slow copy that gives the target."""
        return float(self.mu ** (self.first / self.intervals_at(step)))


@dataclass(frozen=True)
class Narrowing:
    """The two times of a pair draw near on a grid of `last` intervals: from all of them apart to one.

    While the gap is the whole grid the target is at t_min, the data: a denoiser is learned, at every level.
    The gap falls geometrically between the shares `start` and `end` of the training. The decay is mu.
    Raises ValueError for counts below 1, shares that do not rise within [0, 1] and a decay outside [0, 1).
    Source: Geng et al. 2024 (consistency models made easy), section 3, there by ratios of noise levels.
    """

    steps: int
    last: int
    mu: float
    start: float = 0.15
    end: float = 0.55

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("last", self.last)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"0 <= start < end <= 1 is required; got {self.start!r}, {self.end!r}")
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie in [0, 1); got {self.mu!r}")

    def division_at(self, step: int) -> tuple[int, int]:
        """The number of intervals, and how many of them lie between the two times of a pair."""
        done = min(max((step / self.steps - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.last, max(1, round(self.last ** (1 - done)))

    def decay_at(self, step: int) -> float:
        """mu, at every step."""
        return self.mu
