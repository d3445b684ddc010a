"""The one training loop: Adam with cosine decay, EMA, progress, exact resume."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffedu import weights
from diffedu.checks import require_count

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What fixes a training run besides its network, its loss and its generator's state.

    Raises ValueError for a learning rate that is not positive or an EMA decay outside [0, 1).
    """

    steps: int
    lr: float = 3e-3
    ema: float = 0.999

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive; got {self.lr!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1); got {self.ema!r}")

    def lr_at(self, step: int) -> float:
        """Cosine decay from lr to 0 (Loshchilov & Hutter 2017)."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * step / self.steps))

    def decay_at(self, step: int) -> float:
        """The EMA's decay, which starts small so that the first weights are soon forgotten."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass
class Fitted:
    """A trained network: `net` holds the EMA weights; `losses` one mean loss per step taken."""

    net: nn.Module
    losses: list[float]


def fit(
    net: nn.Module,
    loss: Loss,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    stop_after: int | None = None,
    progress: bool = True,
) -> Fitted:
    """Minimise the mean of loss(net, generator) (B,); the net is trained in place, its EMA returned.

    All randomness must come from the generator. With a checkpoint (a safetensors file, written every `every`
    steps and at the end, replaced atomically) an interrupted run goes on where the file stands and ends bit
    for bit where an uninterrupted one ends. `stop_after` ends this call after so many steps.
    Raises ValueError for a checkpoint of another recipe or network, and for a loss that is not finite.
    Equations: eq-algorithm-1
    """
    if stop_after is not None:
        require_count("stop_after", stop_after)
    require_count("every", every)
    average = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.lr, fused=True)
    run = _Run(net, average, optimiser, generator, recipe, losses=[])
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path)
    last = recipe.steps if stop_after is None else min(recipe.steps, len(run.losses) + stop_after)
    first = len(run.losses)
    with tqdm(total=recipe.steps, initial=first, disable=not progress, mininterval=0.5) as bar:
        for step in range(first, last):
            run.advance(step, loss)
            bar.update()
            if step % 100 == 99:
                bar.set_postfix(loss=f"{sum(run.losses[-100:]) / 100:.4f}", refresh=False)
            if path is not None and ((step + 1) % every == 0 or step + 1 == last):
                run.save(path)
    return Fitted(average.eval(), run.losses)


@dataclass
class _Run:
    """Everything that a run's future depends on."""

    net: nn.Module
    average: nn.Module
    optimiser: torch.optim.Adam
    generator: torch.Generator
    recipe: Recipe
    losses: list[float]

    def __post_init__(self) -> None:
        # Each tensor of the average beside the net's own; both share storage with their modules.
        self._pairs = list(
            zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True)
        )

    def advance(self, step: int, loss: Loss) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        self.optimiser.zero_grad(set_to_none=True)
        value = loss(self.net, self.generator).mean()
        torch.autograd.backward(value)
        number = float(value.detach())
        if not math.isfinite(number):
            raise ValueError(f"the loss must be finite; got {number} at step {step}")
        self.optimiser.step()
        self.losses.append(number)
        weight = 1 - self.recipe.decay_at(step)
        for mean, new in self._pairs:
            if mean.is_floating_point():
                mean.lerp_(new, weight)
            else:
                mean.copy_(new)

    def tensors(self) -> dict[str, Tensor]:
        state = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        for i, parameter in enumerate(self.net.parameters()):
            moments = self.optimiser.state[parameter]
            state |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        state["generator"] = self.generator.get_state()
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return state

    def save(self, path: Path) -> None:
        weights.write(path, self.tensors(), {"recipe": json.dumps(asdict(self.recipe))})

    def load(self, path: Path) -> None:
        state, metadata = weights.read(path)
        recipe = json.loads(metadata.get("recipe", "null"))
        if recipe != asdict(self.recipe):
            raise ValueError(
                f"{path} was made with the recipe {recipe}, this run has {asdict(self.recipe)}: "
                "use that recipe or another file"
            )
        shapes = {k: (tuple(v.shape), v.dtype) for k, v in self.net.state_dict().items()}
        found = {k[4:]: (tuple(v.shape), v.dtype) for k, v in state.items() if k.startswith("net.")}
        if found != shapes:
            raise ValueError(f"{path} holds a network of {found}; this one has {shapes}: use another file")
        self.net.load_state_dict({k: state[f"net.{k}"] for k in shapes})
        self.average.load_state_dict({k: state[f"ema.{k}"] for k in shapes})
        moments = ("step", "exp_avg", "exp_avg_sq")
        self.optimiser.load_state_dict(
            {
                "state": {
                    i: {k: state[f"adam.{i}.{k}"] for k in moments}
                    for i, _ in enumerate(self.net.parameters())
                    if f"adam.{i}.step" in state  # a frozen parameter has none
                },
                "param_groups": self.optimiser.state_dict()["param_groups"],
            }
        )
        self.generator.set_state(state["generator"])
        self.losses[:] = state["losses"].tolist()
