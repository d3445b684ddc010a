"""The classifier of digits in whose features samples are compared with the data: recipe, training, file."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffedu import weights
from diffedu.data import mnist
from diffedu.digits import CLASSES, SIDE, to_floats
from diffedu.metrics import moments
from diffedu.training import Loss, Recipe, fit

FEATURES = 64
CHUNK = 500  # images that pass through the network at a time: as much as the cache holds
STATISTICS = "mnist-statistics"


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A 3 x 3 convolution, batch norm (Ioffe & Szegedy 2015), ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """A convolutional network: digits in [-1, 1], (B, 1, 28, 28) -> logits of the ten classes, (B, 10).

    Six 3 x 3 convolutions, at 28, 14 and 7 pixels a side; the features are the means of the last one's 64
    channels over the image, the logits an affine map of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(1, 16),
            _convolution(16, 32, stride=2),
            _convolution(32, 32),
            _convolution(32, 64, stride=2),
            _convolution(64, 64),
            _convolution(64, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees of digits x (B, 1, 28, 28): (B, 64), none negative."""
        output: Tensor = self.layers(x).mean(dim=(2, 3))
        return output

    def forward(self, x: Tensor) -> Tensor:
        """The logits of x (B, 1, 28, 28): (B, 10)."""
        output: Tensor = self.head(self.features(x))
        return output


def in_chunks(images: Tensor) -> Iterator[Tensor]:
    """Images 0 ... 255, (n, 28, 28) uint8, as floats in [-1, 1], (at most 500, 1, 28, 28) at a time."""
    return (to_floats(part) for part in torch.split(images, CHUNK))


def stored(net: Classifier) -> dict[str, Tensor]:
    """The tensors as a file holds them: floats in half precision."""
    return {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}


def restored(tensors: dict[str, Tensor]) -> Classifier:
    """The classifier of a file's tensors, in single precision, on the CPU, in evaluation mode.

    Torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        net = Classifier()
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class ClassifierTraining:
    """All that the classifier's training depends on besides the seed.

    Each image of a batch is turned by up to `turn` degrees, enlarged or shrunk by a factor of up to
    exp(`zoom`) and moved by up to `shift` pixels along each axis, each uniformly.
    """

    name: str
    recipe: Recipe
    batch: int = 128
    turn: float = 12.0
    zoom: float = 0.12
    shift: float = 2.0

    def untrained(self, seed: int) -> Classifier:
        """The network before training; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Classifier()

    def moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Digits x (B, 1, 28, 28), each turned, scaled and moved by chance; what comes in is background."""
        u = 2 * torch.rand(4, len(x), generator=generator, device=x.device) - 1
        angle, factor = math.radians(self.turn) * u[0], torch.exp(self.zoom * u[1])
        across, down = 2 * self.shift / SIDE * u[2:]  # the sides of an image lie at -1 and 1
        c, s = factor * angle.cos(), factor * angle.sin()
        maps = torch.stack([c, -s, across, s, c, down], dim=1).reshape(-1, 2, 3)
        places = nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
        return nn.functional.grid_sample(x + 1, places, align_corners=False) - 1

    def loss(self, images: Tensor, labels: Tensor) -> Loss:
        """What `fit` minimises: the cross entropy on moved images, (batch,).

        images (n, 28, 28) uint8, labels (n,) int64.
        """

        def values(net: nn.Module, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(images), (self.batch,), generator=generator, device=images.device)
            x = self.moved(to_floats(images[rows]), generator)
            return nn.functional.cross_entropy(net(x), labels[rows], reduction="none")

        return values

    def train(
        self,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        checkpoint: str | Path | None = None,
        every: int = 250,
        progress: bool = True,
    ) -> Classifier:
        """Train on the 60,000 images from the seed; `checkpoint`, `every` and `progress` as in `fit`."""
        images, labels = mnist("train", full=True)
        net = self.untrained(seed).to(device)
        fitted = fit(
            net,
            self.loss(images.to(device), labels.to(device)),
            self.recipe,
            torch.Generator(device).manual_seed(seed),
            checkpoint=checkpoint,
            every=every,
            progress=progress,
        )
        net.load_state_dict(fitted.net.state_dict())
        return net.eval()

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return f"the classifier of MNIST's Fréchet distance: {self.recipe.steps} steps of {self.batch}"

    def save(self, path: str | Path, net: Classifier, seed: int) -> list[Path]:
        """Write the classifier, and beside it the mean and covariance of the test images' features.

        The floats are rounded to half precision first, and all that is stated is measured after that. Both
        files hold the command, the recipe, the seed, the revision and the digests of tensors and data.
        Returns the files: `path`, and mnist-statistics.safetensors in the same folder.
        """
        path, tensors = Path(path), stored(net)
        rounded, (images, labels) = restored(tensors), mnist("test", full=True)
        with torch.no_grad():
            features = torch.cat([rounded.features(x) for x in in_chunks(images)])
            right = int((rounded.head(features).argmax(1) == labels).sum())
        summary = moments(features)
        statistics = {"mean": summary.mean, "cov": summary.cov}
        train_images, train_labels = mnist("train", full=True)
        settings = {k: getattr(self, k) for k in ("batch", "turn", "zoom", "shift")}
        made = {
            "command": f"python -m diffedu.train {self.name} --seed {seed}",
            "recipe": json.dumps(asdict(self.recipe) | settings),
            "seed": str(seed),
            "test_data_digest": weights.digest({"images": images, "labels": labels}),
            "revision": weights.revision(),
            "torch": torch.__version__,
        }
        own = {
            "data_digest": weights.digest({"images": train_images, "labels": train_labels}),
            "test_accuracy": str(right / len(labels)),
            "digest": weights.digest(tensors),
        }
        other = {
            "n": str(summary.n),
            "classifier_digest": own["digest"],
            "digest": weights.digest(statistics),
        }
        beside = path.with_name(f"{STATISTICS}.safetensors")
        weights.write(path, tensors, made | own)
        weights.write(beside, statistics, made | other)
        return [path, beside]

    def load(self) -> Classifier:
        """The classifier that comes with the package, in single precision, on the CPU, in evaluation mode."""
        return restored(weights.shipped(self.name)[0])


CLASSIFIER = ClassifierTraining(
    "mnist-classifier", Recipe(steps=2600, lr=5e-3, ema=0.995, beta2=0.99, warmup=100)
)
