"""What fixes a training run besides its network and its loss: steps, learning rate, averages."""

import math
from dataclasses import KW_ONLY, dataclass, fields, replace

from diffedu.checks import require_count


@dataclass(frozen=True)
class Recipe:
    """What fixes a training run besides its network, its loss and its generator's state.

    lr is reached after `warmup` steps and decays from there; beta2 is Adam's memory of squared gradients.
    Raises ValueError for a learning rate that is not positive, a warmup longer than the run, and an EMA
    decay or beta2 outside [0, 1).
    """

    steps: int
    lr: float = 3e-3
    ema: float = 0.999
    beta2: float = 0.999
    warmup: int = 0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive; got {self.lr!r}")
        for name, decay in (("ema", self.ema), ("beta2", self.beta2)):
            if not 0 <= decay < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {decay!r}")
        if require_count("warmup", self.warmup, 0) >= self.steps:
            raise ValueError(f"warmup must be below steps = {self.steps}; got {self.warmup}")

    def lr_at(self, step: int) -> float:
        """Cosine decay from lr to 0 (Loshchilov & Hutter 2017), times (step + 1) / warmup at the start."""
        return self._cosine(step, self.steps)

    def scaled(self, share: float) -> "Recipe":
        """The recipe for a share of its steps, rounded up; the warmup keeps its own share."""
        steps = max(1, math.ceil(self.steps * share - 1e-9))
        warmup = round(self.warmup * steps / self.steps)
        return replace(self, steps=steps, warmup=min(warmup, steps - 1))

    def _cosine(self, step: int, steps: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * 0.5 * self.lr * (1 + math.cos(math.pi * step / steps))

    def decay_at(self, step: int) -> float:
        """The EMA's decay, which starts small so that the first weights are soon forgotten."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Restarted(Recipe):
    """A recipe whose rate rises and falls a second time, from step `restart` on.

    A training that was worth going on with is so the beginning of a longer one.
    Raises ValueError for a restart outside 1 ... steps - 1. Source: warm restarts, Loshchilov & Hutter 2017.
    """

    _: KW_ONLY
    restart: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < require_count("restart", self.restart) < self.steps:
            raise ValueError(f"restart must be below steps = {self.steps}; got {self.restart}")

    def lr_at(self, step: int) -> float:
        """That of a recipe of `restart` steps, then that of one of the others."""
        if step < self.restart:
            return self._cosine(step, self.restart)
        return self._cosine(step - self.restart, self.steps - self.restart)

    def scaled(self, share: float) -> Recipe:
        """Itself for as many steps; for any other number there is nothing to go on from: one cycle."""
        once = Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)}).scaled(share)
        return self if once.steps == self.steps else once
