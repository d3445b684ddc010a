"""What a training run leaves to look at: a line of JSON and a picture of samples now and then."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffedu import weights
from diffedu.training import Fitted


def save_grid(path: str | Path, images: Tensor) -> None:
    """Write images (n, 1, H, W) in [-1, 1] as one PNG, side by side in rows of about sqrt(n), atomically.

    Values outside are clipped. Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 1 or not len(images):
        raise ValueError(f"images must be of shape (n, 1, H, W), n >= 1; got {tuple(images.shape)}")
    n, _, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    board = np.zeros((rows * columns, height, width), np.uint8)
    board[:n] = ((images[:, 0].detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().numpy()
    tiles = board.reshape(rows, columns, height, width).swapaxes(1, 2)
    with weights.replacing(path) as partial:
        Image.fromarray(tiles.reshape(rows * height, columns * width)).save(partial, format="png")


class RunLog:
    """Writes a line of JSON for each stage that `fit` lets it see, and a picture of samples beside it.

    A line has the step, the samples seen, the mean loss since the line before, the learning rate, the samples
    per second since the line before (none at the first of a process) and the picture's file. Lines of a step
    that comes again, after an interruption, are replaced. `draw(net)` gives images (n, 1, H, W) in [-1, 1].
    """

    def __init__(
        self, path: str | Path, batch: int, lr_at: Callable[[int], float], draw: Callable[[nn.Module], Tensor]
    ) -> None:
        self.path, self.batch, self.lr_at, self.draw = Path(path), batch, lr_at, draw
        self.last: tuple[int, float] | None = None  # the step of the last call, and when it was

    def __call__(self, stage: Fitted) -> None:
        """Add the line of this stage."""
        step = len(stage.losses)
        lines = [line for line in self.lines() if line["step"] < step]
        since = lines[-1]["step"] if lines else 0
        rate = None
        if self.last is not None:
            rate = round((step - self.last[0]) * self.batch / (time.perf_counter() - self.last[1]), 1)
        picture = self.path.with_name(f"{self.path.stem}-{step:06d}.png")
        with torch.no_grad():
            save_grid(picture, self.draw(stage.net))
        recent = stage.losses[since:]
        line = {
            "step": step,
            "samples": step * self.batch,
            "loss": sum(recent) / len(recent),
            "lr": self.lr_at(step),
            "samples_per_second": rate,
            "picture": picture.name,
        }
        with weights.replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(one) + "\n" for one in [*lines, line]), encoding="utf-8")
        self.last = (step, time.perf_counter())

    def lines(self) -> list[dict[str, Any]]:
        """What the file holds. Raises ValueError for a file that is not such a log."""
        if not self.path.exists():
            return []
        try:
            found = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(line["step"], int) for line in found):
                raise TypeError("a step must be an int")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not the log of a run ({error}): use another file") from error
        return found
