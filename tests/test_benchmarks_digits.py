"""What the benchmark of the digits measured, and how it draws and keeps."""

import json

import pytest
import torch

from benchmarks import digits, report
from benchmarks.training import seeded
from diffedu import weights
from diffedu.classifier import CLASSIFIER
from diffedu.digits import MNIST
from diffedu.metrics import moments

RESULTS = json.loads((report.RESULTS / "digits.json").read_text())
ROWS = {(r["samples"], r["n"]): r for r in RESULTS["rows"]}


def missed(reason):
    """A goal that is missed, which the tests say until it is met."""
    return pytest.mark.xfail(strict=True, reason=reason)


SHORT = "416,000 images, all that one core of a machine without bf16 gave in two hours, are too few"
NEAR = [
    pytest.param(("conditional", 1000), marks=missed(f"2.95 floors, goal 1.41: {SHORT}")),
    pytest.param(("conditional", 10_000), marks=missed(f"9.4 floors, goal 4.3: {SHORT}")),
    pytest.param(
        ("unconditional", 1000), marks=missed(f"22 floors, goal 2.3: {SHORT}, 30 % without a label")
    ),
]
RIGHT = [
    pytest.param("conditional", marks=missed(f"95.4 %, goal 98 %: {SHORT}")),
    pytest.param("guided, weight 1.5", marks=missed(f"99.40 %, goal 99.5 %: {SHORT}")),
]


def test_every_goal_is_looked_at():
    assert {key for key, r in ROWS.items() if r["goal_over_floor"]} == {param.values[0] for param in NEAR}
    assert {r.name for r in digits.ROWS if r.accuracy_goal} == {param.values[0] for param in RIGHT}


@pytest.mark.parametrize("key", NEAR, ids=str)
def test_the_digits_lie_as_near_as_the_goal(key):
    assert ROWS[key]["over_floor"] <= ROWS[key]["goal_over_floor"]


@pytest.mark.parametrize("name", RIGHT)
def test_the_digits_are_those_asked_for(name):
    assert ROWS[name, 1000]["accuracy"] >= ROWS[name, 1000]["accuracy_goal"]


def test_the_classifier_reaches_its_goal():
    assert RESULTS["classifier"]["accuracy"] >= RESULTS["classifier"]["accuracy_goal"]


def test_the_measured_networks_are_the_shipped_ones():
    for name, digest in RESULTS["networks"].items():
        assert weights.shipped(name)[1]["digest"] == digest


def test_the_floor_falls_with_the_number_of_images():
    floors = {f["n"]: f["fd"] for f in RESULTS["floors"]}
    assert floors[1000] > floors[2000] > floors[10_000] > 0


@pytest.fixture
def small(monkeypatch):
    """Blocks of twenty digits in two evaluations."""
    monkeypatch.setattr(digits, "BLOCK", 20)
    monkeypatch.setattr(digits, "CHUNK", 8)
    monkeypatch.setattr(digits, "EVALUATIONS", 2)
    return MNIST.load(), torch.arange(10).repeat(10)


def test_a_block_of_digits_is_fixed_by_its_seed(small):
    net, known = small
    images, labels = digits.draw(digits.ROWS[0], net, known, 3)
    assert images.shape == (20, 1, 28, 28)
    assert float(images.abs().max()) <= 1
    again, same = digits.draw(digits.ROWS[0], net, known, 3)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(digits.draw(digits.ROWS[0], net, known, 4)[0], images)


def test_what_is_drawn_is_kept_for_these_networks_alone(small, tmp_path, monkeypatch):
    net, known = small
    path, classifier = tmp_path / "kept", CLASSIFIER.load()
    first = digits.Blocks(path, net, classifier, known).block(digits.ROWS[0], 0)

    def refuse(*_):
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(digits, "draw", refuse)
        second = digits.Blocks(path, net, classifier, known).block(digits.ROWS[0], 0)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    other = MNIST.untrained(1)
    assert digits.Blocks(path, other, classifier, known).kept.tensors == {}


def test_the_floor_of_gaussian_features_is_that_of_an_estimated_gaussian():
    # n draws of N(0, 1) in one dimension against the exact moments: FD = m^2 + (s - 1)^2, of mean
    # 1 / n + 1 / (2 n) to first order; 10 draws of about as large a deviation
    train = torch.randn(4000, 1, generator=seeded(0), dtype=torch.float64)
    n = 100
    found = digits.floor(train, moments(torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / 2**0.5), n)
    assert found["draws"] == 10
    spread = (2 / n**2 + 0.5 / n**2) ** 0.5  # of one draw: the variances of m^2 and (s - 1)^2
    assert abs(found["fd"] - 1.5 / n) < 4 * spread / 10**0.5
