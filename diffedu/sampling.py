"""The one sampling loop: any solver, any denoiser, down in time or up."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffedu.checks import require_state, require_times
from diffedu.denoiser import Counted, Denoiser
from diffedu.schedules import Schedule
from diffedu.sde import randn_like


class Solver(Protocol):
    """A method for one interval of the grid; what it needs of the grid is computed once, as floats."""

    @property
    def order(self) -> float:
        """Global order of convergence (weak order for a stochastic solver)."""

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""

    def coefficients(self, schedule: Schedule, ts: Sequence[float]) -> Sequence[Any]:
        """One record of Python floats for each interval of the times ts."""

    def step(
        self, denoiser: Denoiser, x: Tensor, c: Any, state: Any, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Any]:
        """The state after the interval of record c, and what the next step must remember."""


class Step(NamedTuple):
    """A point of a trajectory: the state x (B, *), its time, the evaluations spent so far."""

    x: Tensor
    t: float
    nfe: int


def prior(
    schedule: Schedule,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws from N(0, sigma(t_max)^2 I), the law from which sampling starts: a tensor of `shape`.

    On the device asked for, else the generator's, else torch's default.

    Equations: eq-vp-prior
    """
    if device is None and generator is not None:
        device = generator.device
    z = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
    return schedule.sigma(schedule.t_max) * z


def trajectory(
    denoiser: Denoiser,
    solver: Solver,
    x: Tensor,
    ts: Tensor | Sequence[float],
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """The states at every time of ts, n + 1 of them, the first x (B, *) itself with nfe = 0.

    ts strictly descending in [t_min, t_max], two times or more; x is the state at ts[0]. Raises ValueError
    for other times and for states that are not finite floats. No gradients are recorded.
    """
    require_state(x)
    times = require_times(ts, denoiser.schedule.t_min, denoiser.schedule.t_max, descending=True)
    records = solver.coefficients(denoiser.schedule, times)  # here, so that a bad grid is refused at once
    return _run(Counted(denoiser), solver, x, times, records, generator)


def sample(
    denoiser: Denoiser,
    solver: Solver,
    x: Tensor,
    ts: Tensor | Sequence[float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """The state at ts[-1], (B, *), from x at ts[0]; arguments and errors as for `trajectory`."""
    return _last(trajectory(denoiser, solver, x, ts, generator))


def encode(denoiser: Denoiser, solver: Solver, x: Tensor, ts: Tensor | Sequence[float]) -> Tensor:
    """The state at ts[-1], (B, *), from x at ts[0], up in time: ts ascends, the solver is deterministic.

    Raises ValueError for a stochastic solver, which has no inverse, and otherwise as `trajectory`.
    Equations: eq-invertible
    """
    if solver.stochastic:
        raise ValueError(f"encode needs a deterministic solver (eta = 0); got {solver}")
    require_state(x)
    times = require_times(ts, denoiser.schedule.t_min, denoiser.schedule.t_max, descending=False)
    records = solver.coefficients(denoiser.schedule, times)
    return _last(_run(Counted(denoiser), solver, x, times, records, None))


@torch.no_grad()
def _run(
    denoiser: Counted,
    solver: Solver,
    x: Tensor,
    times: list[float],
    records: Sequence[Any],
    generator: torch.Generator | None,
) -> Iterator[Step]:
    def noise() -> Tensor:
        return randn_like(x, generator)

    yield Step(x, times[0], 0)
    state = None
    for c, s in zip(records, times[1:], strict=True):
        x, state = solver.step(denoiser, x, c, state, noise)
        yield Step(x, s, denoiser.nfe)


def _last(steps: Iterator[Step]) -> Tensor:
    x = None
    for step in steps:
        x = step.x
    assert x is not None  # a trajectory has two steps or more
    return x
