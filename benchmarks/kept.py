"""Tensors that an interrupted benchmark has already computed, in a file."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from diffedu import weights


class Kept:
    """Tensors by name, written as soon as they are made; a file with another `made` is void."""

    def __init__(self, path: Path, made: Mapping[str, str]) -> None:
        self.path, self.made = path, dict(made)
        self.tensors = self._held()

    def _held(self) -> dict[str, Tensor]:
        tensors, made = weights.read(self.path) if self.path.exists() else ({}, self.made)
        return tensors if made == self.made else {}

    def of(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of this name, by their own: those that are kept, or those that `make` returns."""
        start = f"{name}: "
        if not any(key.startswith(start) for key in self.tensors):
            found = {start + key: value.cpu() for key, value in make().items()}
            self.tensors |= self._held() | found  # another run may have written meanwhile
            weights.write(self.path, self.tensors, self.made)
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
