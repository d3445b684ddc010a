"""Ways to draw digits that a benchmark can measure."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor, nn

from benchmarks.digit_paths import Marching


@dataclass(frozen=True)
class Method:
    """A way to draw digits: `draw` takes noise x (B, 1, 28, 28) at t_max and labels (B,) to digits.

    What else is random in it comes from the generator that `draw` is given last. `used` are the evaluations
    that it spends of those allowed, `made` says to the letter what it is, with the digest of its network:
    what is measured is kept for as long as that is the same.
    """

    name: str
    evaluations: int
    used: int
    grid: str
    made: str
    draw: Callable[[Tensor, Tensor, Generator], Tensor]

    @property
    def key(self) -> tuple[str, int]:
        """Its name and evaluations."""
        return self.name, self.evaluations


def marched(marching: Marching, evaluations: int, net: nn.Module, digest: str) -> Method:
    """The base network's digits by a solver."""
    steps = marching.steps(evaluations)

    def draw(x: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return marching.end(net, evaluations, x, labels)

    return Method(
        marching.name,
        evaluations,
        steps * marching.calls,
        str(marching.spacing),
        f"{marching.solver!r}, {steps} steps, {marching.spacing}, network {digest}",
        draw,
    )
