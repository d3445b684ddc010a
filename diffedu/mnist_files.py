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
    "train-images-idx3-ubyte": "92e265b7414886ac52594f31a52609edbfc8c4bfa17dbe9e48c742312f417caa",
    "train-labels-idx1-ubyte": "f7122ad9ee966f9c5014cbeac576e34fabb37bb75738f2f277c6fd4a7ba36fd4",
    "t10k-images-idx3-ubyte": "780e99a56e963f3affe4791a03545a6ddbdc0904dd880c7f3c50753282177303",
    "t10k-labels-idx1-ubyte": "b547e409b08f1d55c77b7f0964dfb27202f97c41c014d9427a3acecfcf6a7129",
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
    """The subset in the package: of each class the first 800 training or 200 test digits, as they come.

    In the order of the original files. Images (8000 or 2000, 28, 28) and labels (8000 or 2000,), both uint8.
    It needs no network.
    """
    with as_file(files("diffedu") / "mnist") as folder:
        images, labels = (_read(folder / f"{name}.xz", SUBSET[name]) for name in _names(split))
    return images, labels


def _names(split: str) -> tuple[str, str]:
    if split not in FILES:
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
