"""What the benchmark measured of digits in one to eight evaluations, and how the students are drawn."""

import json

import pytest
import torch

from benchmarks import digit_few, digit_steps, report
from benchmarks.training import seeded
from diffedu import weights
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digits import MNIST
from diffedu.sampling import prior

RESULTS = json.loads((report.RESULTS / "digit_steps.json").read_text())
ROWS = {(r["method"], r["evaluations"]): r for r in RESULTS["rows"]}
SHORT = "one core's hour of training without bf16"
MISSED = {
    ("progressive student", 4): "1.33 times the teacher, goal 1.15",
    ("progressive student", 2): "1.69 times the teacher, goal 1.3",
    ("progressive student", 1): "2.22 times the teacher, goal 1.6",
    ("consistency model", 1): "2.86 times the teacher, goal 2",
    ("consistency model", 2): "2.21 times the teacher, goal 1.5",
}
NEAR = [
    pytest.param(key, marks=[pytest.mark.xfail(strict=True, reason=f"{MISSED[key]}: {SHORT}")])
    if key in MISSED
    else key
    for key in digit_few.GOALS
]


@pytest.fixture(scope="module")
def methods():
    found = digit_few.methods(MNIST.load(), weights.shipped(MNIST.name)[1]["digest"])
    return {m.key: m for m in found}


def test_every_row_is_there_and_was_made_by_the_shipped_networks(methods):
    assert {key: ROWS[key]["made"] for key in methods} == {key: m.made for key, m in methods.items()}
    for name in digit_few.files():
        assert RESULTS["networks"][name] == weights.shipped(name)[1]["digest"]


@pytest.mark.parametrize("key", list(digit_few.GOALS), ids=str)
def test_a_student_is_measured_beside_its_teacher_and_its_goal(key):
    assert ROWS[key]["teacher"] == list(digit_few.TEACHER)
    assert ROWS[key]["draws"] == ROWS[digit_few.TEACHER]["draws"] == digit_steps.GOAL_BLOCKS
    assert ROWS[key]["goal"] == digit_few.GOALS[key]


@pytest.mark.parametrize("key", NEAR, ids=str)
def test_a_student_comes_as_near_to_its_teacher_as_the_goal(key):
    assert ROWS[key]["over_teacher"] <= ROWS[key]["goal"]


@pytest.mark.parametrize("n", [1, 2])
def test_students_beat_the_undistilled_network_where_steps_are_few(n):
    undistilled = ROWS[digit_few.UNDISTILLED.name, n]["fd_by_draw"][0]  # the same starts
    for name in ("progressive student", "consistency model"):
        assert ROWS[name, n]["fd_by_draw"][0] < 0.8 * undistilled


def test_the_ratio_is_that_of_the_paired_draws():
    line, teacher = ROWS["progressive student", 1], ROWS[digit_few.TEACHER]
    assert line["over_teacher"] == pytest.approx(sum(line["fd_by_draw"]) / sum(teacher["fd_by_draw"]))
    assert digit_steps.teacher_of(("DDIM", 5)) == digit_steps.TEACHER


def test_a_step_to_the_end_is_the_reading_of_the_digit(methods):
    x, labels = prior(MNIST.schedule, (4, 1, 28, 28), seeded(0)), torch.arange(4)
    (t, _), sigma = MNIST_DISTILLED.grid(1).tolist(), MNIST.schedule.sigma(MNIST.schedule.t_min)
    with torch.no_grad():
        for key, net in (
            (("progressive student", 1), MNIST_DISTILLED.load(1)),
            (("consistency model", 1), MNIST_CONSISTENCY.load()),
            ((digit_few.UNDISTILLED.name, 1), MNIST.load()),
        ):
            v = net(x, torch.full((4,), MNIST.schedule.lam(t)), labels)
            read = MNIST.schedule.alpha(t) * x - MNIST.schedule.sigma(t) * v
            assert (methods[key].draw(x, labels, seeded(1)) - read).abs().max() < 10 * sigma


def test_only_a_second_jump_is_random(methods):
    x, labels = prior(MNIST.schedule, (2, 1, 28, 28), seeded(0)), torch.arange(2)
    for key, random in ((("consistency model", 1), False), (("consistency model", 2), True)):
        first, second = (methods[key].draw(x, labels, seeded(k)) for k in (1, 2))
        assert torch.equal(first, second) is not random
        assert torch.equal(first, methods[key].draw(x, labels, seeded(1)))
