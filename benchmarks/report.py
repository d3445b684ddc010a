"""What every benchmark's JSON says of its making, and the tables it prints."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import diffedu
from diffedu import weights

RESULTS = Path(__file__).parent / "results"


def package_digest() -> str:
    """SHA-256 of the package's source."""
    total = hashlib.sha256()
    for path in sorted(Path(diffedu.__file__).parent.glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def write(path: Path, command: str, results: dict[str, Any]) -> None:
    """Write results and how they were made, atomically."""
    made = {
        "command": command,
        "package_digest": package_digest(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    with weights.replacing(path) as partial:
        partial.write_text(json.dumps({"made": made} | results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned text; the first column to the left, the others to the right."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
