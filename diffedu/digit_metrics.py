"""How good digits are: their Fréchet distance to the test images, and what the classifier sees in them."""

from functools import lru_cache

import torch
from torch import Tensor

from diffedu import weights
from diffedu.classifier import CHUNK, CLASSIFIER, FEATURES, STATISTICS, Classifier, stored
from diffedu.digits import CLASSES, SIDE
from diffedu.metrics import Moments, frechet_distance, moments


@lru_cache
def _classifier(device: torch.device) -> Classifier:
    return CLASSIFIER.load().to(device)


@lru_cache(maxsize=1)
def _statistics() -> Moments:
    return statistics(CLASSIFIER.load())


def statistics(net: Classifier) -> Moments:
    """Mean and covariance of the features of MNIST's 10,000 test images, as they come with the package.

    Raises ValueError unless they were made with this very classifier.
    """
    tensors, metadata = weights.shipped(STATISTICS)
    own, theirs = weights.digest(stored(net)), metadata.get("classifier_digest", "none")
    if own != theirs:
        raise ValueError(
            f"{STATISTICS} must belong to the classifier; it was made with that of digest {theirs[:16]}, "
            f"got one of digest {own[:16]}"
        )
    return Moments(tensors["mean"], tensors["cov"], int(metadata["n"]))


def features(images: Tensor) -> Tensor:
    """The classifier's features of digits (n, 1, 28, 28) in [-1, 1]: (n, 64).

    Raises ValueError for other shapes and values: samples of a network leave the interval by a little, so
    clamp them; images in [0, 1], which have nothing below 0, are to be mapped to 2 x - 1.
    """
    _require_digits(images)
    net = _classifier(images.device)
    with torch.no_grad():
        return torch.cat([net.features(part.float()) for part in torch.split(images, CHUNK)])


def frechet(images: Tensor) -> float:
    """The Fréchet distance of digits (n, 1, 28, 28) in [-1, 1] to the 10,000 test images, in the features.

    n matters: digits drawn from the data themselves come out at a floor about proportional to 1/n, so
    compare only values of equal n, and give n with the value. Its scale is that of the features of this
    classifier: values from another are not comparable either.
    Raises ValueError unless n exceeds the 64 features: below, the covariance is singular; and as `features`.
    Source: Heusel et al. 2017, who use the features of Inception.
    """
    _require_digits(images)
    if len(images) <= FEATURES:
        raise ValueError(
            f"n must exceed the {FEATURES} features, else their covariance is singular; got {len(images)}"
        )
    return frechet_distance(moments(features(images).cpu()), _statistics())


def probabilities(images: Tensor) -> Tensor:
    """The classifier's probabilities of the ten classes for digits (n, 1, 28, 28) in [-1, 1]: (n, 10).

    The largest is its confidence. Beware: it is high for much that is no digit. Raises as `features`.
    """
    seen = features(images)
    with torch.no_grad():
        logits: Tensor = _classifier(images.device).head(seen)
    return logits.softmax(1)


def accuracy(images: Tensor, labels: Tensor) -> float:
    """The share of digits (n, 1, 28, 28) in [-1, 1] that the classifier takes for their labels (n,).

    Raises ValueError for labels that are not n integers in 0 ... 9, and as `features`.
    """
    _require_digits(images)
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be {len(images)} integers, one an image; got {tuple(labels.shape)}, {labels.dtype}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= CLASSES:
        raise ValueError(f"labels must lie in 0 ... {CLASSES - 1}; got {low} ... {high}")
    guess = probabilities(images).argmax(1)
    return float((guess == labels.to(guess.device)).double().mean())


def _require_digits(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1:] != (1, SIDE, SIDE) or not images.is_floating_point():
        raise ValueError(
            f"images must be floats of shape (n, 1, {SIDE}, {SIDE}); got {tuple(images.shape)}, "
            f"{images.dtype}"
        )
    if len(images) == 0:
        raise ValueError("images must be one or more; got none")
    low, high = float(images.min()), float(images.max())  # nan if one is
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1] (clamp samples first); got values from {low} to {high}")
    if low >= 0:
        raise ValueError(f"images must lie in [-1, 1], -1 the background; got values from {low} to {high}")
