"""What the benchmark of the digits measured, and how it draws and keeps."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import digit_judge, digits, report
from benchmarks.training import seeded
from diffedu import weights
from diffedu.classifier import CLASSIFIER
from diffedu.digits import MNIST
from diffedu.metrics import frechet_distance, moments

RESULTS = json.loads((report.RESULTS / "digits.json").read_text())
ROWS = {(r["samples"], r["n"]): r for r in RESULTS["rows"]}


def missed(reason):
    """A goal that is missed, which the tests say until it is met."""
    return pytest.mark.xfail(strict=True, reason=reason)


SHORT = "960,000 images, all that one core of a machine without bf16 gave in four hours, are too few"
NEAR = [
    pytest.param(("conditional", 1000), marks=missed(f"2.00 floors, goal 1.41: {SHORT}")),
    pytest.param(("conditional", 10_000), marks=missed(f"5.2 floors, goal 4.3: {SHORT}")),
    pytest.param(
        ("unconditional", 1000), marks=missed(f"16 floors, goal 2.3: {SHORT}, 30 % without a label")
    ),
]
RIGHT = [
    pytest.param("conditional", marks=missed(f"96.5 %, goal 98 %: {SHORT}")),
    pytest.param("guided, weight 1.5"),
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
    assert torch.equal(first[1], second[1])
    assert first[1].shape == (20,)
    other = MNIST.untrained(1)
    assert digits.Blocks(path, other, classifier, known).kept.tensors == {}


def test_the_floor_of_gaussian_features_is_that_of_an_estimated_gaussian():
    # n draws of N(0, 1) in one dimension against the exact moments: FD = m^2 + (s - 1)^2, of mean
    # 1 / n + 1 / (2 n) to first order; 40 draws, all there are
    train = torch.randn(4000, 1, generator=seeded(0), dtype=torch.float64)
    n = 100
    found = digits.floor(train, moments(torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / 2**0.5), n)
    assert found["draws"] == 40
    spread = (2 / n**2 + 0.5 / n**2) ** 0.5  # of one draw: the variances of m^2 and (s - 1)^2
    assert abs(found["fd"] - 1.5 / n) < 4 * spread / 40**0.5
    assert abs(found["deviation"] / spread - 1) < 0.5


def test_a_floor_has_ten_draws_or_as_many_as_the_samples_have_parts():
    train = torch.randn(60_000, 2, generator=seeded(1))
    test = moments(torch.randn(50, 2, generator=seeded(2)))
    assert [digits.floor(train, test, n)["draws"] for n in (300, 1000, 2000, 10_000)] == [33, 10, 10, 6]


def test_distances_are_of_whole_parts_one_after_another():
    seen, test = torch.randn(7, 2, generator=seeded(3)), moments(torch.randn(9, 2, generator=seeded(4)))
    wanted = [frechet_distance(moments(part), test) for part in (seen[:3], seen[3:6])]
    assert digits.distances(seen, 3, test) == wanted


def test_rows_are_of_parts_blocks_and_all(monkeypatch):
    monkeypatch.setattr(digits, "BLOCK", 20)
    monkeypatch.setattr(digits, "FEW", 6)
    torch.manual_seed(0)
    blocks = [torch.randn(20, 2), torch.randn(20, 2) + 1]
    drawn = SimpleNamespace(
        classifier=SimpleNamespace(head=nn.Linear(2, 10)),
        block=lambda row, k: (blocks[k], torch.arange(20) % 10),
    )
    test, floors = moments(torch.randn(50, 2)), {6: 0.3, 20: 0.2, 40: 0.1, 1000: 1.0}
    few, one, both = digits.rows_of(digits.ROWS[0], drawn, test, floors, 2)
    assert [(r["n"], r["draws"]) for r in (few, one, both)] == [(6, 6), (20, 2), (40, 1)]
    apart = [frechet_distance(moments(block), test) for block in blocks]
    assert one["fd"] == pytest.approx(sum(apart) / 2)
    assert one["deviation"] == pytest.approx(abs(apart[0] - apart[1]) / math.sqrt(2))
    assert both["fd"] == pytest.approx(frechet_distance(moments(torch.cat(blocks)), test))
    assert both["deviation"] is None
    assert both["over_floor"] == pytest.approx(both["fd"] / 0.1)
    assert few["accuracy"] == both["accuracy"] is not None
    free = digits.rows_of(digits.ROWS[1], drawn, test, floors, 2)[0]
    assert free["accuracy"] is free["spread"] is None
    assert free["unsure"] == few["unsure"]


def test_the_spread_of_gaussian_classes_is_the_mean_trace_of_their_covariances():
    # class c: N(c, (1 + c) I) in 3 dimensions. |x - mean|^2 has mean 3 (1 + c), variance 6 (1 + c)^2
    labels = torch.arange(10).repeat_interleave(400)
    seen = labels[:, None] + (1 + labels[:, None]).sqrt() * torch.randn(4000, 3, generator=seeded(5))
    value, error = digit_judge.spread(seen, labels)
    of_mean = math.sqrt(sum(6 * (1 + c) ** 2 / 400 for c in range(10))) / 10
    assert error == pytest.approx(of_mean, rel=0.15)
    assert abs(value - 3 * 5.5) < 4 * of_mean
    pairs = torch.tensor([[0.0], [2.0]]).repeat(10, 1)  # unbiased: of two, half the squared difference
    assert digit_judge.spread(pairs, torch.arange(10).repeat_interleave(2))[0] == 2
    assert math.isnan(digit_judge.spread(pairs, torch.arange(20) % 9)[0])


def test_what_the_classifier_tells_is_counted():
    # features are the logits; the last of each class is taken for the next, one of all is unsure
    labels = torch.arange(10).repeat_interleave(4)
    logits = 10 * nn.functional.one_hot(labels, 10).float()
    logits[3::4] = logits[3::4].roll(1, 1)
    logits[1::4] *= 1.5
    logits[0] = 0
    found = digit_judge.told(SimpleNamespace(head=nn.Identity()), logits, labels)
    assert found["unsure"] == 1 / 40
    assert found["accuracy"] == 30 / 40  # of equal chances the first is taken, here the truth
    assert found["spread"] > 2 * found["spread_recognised"] > 0
    assert digit_judge.told(SimpleNamespace(head=nn.Identity()), logits, None) == {
        "accuracy": None,
        "spread": None,
        "spread_error": None,
        "spread_recognised": None,
        "unsure": 1 / 40,
    }


def test_the_loss_of_the_answer_nothing_is_the_size_of_v():
    # E |alpha eps - sigma x0|^2 = alpha^2 + sigma^2 |x0|^2 a pixel, and a uniform clock halves each
    class Nothing(nn.Module):
        def forward(self, x, lam, labels):
            return torch.zeros_like(x)

    images = torch.full((50, 28, 28), 255, dtype=torch.uint8)
    images[:25] = 191  # as floats .498
    facts = {"recipe": json.dumps({"steps": 30, "batch": 4}), "digest": "d"}
    found = digit_judge.held_out_loss(Nothing(), images, torch.arange(50) % 10, facts)
    size = (1 + (191 / 127.5 - 1) ** 2) / 2
    assert found["images"] == 120
    assert found["standard_error"] < 0.01
    assert abs(found["loss"] - (1 + size) / 2) < 4 * found["standard_error"]


def test_speed_trains_a_few_steps_and_counts_the_products():
    # forwards and backwards, a weight's product is made three times, each two operations; the linear
    # layers have next to none of them
    places = {}
    net = MNIST.untrained(0)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda m, x, y: places.update({m: y.shape[2] * y.shape[3]}))
    images = torch.zeros(70, 28, 28, dtype=torch.uint8)
    net(images[:1, None].float(), torch.zeros(1))
    products = sum(m.weight.numel() * places[m] for m in layers)
    found = digits.speed(images, torch.arange(70) % 10, threads=1, steps=2)
    assert found["flops_per_image"] == pytest.approx(6 * products, rel=0.03)
    assert found["images_per_second"] > 1


def test_losses_of_other_networks_stay_in_the_file(tmp_path):
    file = tmp_path / "digits.json"
    new, old = {"digest": "b", "images": 9, "loss": 1.0}, {"digest": "a", "images": 4, "loss": 2.0}
    assert digit_judge.with_earlier(new, file) == [new]
    file.write_text(json.dumps({"test_losses": [old, {**new, "loss": 3.0}]}))
    assert digit_judge.with_earlier(new, file) == [old, new]


def test_the_loss_on_test_images_falls_from_training_to_training():
    losses = [f["loss"] for f in RESULTS["test_losses"]]
    assert losses == sorted(losses, reverse=True)
    assert RESULTS["test_losses"][-1]["digest"] == RESULTS["networks"][MNIST.name]
