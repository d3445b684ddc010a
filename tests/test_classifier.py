import json
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from problems import within
from scipy.linalg import sqrtm

from diffedu import classifier, digit_metrics, weights
from diffedu.classifier import CLASSIFIER, STATISTICS, Classifier
from diffedu.data import mnist
from diffedu.digit_metrics import accuracy, features, frechet, probabilities, statistics
from diffedu.digits import to_floats
from diffedu.mnist_files import subset
from diffedu.training import Recipe

TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # of the classes in MNIST's test set
SHORT = replace(CLASSIFIER, recipe=Recipe(steps=12, lr=3e-3, ema=0.5), batch=32)
needs_all = pytest.mark.skipif(
    not os.environ.get("DIFFEDU_DATA"), reason="no folder of all MNIST files is given"
)


@pytest.fixture(scope="module")
def test_digits():
    images, labels = subset("test")
    return to_floats(images), labels.long()


@pytest.fixture(scope="module")
def train_digits():
    images, labels = subset("train")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]
    return to_floats(images[rows]), labels[rows].long()


@pytest.fixture
def only_the_subset(monkeypatch):
    def shipped(split, root=None, *, full=False):
        images, labels = subset(split)
        return images[::7][:300], labels[::7][:300].long()

    monkeypatch.setattr(classifier, "mnist", shipped)


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A folder of copies of both files, which the package takes for its own."""
    digit_metrics._classifier.cache_clear()
    digit_metrics._statistics.cache_clear()
    folder = tmp_path / "pretrained"
    for name in (CLASSIFIER.name, STATISTICS):
        weights.write(folder / f"{name}.safetensors", *weights.shipped(name))
    monkeypatch.setattr(weights, "files", lambda package: tmp_path)
    yield folder
    digit_metrics._classifier.cache_clear()
    digit_metrics._statistics.cache_clear()


def test_the_shipped_files_are_those_of_the_recipe():
    settings = {"batch": 128, "turn": 12.0, "zoom": 0.12, "shift": 2.0}
    for name in (CLASSIFIER.name, STATISTICS):
        _, metadata = weights.shipped(name)
        assert metadata["command"] == "python -m diffedu.train mnist-classifier --seed 0"
        assert json.loads(metadata["recipe"]) == asdict(CLASSIFIER.recipe) | settings
        assert metadata["revision"].startswith("0.")
    assert {k: getattr(CLASSIFIER, k) for k in settings} == settings


def test_the_shipped_classifier_is_small_and_reaches_the_goal():
    tensors, metadata = weights.shipped(CLASSIFIER.name)
    assert sum(value.numel() * value.element_size() for value in tensors.values()) < 1_000_000
    assert float(metadata["test_accuracy"]) >= 0.995


def test_the_accuracy_on_the_subset_is_that_of_the_file(test_digits):
    # some of the 10,000 test images: no more of them can be wrong than of all
    wrong = 10_000 * (1 - float(weights.shipped(CLASSIFIER.name)[1]["test_accuracy"]))
    share = accuracy(*test_digits)
    assert 0.99 < share <= 1
    assert (
        len(test_digits[1]) * (1 - share) <= wrong + 1.5
    )  # one or two near the border may fall otherwise elsewhere


@needs_all
def test_on_all_test_images_accuracy_and_statistics_are_those_of_the_files():
    images, labels = mnist("test", full=True)
    metadata = weights.shipped(CLASSIFIER.name)[1]
    assert weights.digest({"images": images, "labels": labels}) == metadata["test_data_digest"]
    seen, net = features(to_floats(images)), CLASSIFIER.load()
    right = (net.head(seen).argmax(1) == labels).double().mean()
    assert right == pytest.approx(float(metadata["test_accuracy"]), abs=2e-4)
    kept, seen = statistics(net), seen.double()
    torch.testing.assert_close(seen.mean(0), kept.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.cov(seen.numpy().T), kept.cov, rtol=1e-3, atol=1e-6)


@needs_all
def test_the_training_data_are_those_of_the_file():
    images, labels = mnist("train", full=True)
    digest = weights.shipped(CLASSIFIER.name)[1]["data_digest"]
    assert weights.digest({"images": images, "labels": labels}) == digest


def test_the_statistics_are_those_of_the_test_images(test_digits):
    # the mean of all, from the class means of the subset and the sizes of the classes
    kept = statistics(CLASSIFIER.load())
    x, y = test_digits
    seen, share = features(x).double(), torch.tensor(TEST_COUNTS) / 10_000
    assert kept.n == sum(TEST_COUNTS) == 10_000
    means = torch.stack([seen[y == k].mean(0) for k in range(10)])
    errors = torch.stack([seen[y == k].var(0) / (y == k).sum() for k in range(10)])
    want = (share.double()[:, None] * means).sum(0)
    error = (share.double()[:, None].square() * errors).sum(0).sqrt()
    assert bool(((want - kept.mean).abs() < 5 * error + 1e-6).all())
    assert torch.linalg.eigvalsh(kept.cov).min() > 0


def test_features_are_what_the_logits_are_made_of(test_digits):
    net, x = CLASSIFIER.load(), test_digits[0][:700]
    seen = features(x)
    assert seen.shape == (700, 64)
    assert bool(torch.isfinite(seen).all())
    assert bool((seen >= 0).all())
    logits = net(x)
    assert logits.shape == (700, 10)
    torch.testing.assert_close(net.head(seen), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features(x[:1]), seen[:1], rtol=1e-4, atol=1e-4)  # one by one or together
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    p = probabilities(x)
    assert p.shape == (700, 10)
    torch.testing.assert_close(p.sum(1), torch.ones(700))
    assert torch.equal(p.argmax(1), logits.argmax(1))


def test_the_frechet_distance_is_heusels(test_digits):
    x = test_digits[0][:500].flip(3)
    seen, kept = features(x).double().numpy(), statistics(CLASSIFIER.load())
    mean, cov = seen.mean(0), np.cov(seen.T)
    gap = mean - kept.mean.numpy()
    want = gap @ gap + np.trace(cov + kept.cov.numpy() - 2 * np.real(sqrtm(cov @ kept.cov.numpy())))
    assert frechet(x) == pytest.approx(want, rel=1e-6)


def test_the_frechet_distance_tells_digits_from_worse(test_digits, train_digits, generator):
    data = frechet(train_digits[0])
    noise = torch.randn(train_digits[0].shape, generator=generator)
    grainy = (train_digits[0] + 0.3 * noise).clamp(-1, 1)
    assert 0 < frechet(test_digits[0][::2]) < 2 * data
    assert frechet(grainy) > 3 * data
    assert frechet(train_digits[0].flip(3)) > 3 * data
    assert frechet(train_digits[0][train_digits[1] != 7]) > 3 * data  # a class is missing


def test_the_floor_is_about_proportional_to_one_over_n(train_digits):
    images = train_digits[0]
    small = np.mean([frechet(part) for part in images.split(250)])
    assert 2.5 < small / frechet(images[:1000]) < 5  # 4, but for what training images differ at every n


def test_accuracy_is_the_share_of_the_labels_that_are_met(test_digits):
    x, y = test_digits[0][:200], test_digits[1][:200]
    guess = probabilities(x).argmax(1)
    assert accuracy(x, guess) == 1
    assert accuracy(x, (guess + 1) % 10) == 0
    half = torch.where(torch.arange(200) < 50, (guess + 1) % 10, guess)
    assert accuracy(x, half) == 0.75
    assert accuracy(x, y.to(torch.uint8)) == accuracy(x, y)


X = torch.zeros(70, 1, 28, 28) - 0.5
REFUSED = {
    "bytes": (X.byte(), r"floats of shape \(n, 1, 28, 28\); got \(70, 1, 28, 28\), torch\.uint8"),
    "no channel": (X[:, 0], r"got \(70, 28, 28\)"),
    "another size": (torch.zeros(70, 1, 32, 32), r"got \(70, 1, 32, 32\)"),
    "none": (X[:0], "one or more; got none"),
    "nan": (X / 0 * 0, r"must lie in \[-1, 1\] .*nan"),
    "beyond": (3 * X, r"clamp samples first.*got values from -1\.5 to -1\.5"),
    "0 to 1": (X + 0.75, r"-1 the background; got values from 0\.25 to 0\.25"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize(
    "call",
    [features, probabilities, frechet, lambda x: accuracy(x, torch.zeros(len(x), dtype=torch.long))],
    ids=["features", "probabilities", "frechet", "accuracy"],
)
def test_what_are_no_digits_is_refused(call, case):
    images, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(images)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"n must exceed the 64 features, .* singular; got 64"):
        frechet(X[:64])
    assert frechet(X[:65]) > 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(69, dtype=torch.long), r"70 integers, one an image; got \(69,\)"),
        (torch.zeros(70), r"got \(70,\), torch\.float32"),
        (torch.arange(70) % 11, r"in 0 \.\.\. 9; got 0 \.\.\. 10"),
        (-torch.ones(70, dtype=torch.long), r"got -1 \.\.\. -1"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(X, labels)


@pytest.mark.parametrize("name", [CLASSIFIER.name, STATISTICS])
def test_a_damaged_file_is_refused(copies, name):
    tensors, metadata = weights.shipped(name)
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 1
    weights.write(copies / f"{name}.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
        frechet(X)


def test_the_copies_are_read(copies):
    assert frechet(X) > 0


def test_statistics_of_another_classifier_are_refused(copies):
    with pytest.raises(
        ValueError, match=r"must belong to the classifier; .* got one of digest [0-9a-f]{16}$"
    ):
        statistics(CLASSIFIER.untrained(1))
    other = classifier.stored(CLASSIFIER.untrained(1))
    metadata = weights.shipped(CLASSIFIER.name)[1] | {"digest": weights.digest(other)}
    weights.write(copies / f"{CLASSIFIER.name}.safetensors", other, metadata)
    with pytest.raises(ValueError, match="must belong to the classifier"):
        frechet(X)


def blob(u, v):
    """An image of a dot, of standard deviation 1.5 pixels, u to the right and v below the centre."""
    places = torch.arange(28) - 13.5
    squares = (places - v)[:, None] ** 2 + (places - u)[None] ** 2
    return (2 * torch.exp(-squares / (2 * 1.5**2)) - 1)[None, None]


def centres(images):
    """The centre of mass of each image, in pixels from the centre: (n, 2), to the right and down."""
    mass, places = (images + 1)[:, 0], torch.arange(28) - 13.5
    total = mass.sum((1, 2))
    return torch.stack([(mass.sum(1) * places).sum(1) / total, (mass.sum(2) * places).sum(1) / total], 1)


def test_images_are_moved_as_stated(generator):
    n = 4000

    def moved(turn, zoom, shift):
        still = replace(CLASSIFIER, turn=turn, zoom=zoom, shift=shift)
        return still.moved(blob(6.0, 0.0).expand(n, -1, -1, -1), generator)

    torch.testing.assert_close(moved(0, 0, 0), blob(6.0, 0.0).expand(n, -1, -1, -1), rtol=0, atol=1e-4)
    steps = centres(moved(0, 0, 2)) - torch.tensor([6.0, 0.0])
    assert steps.abs().max() < 2.01
    for axis in steps.T:  # uniform on [-2, 2]: mean 0, mean square 4/3
        assert within(axis.mean(), 0, axis.std() / math.sqrt(n))
        assert within(axis.square().mean(), 4 / 3, axis.square().std() / math.sqrt(n))
    turned = centres(moved(20, 0, 0))
    angle = torch.atan2(turned[:, 1], turned[:, 0]).rad2deg()
    assert 19.5 < angle.abs().max() < 20.1
    torch.testing.assert_close(turned.norm(dim=1), torch.full((n,), 6.0), rtol=0, atol=0.02)
    far = centres(moved(0, 0.3, 0)).norm(dim=1) / 6
    assert far.log().abs().max() == pytest.approx(0.3, abs=0.01)
    assert within(far.log().mean(), 0, far.log().std() / math.sqrt(n))


def test_the_loss_is_the_cross_entropy_of_moved_digits(generator):
    images, labels = subset("train")
    still = replace(CLASSIFIER, turn=0.0, zoom=0.0, shift=0.0)
    net = CLASSIFIER.load()
    values = still.loss(images, labels.long())(net, generator)
    assert values.shape == (128,)
    rows = torch.randint(len(images), (128,), generator=torch.Generator().manual_seed(0))
    p = probabilities(to_floats(images[rows]))[torch.arange(128), labels[rows].long()]
    torch.testing.assert_close(values, -p.log(), rtol=1e-3, atol=1e-4)


def test_training_is_decided_by_the_seed_and_learns(only_the_subset, global_rng_untouched):
    def trained(seed, **kwargs):
        return SHORT.train(seed, progress=False, **kwargs)

    first = trained(0)
    assert weights.digest(first.state_dict()) == weights.digest(trained(0).state_dict())
    assert weights.digest(first.state_dict()) != weights.digest(trained(1).state_dict())
    images, y = classifier.mnist("train")
    x = to_floats(images)

    def loss(net):  # with the norms of this batch: those of so few steps are still far off
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(net.train()(x), y))

    assert not first.training
    assert loss(first) < loss(CLASSIFIER.untrained(0)) - 0.3


def test_an_interrupted_training_goes_on(only_the_subset, tmp_path):
    class Killed(type(SHORT)):
        def loss(self, images, labels):
            values, calls = super().loss(images, labels), []

            def loss(net, generator):
                calls.append(1)
                if len(calls) == 8:
                    raise KeyboardInterrupt
                return values(net, generator)

            return loss

    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        Killed(**vars(SHORT)).train(0, checkpoint=file, every=5, progress=False)
    again = SHORT.train(0, checkpoint=file, progress=False)
    whole = SHORT.train(0, progress=False)
    assert weights.digest(again.state_dict()) == weights.digest(whole.state_dict())


def test_what_is_saved_says_what_made_it_and_belongs_together(only_the_subset, tmp_path):
    net = SHORT.train(3, progress=False)
    files = SHORT.save(tmp_path / "mine.safetensors", net, 3)
    assert [f.name for f in files] == ["mine.safetensors", f"{STATISTICS}.safetensors"]
    (tensors, own), (moments, other) = (weights.read(f) for f in files)
    for metadata in (own, other):
        assert metadata["command"] == "python -m diffedu.train mnist-classifier --seed 3"
        assert metadata["seed"] == "3"
        assert json.loads(metadata["recipe"])["steps"] == 12
    assert own["digest"] == other["classifier_digest"] == weights.digest(tensors)
    assert other["digest"] == weights.digest(moments)
    # what is stated is that of the rounded network
    back = classifier.restored(tensors)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    images, labels = classifier.mnist("test")
    x = to_floats(images)
    with torch.no_grad():
        seen, right = back.features(x).double(), back(x).argmax(1) == labels
    assert float(own["test_accuracy"]) == pytest.approx(float(right.double().mean()))
    assert other["n"] == str(len(labels))
    torch.testing.assert_close(moments["mean"], seen.mean(0), rtol=1e-4, atol=1e-6)


def test_a_classifier_is_made_without_touching_the_global_generator(global_rng_untouched):
    assert isinstance(CLASSIFIER.load(), Classifier)
    CLASSIFIER.untrained(0)


@pytest.mark.cuda
def test_metrics_follow_the_images_to_their_device(test_digits):
    x, y = test_digits
    assert features(x.cuda()).device.type == "cuda"
    assert frechet(x.cuda()) == pytest.approx(frechet(x), rel=1e-2)
    assert accuracy(x.cuda(), y) == pytest.approx(accuracy(x, y), abs=2e-3)
