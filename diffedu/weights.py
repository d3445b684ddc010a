"""Safetensors files: atomic writes, checked reads, digests; and those that come with the package."""

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end: the old file or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def numbered(path: str | Path, n: int | None) -> Path:
    """The path with -n before its suffix; for None as it is."""
    path = Path(path)
    return path if n is None else path.with_name(f"{path.stem}-{n}{path.suffix}")


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to path, atomically."""
    with replacing(path) as partial:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, dict(metadata))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a file. Raises ValueError for one that is not readable."""
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): delete it") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order and the device."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def revision() -> str:
    """The package's version and, where it runs from a git checkout, the commit."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{version('diffedu')} {commit}".strip()


def shipped(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file `name`.safetensors that comes with the package.

    Raises ValueError where there is none of that name, and where its tensors are not those of its digest.
    """
    with as_file(files("diffedu") / "pretrained") as folder:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            known = sorted(p.stem for p in folder.glob("*.safetensors"))
            raise ValueError(f"name must be one of {known}; got {name!r}")
        tensors, metadata = read(path)
    if digest(tensors) != metadata.get("digest"):
        raise ValueError(f"{path} is damaged: its tensors do not have its digest {metadata.get('digest')!r}")
    return tensors, metadata
