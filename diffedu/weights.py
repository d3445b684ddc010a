"""Safetensors files: atomic writes, checked reads, digests; and those that come with the package."""

import hashlib
import os
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to path, atomically: the old file or the new one, never half of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, dict(metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
