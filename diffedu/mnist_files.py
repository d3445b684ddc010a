"""Where the four files of MNIST come from."""

import os
from pathlib import Path

from torch import Tensor

from diffedu import idx

SPLITS = {"train": "train", "test": "t10k"}


def arrays(split: str, root: str | Path | None = None, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Images and labels of a split, as the files hold them."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}; got {split!r}")
    given = os.environ.get("DIFFEDU_DATA") if root is None else root
    if not given:
        raise ValueError("root or DIFFEDU_DATA must name a folder of the original IDX files; got neither")
    prefix = SPLITS[split]
    images, labels = (
        idx.decode(idx.unpack(Path(given) / name), name)
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    )
    return images, labels
