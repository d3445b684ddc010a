"""What the classifier tells of digits besides their distance to the data; a network's loss on test images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training import seeded
from diffedu.classifier import Classifier
from diffedu.digits import CLASSES, MNIST

SURE = 0.9  # a probability of a class below this is no clear digit of it
LOSS_BATCH, LOSS_DRAWS = 1000, 10


def spread(seen: Tensor, labels: Tensor) -> tuple[float, float]:
    """How unlike the digits of a class are: the variance of their features (n, 64), and its standard error.

    Summed over the features, averaged over the classes. Not a number where a class has less than two.
    """
    if int(torch.bincount(labels, minlength=CLASSES).min()) < 2:
        return math.nan, math.nan
    classes = [seen[labels == c].double() for c in range(CLASSES)]
    squares = [(f - f.mean(0)).square().sum(1) * len(f) / (len(f) - 1) for f in classes]
    error = math.sqrt(sum(float(each.var()) / len(each) for each in squares)) / len(squares)
    return sum(float(each.mean()) for each in squares) / len(squares), error


def told(classifier: Classifier, seen: Tensor, labels: Tensor | None) -> dict[str, float | None]:
    """What the classifier makes of digits by their features (n, 64).

    The share of which no class has a probability above 0.9; and with labels, of what was asked for, the share
    that is taken for it and the spread, of all and of these. None where there are no labels.
    """
    with torch.no_grad():
        chances = classifier.head(seen).softmax(1)
    found: dict[str, float | None] = dict.fromkeys(
        ("accuracy", "spread", "spread_error", "spread_recognised")
    )
    found["unsure"] = float((chances.max(1).values < SURE).double().mean())
    if labels is not None:
        right = chances.argmax(1) == labels
        found["accuracy"] = float(right.double().mean())
        found["spread"], found["spread_error"] = spread(seen, labels)
        found["spread_recognised"] = spread(seen[right], labels[right])[0]
    return found


def held_out_loss(net: nn.Module, images: Tensor, labels: Tensor, facts: dict[str, str]) -> dict[str, Any]:
    """The training's loss of a network on test images (n, 28, 28), as many labels hidden as in training.

    Every network sees the same batches, times and noise. `facts` is the metadata of its file.
    """
    loss, recipe = replace(MNIST, batch=LOSS_BATCH).loss(images, labels), json.loads(facts["recipe"])
    with torch.no_grad():
        draws = [float(loss(net, seeded(60_000 + k)).mean()) for k in range(LOSS_DRAWS)]
    values = torch.tensor(draws, dtype=torch.float64)
    return {
        "images": recipe["steps"] * recipe["batch"],
        "digest": facts["digest"],
        "loss": float(values.mean()),
        "standard_error": float(values.std()) / math.sqrt(len(values)),
        "by_draw": draws,
    }


def with_earlier(own: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The losses that an earlier run wrote of other networks into the file, and this one, by images seen."""
    found = json.loads(path.read_text()).get("test_losses", []) if path.exists() else []
    return sorted([*(f for f in found if f["digest"] != own["digest"]), own], key=lambda f: f["images"])
