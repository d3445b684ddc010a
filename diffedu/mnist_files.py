"""The four files of MNIST: from a folder, the cache, the mirrors, or the subset in the package.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits; made from NIST's
Special Databases 1 and 3, and under the licence CC BY-SA 3.0, which the subset in the package keeps.
"""

import hashlib
import os
import sys
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from diffedu import idx, mirrors

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the uncompressed files
FULL = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The same of the subset, as tools/mnist_subset.py prints it
SUBSET = {
    "train-images-idx3-ubyte": "5044cfd200506345b056065b1ec48ceefc4aea7afb29339028412f2681a2ee6f",
    "train-labels-idx1-ubyte": "4d96d3a98710f493d73689c75a33df66be4208c3221af55114e1816fa47bd9da",
    "t10k-images-idx3-ubyte": "0a2a978ac97c9ffe5524643f23f15c688c7c4b82e1ce271f4060492e4a74cae4",
    "t10k-labels-idx1-ubyte": "601a3cc86da79e5dcf5265d52b4dd14eb2e0ee0c69c9792c036ed8b98dcb05fa",
}
# What comes before a file's name and ".gz"
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
HELP = (
    "for all of MNIST, connect to the network and ask with full=True, or name a folder of the original "
    "IDX files by root or by the environment variable DIFFEDU_DATA"
)


def arrays(split: str, root: str | Path | None = None, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) and labels (n,), both uint8, from the sources that `data.mnist` describes."""
    names = _names(split)
    given = os.environ.get("DIFFEDU_DATA") or None if root is None else root
    if given is not None:
        images, labels = (_read(_find(Path(given).expanduser(), name), FULL[name]) for name in names)
        return images, labels
    if full:
        mirrors.forget()
    try:
        folder = mirrors.cache()
        images, labels = (
            _read(mirrors.fetch(name, FULL[name], MIRRORS, folder), FULL[name]) for name in names
        )
    except ConnectionError as error:
        if full:
            raise ValueError(f"{error}: {HELP}") from error
        images, labels = subset(split)
        print(
            f"MNIST: only the {len(labels):,} {split} digits that come with diffedu, because {error}; {HELP}",
            file=sys.stderr,
        )
    return images, labels


def subset(split: str) -> tuple[Tensor, Tensor]:
    """The subset in the package: of each class 800 training or 200 test digits, evenly spaced over all of it.

    In the order of the original files. Images (8000 or 2000, 28, 28) and labels (8000 or 2000,), both uint8.
    It needs no network.
    """
    with as_file(files("diffedu") / "mnist") as folder:
        images, labels = (_read(folder / f"{name}.xz", SUBSET[name]) for name in _names(split))
    return images, labels


def _names(split: str) -> tuple[str, str]:
    if split not in tuple(FILES):
        raise ValueError(f"split must be one of {sorted(FILES)}; got {split!r}")
    return FILES[split]


def _find(root: Path, name: str) -> Path:
    """The file of that name in a folder, or in the MNIST/raw below it, plain or compressed by gzip."""
    for folder in (root, root / "MNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if os.path.isfile(path):  # False, too, where the folder may not be looked into
                return path
    raise ValueError(
        f"root, or DIFFEDU_DATA, must be a folder that holds {name} or {name}.gz, itself or in its "
        f"MNIST/raw; got {root}, where neither is to be found"
    )


def _read(path: Path, digest: str) -> Tensor:
    """The array in an IDX file whose content has this digest."""
    content = idx.unpack(path)
    array, got = idx.decode(content, str(path)), hashlib.sha256(content).hexdigest()
    if got != digest:
        raise ValueError(
            f"{path} is damaged or not MNIST's: its content must have the SHA-256 {digest}; got {got}"
        )
    return array
