"""Students by progressive distillation: recipes, training, shipped files; and what all students share."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffedu import weights
from diffedu.denoiser import NetDenoiser
from diffedu.distillation import progressive_loss, require_halving, snr_plus_one, step_shares
from diffedu.teachers import MOONS, SWISS_ROLL, Teacher, shipped_net
from diffedu.training import Loss, Recipe, fit

Place = str | Path


@dataclass(frozen=True)
class Student:
    """A teacher, its data, and a network learned with them; the loss and the training are the subclass's."""

    teacher: Teacher
    taught: ClassVar[bool] = True  # whether the training needs the teacher, not only its data
    suffix: ClassVar[str]

    @property
    def name(self) -> str:
        """The command's name, and the file's."""
        return f"{self.teacher.name}-{self.suffix}"

    def draw(self, data: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n rows of the data and as much noise, (n, D) each."""
        rows = torch.randint(len(data), (n,), generator=generator, device=data.device)
        x0 = data[rows]
        return x0, torch.randn(x0.shape, generator=generator, device=data.device)

    def write(self, path: Place, net: nn.Module, seed: int, recipe: dict[str, object]) -> Path:
        """One network with all that made it: command, recipe, seed, digests of teacher, data and tensors."""
        tensors = net.state_dict()
        metadata = {
            "command": f"python -m diffedu.train {self.name} --seed {seed}",
            "recipe": json.dumps(recipe | {"points": self.teacher.points}),
            "schedule": repr(self.teacher.schedule),
            "seed": str(seed),
            "teacher_digest": weights.shipped(self.teacher.name)[1]["digest"] if self.taught else "none",
            "data_digest": weights.digest({"data": self.teacher.data(seed)}),
            "digest": weights.digest(tensors),
            "torch": torch.__version__,
        }
        weights.write(path, tensors, metadata)
        return Path(path)


@dataclass(frozen=True)
class Distilled(Student):
    """Students by progressive distillation, generation after generation: (number of steps, recipe), halving.

    The times are uniform in t, so that a student's step from t to s is its teacher's two by (t + s) / 2. The
    first generation's teacher makes twice its steps. Where the algorithm draws a step evenly, `shares` draws
    it. The students of `kept` steps come with the package.
    Raises ValueError for generations that do not halve. Source: Salimans & Ho 2022, algorithm 2.
    Equations: eq-step-halving
    """

    generations: tuple[tuple[int, Recipe], ...]
    batch: int = 512
    kept: tuple[int, ...] = (8, 4, 2, 1)
    suffix: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        require_halving([n for n, _ in self.generations])

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        kept = ", ".join(map(str, self.kept))
        return f"progressive distillation of the teacher {self.teacher.name} to {kept} steps, a file for each"

    def grid(self, n: int) -> Tensor:
        """The times of the student of n steps, (n + 1,) float64: for `sample` with `DDIM()`.

        Equations: eq-half-steps
        """
        return self.teacher.schedule.grid(n, "t")

    def shares(self, n: int) -> Tensor:
        """How often the training draws each of the n steps, (n,) float64: `step_shares`."""
        return step_shares(self.teacher.schedule, self.grid(n))

    def loss(self, teacher: NetDenoiser, n: int, data: Tensor) -> Loss:
        """What `fit` minimises for the student of n steps: the error in v, (batch,)."""
        times, shares = self.grid(n).to(data), self.shares(n).to(data)

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            x0, eps = self.draw(data, self.batch, generator)
            i = torch.multinomial(shares, self.batch, replacement=True, generator=generator)
            student = self.teacher.denoiser(net)
            return progressive_loss(student, teacher, x0, times[i], times[i + 1], eps, snr_plus_one)

        return values

    def train(
        self,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        checkpoint: Place | None = None,
        every: int = 1000,
        progress: bool = True,
    ) -> dict[int, NetDenoiser]:
        """The students by their number of steps; `every` and `progress` as in `fit`.

        Each generation has a checkpoint of its own: `checkpoint` with -n before its suffix.
        Equations: eq-algorithm-2
        """
        generator = torch.Generator(device).manual_seed(seed)
        data, net = self.teacher.data(seed).to(device), self.teacher.load().net.to(device)
        students: dict[int, NetDenoiser] = {}
        for n, recipe in self.generations:
            fitted = fit(
                copy.deepcopy(net).requires_grad_(True),
                self.loss(self.teacher.denoiser(net), n, data),
                recipe,
                generator,
                checkpoint=None if checkpoint is None else weights.numbered(checkpoint, n),
                every=every,
                progress=progress,
            )
            net = fitted.net
            students[n] = self.teacher.denoiser(net)
        return students

    def save(self, path: Place, students: Mapping[int, NetDenoiser], seed: int) -> list[Path]:
        """Write those that are kept, the student of n steps to `path` with -n before its suffix."""
        recipe = {"generations": [[n, asdict(recipe)] for n, recipe in self.generations], "batch": self.batch}
        return [
            self.write(weights.numbered(path, n), students[n].net, seed, recipe | {"student_steps": n})
            for n in self.kept
        ]

    def load(self, n: int) -> NetDenoiser:
        """The student of n steps that comes with the package. Raises ValueError for one that does not."""
        return self.teacher.denoiser(shipped_net(f"{self.name}-{n}"))


def _generations(steps: dict[int, tuple[int, float]]) -> tuple[tuple[int, Recipe], ...]:
    """Generations of so many training steps at such learning rates."""
    return tuple((n, Recipe(count, lr=lr, ema=0.98 if n > 16 else 0.995)) for n, (count, lr) in steps.items())


# Fine steps have little to learn, at small rates; the last two change all that the network says at t = 1.
_STEPS = {
    512: (60, 1e-3),
    256: (80, 1e-3),
    128: (120, 1e-3),
    64: (200, 2e-3),
    32: (350, 2e-3),
    16: (800, 4e-3),
    8: (1600, 4e-3),
    4: (1600, 8e-3),
    2: (1200, 1.2e-2),
    1: (1500, 1.5e-2),
}
SWISS_ROLL_DISTILLED = Distilled(SWISS_ROLL, _generations(_STEPS))
MOONS_DISTILLED = Distilled(MOONS, _generations(_STEPS))
