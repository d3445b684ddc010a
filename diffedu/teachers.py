"""The networks trained on toy data from which others are distilled: recipes, training, shipped files."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffedu import weights
from diffedu.data import moons, swiss_roll
from diffedu.denoiser import NetDenoiser
from diffedu.networks import MLP
from diffedu.objectives import dsm_loss
from diffedu.schedules import VP, Schedule
from diffedu.training import Loss, Recipe, fit


def draw_times(schedule: Schedule, n: int, generator: torch.Generator) -> Tensor:
    """n training times (n,) on the generator's device, half of them uniform, half where shapes appear.

    The other half have lambda ~ N(1.2, 1), clipped to the schedule's range: the noise levels at which data of
    size 1 take shape. Source: a normal law for the noise level, Karras et al. 2022, table 1.
    """
    u = torch.rand(n, generator=generator, device=generator.device)
    uniform = schedule.t_min + (schedule.t_max - schedule.t_min) * u[: n // 2]
    z = torch.randn(n - n // 2, generator=generator, device=generator.device)
    lam = (1.2 + z).clamp(schedule.lam(schedule.t_max), schedule.lam(schedule.t_min))
    return torch.cat([uniform, schedule.t_of_lam(lam)])


def shipped_net(name: str) -> MLP:
    """The network of that name that comes with the package, on the CPU, in evaluation mode.

    Torch's global generator is left as it was. Raises ValueError where there is none of that name.
    """
    tensors, _ = weights.shipped(name)
    with torch.random.fork_rng(devices=[]):
        net = MLP()
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Teacher:
    """A v-prediction MLP for 2D data and all that its training depends on besides the seed.

    `draw(n, generator)` gives the data, of which `points` are drawn once for a run.
    """

    name: str
    draw: Callable[[int, torch.Generator | None], Tensor]
    recipe: Recipe
    batch: int = 512
    points: int = 200_000
    schedule: VP = field(default_factory=VP)

    def denoiser(self, net: nn.Module) -> NetDenoiser:
        """The network read as this teacher's v-prediction."""
        return NetDenoiser(net, self.schedule, "v")

    def untrained(self, seed: int) -> MLP:
        """The network before training; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MLP()

    def data(self, seed: int) -> Tensor:
        """The run's data, (points, 2)."""
        return self.draw(self.points, torch.Generator().manual_seed(seed))

    def loss(self, data: Tensor) -> Loss:
        """What `fit` minimises: denoising score matching in v at times of `draw_times`, (batch,)."""

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(data), (self.batch,), generator=generator, device=data.device)
            x0, t = data[rows], draw_times(self.schedule, self.batch, generator)
            eps = torch.randn(x0.shape, generator=generator, device=data.device)
            return dsm_loss(self.denoiser(net), x0, t, eps, weight="v")

        return values

    def train(
        self,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        checkpoint: str | Path | None = None,
        every: int = 1000,
        progress: bool = True,
    ) -> NetDenoiser:
        """Train from the seed; `checkpoint`, `every` and `progress` as in `fit`."""
        generator = torch.Generator(device).manual_seed(seed)
        net, data = self.untrained(seed).to(device), self.data(seed).to(device)
        fitted = fit(
            net,
            self.loss(data),
            self.recipe,
            generator,
            checkpoint=checkpoint,
            every=every,
            progress=progress,
        )
        return self.denoiser(fitted.net)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return f"the teacher on {self.name} data: {self.recipe.steps} steps of {self.batch}"

    def save(self, path: str | Path, denoiser: NetDenoiser, seed: int) -> list[Path]:
        """Write the network with all that made it: command, recipe, seed, digests of data and tensors.

        Returns the files written, here one.
        """
        tensors = denoiser.net.state_dict()
        recipe = asdict(self.recipe) | {"batch": self.batch, "points": self.points}
        metadata = {
            "command": f"python -m diffedu.train {self.name} --seed {seed}",
            "recipe": json.dumps(recipe),
            "schedule": repr(self.schedule),
            "seed": str(seed),
            "data_digest": weights.digest({"data": self.data(seed)}),
            "digest": weights.digest(tensors),
            "torch": torch.__version__,
        }
        weights.write(path, tensors, metadata)
        return [Path(path)]

    def load(self) -> NetDenoiser:
        """The network that comes with the package, on the CPU, in evaluation mode."""
        return self.denoiser(shipped_net(self.name))


SWISS_ROLL = Teacher("swiss-roll", swiss_roll, Recipe(steps=5000, lr=1.5e-2, ema=0.998))
MOONS = Teacher("moons", moons, Recipe(steps=3600, lr=1e-2, ema=0.998))
