"""Tensors that an interrupted benchmark has already computed, in a file."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from diffedu import weights


class Kept:
    """Tensors by name, written as soon as they are made; a file with another `made` is void."""

    def __init__(self, path: Path, made: Mapping[str, str]) -> None:
        self.path, self.made = path, dict(made)
        self.tensors: dict[str, Tensor] = {}
        if path.exists():
            tensors, theirs = weights.read(path)
            self.tensors = tensors if theirs == self.made else {}

    def of(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of this name, by their own: those that are kept, or those that `make` returns."""
        start = f"{name}: "
        if not any(key.startswith(start) for key in self.tensors):
            self.tensors |= {start + key: value.cpu() for key, value in make().items()}
            weights.write(self.path, self.tensors, self.made)
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
