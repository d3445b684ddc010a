"""The one training loop: Adam with cosine decay, EMA, progress, exact resume."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffedu import weights
from diffedu.checks import require_count
from diffedu.recipes import Recipe as Recipe
from diffedu.recipes import Restarted as Restarted

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass
class Fitted:
    """A trained network, or one in training: `net` has the EMA weights; `losses` a mean for each step."""

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
    batch: int = 1,
    made: Mapping[str, str] | None = None,
    watch: Callable[[Fitted], None] | None = None,
    accelerator: "Accelerator | None" = None,
) -> Fitted:
    """Minimise the mean of loss(net, generator) (B,); the net is trained in place, its EMA returned.

    All randomness must come from the generator. With a checkpoint (a safetensors file, written every `every`
    steps and at the end, replaced atomically) an interrupted run goes on where the file stands and ends bit
    for bit where an uninterrupted one ends. `made`, kept in the checkpoint, names what else the run depends
    on, such as its data. `stop_after` ends this call after so many steps. The progress bar counts `batch`
    samples a step; `watch` sees what there is whenever the checkpoint is due.
    With an accelerator of several processes, each of which must draw the same generator's whole batch and
    return the losses of its own equal part, all take the steps that one process would take; the first one
    writes, shows and watches.
    Raises ValueError for a checkpoint of another recipe, `made`, network or kind of device, for one that not
    every process sees, and for a loss that is not finite. Equations: eq-algorithm-1
    """
    if stop_after is not None:
        require_count("stop_after", stop_after)
    require_count("every", every)
    require_count("batch", batch)
    first_process = accelerator is None or accelerator.is_main_process
    average = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
    run = _Run(net, average, optimiser, generator, recipe, dict(made or {}), [], accelerator)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path)
    run.require_equal_starts()
    last = recipe.steps if stop_after is None else min(recipe.steps, len(run.losses) + stop_after)
    first = len(run.losses)
    with tqdm(
        total=recipe.steps * batch,
        initial=first * batch,
        disable=not (progress and first_process),
        mininterval=0.5,
        unit="steps" if batch == 1 else "samples",
    ) as bar:
        for step in range(first, last):
            run.advance(step, loss)
            bar.update(batch)
            if step % 100 == 99:
                bar.set_postfix(loss=f"{sum(run.losses[-100:]) / 100:.4f}", refresh=False)
            if first_process and ((step + 1) % every == 0 or step + 1 == last):
                if path is not None:
                    run.save(path)
                if watch is not None:
                    watch(Fitted(average.eval(), run.losses))
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return Fitted(average.eval(), run.losses)


@dataclass
class _Run:
    """Everything that a run's future depends on."""

    net: nn.Module
    average: nn.Module
    optimiser: torch.optim.Adam
    generator: torch.Generator
    recipe: Recipe
    made: dict[str, str]
    losses: list[float]
    accelerator: "Accelerator | None"

    def __post_init__(self) -> None:
        # The same weights; with several processes their gradients become the mean over all.
        self._shared = self.net if self.accelerator is None else self.accelerator.prepare_model(self.net)
        # Each tensor of the average beside the net's own; both share storage with their modules.
        self._pairs = list(
            zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True)
        )

    def advance(self, step: int, loss: Loss) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        self.optimiser.zero_grad(set_to_none=True)
        value = loss(self._shared, self.generator).mean()
        torch.autograd.backward(value)
        mean = value.detach() if self.accelerator is None else self.accelerator.reduce(value.detach(), "mean")
        number = float(mean)
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

    def require_equal_starts(self) -> None:
        """Refuse to start where one machine sees the checkpoint and another does not."""
        if self.accelerator is not None:
            own = torch.tensor([len(self.losses)], device=self.accelerator.device)
            steps = self.accelerator.gather(own).tolist()
            if len(set(steps)) > 1:
                raise ValueError(
                    f"every process must see the checkpoint; got runs that stand at steps {steps}"
                )

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
        weights.write(
            path, self.tensors(), {"recipe": json.dumps(asdict(self.recipe)), "made": json.dumps(self.made)}
        )

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
        made = json.loads(metadata.get("made", "null"))
        if made not in (None, self.made):
            raise ValueError(
                f"{path} belongs to a run of {made}, this one is of {self.made}: use another file"
            )
        if state["generator"].shape != self.generator.get_state().shape:
            raise ValueError(
                f"{path} was written on another kind of device than {self.generator.device}: "
                "go on there or use another file"
            )
        self.net.load_state_dict({k: state[f"net.{k}"] for k in shapes})
        self.average.load_state_dict({k: state[f"ema.{k}"] for k in shapes})
        moments = ("step", "exp_avg", "exp_avg_sq")
        self.optimiser.load_state_dict(
            {
                "state": {
                    i: {k: _laid_out(state[f"adam.{i}.{k}"], parameter) for k in moments}
                    for i, parameter in enumerate(self.net.parameters())
                    if f"adam.{i}.step" in state  # a frozen parameter has none
                },
                "param_groups": self.optimiser.state_dict()["param_groups"],
            }
        )
        self.generator.set_state(state["generator"])
        self.losses[:] = state["losses"].tolist()


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment in the memory format of its parameter, as the fused optimiser takes it to be."""
    like = parameter if value.shape == parameter.shape else value
    return torch.empty_like(like).copy_(value)  # not the file's own memory, which Windows would hold on to
