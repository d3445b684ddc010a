"""Make diffedu/mnist, the digits that come with the package, from a folder of the original IDX files.

    python tools/mnist_subset.py --root FOLDER

As many digits of each class, evenly spaced over all of that class, in the order of the files: their first
would not do, because the first half of the test set is written more neatly than the second. IDX again,
compressed by xz.
Prints the SHA-256 of the uncompressed files, which diffedu/mnist_files.py keeps and checks.
"""

import argparse
import hashlib
import lzma
from pathlib import Path

import torch
from torch import Tensor

from diffedu import idx, mnist_files

TARGET = Path(__file__).resolve().parent.parent / "diffedu" / "mnist"
PER_CLASS = {"train": 800, "test": 200}  # the largest pair of round numbers that 1.5 MB hold
# Four bits of the byte before are the best context for grey values, by trial.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def evenly_of_each_class(labels: Tensor, n: int) -> Tensor:
    """n rows of each class, ascending: of its m rows those at floor(i m / n), i = 0 ... n - 1."""
    of_class = [torch.nonzero(labels == c).flatten() for c in range(10)]
    rows = [rows[torch.arange(n) * len(rows) // n] for rows in of_class]
    return torch.cat(rows).sort().values


def main() -> None:
    """Write the four files and print their digests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder of the original IDX files")
    root = parser.parse_args().root
    TARGET.mkdir(exist_ok=True)
    total = 0
    for split, names in mnist_files.FILES.items():
        images, labels = mnist_files.arrays(split, root)
        rows = evenly_of_each_class(labels, PER_CLASS[split])
        for name, array in zip(names, (images[rows], labels[rows]), strict=True):
            content = idx.encode(array)
            packed = lzma.compress(content, format=lzma.FORMAT_XZ, filters=XZ)
            (TARGET / f"{name}.xz").write_bytes(packed)
            total += len(packed)
            print(f'    "{name}": "{hashlib.sha256(content).hexdigest()}",')
    print(f"{total:,} bytes in {TARGET}")


if __name__ == "__main__":
    main()
