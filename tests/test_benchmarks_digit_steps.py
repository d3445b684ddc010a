"""What the benchmark of fewer steps on digits measured, and its machinery."""

import json
import math

import pytest
import torch

from benchmarks import digit_few, digit_paths, digit_steps, digits, report
from benchmarks.digit_paths import BESIDE, SOLVERS, Marching
from benchmarks.kept import Kept
from benchmarks.training import seeded
from diffedu import weights
from diffedu.classifier import CLASSIFIER
from diffedu.digits import MNIST
from diffedu.exponential import DDIM, DPMSolver
from diffedu.metrics import empirical_order, frechet_distance, moments

RESULTS = json.loads((report.RESULTS / "digit_steps.json").read_text())
ROWS = {(r["method"], r["evaluations"]): r for r in RESULTS["rows"]}
PATHS = {(p["method"], p["evaluations"]): p for p in RESULTS["paths"]}
CALLS = {m.name: m.calls for m in SOLVERS}


def test_every_method_is_there_with_what_it_was_made_by():
    net, digest = MNIST.load(), weights.shipped("mnist")[1]["digest"]
    wanted = {(m.name, m.evaluations): m.made for m in digit_steps.methods(net, digest)}
    few = {m.name for m in digit_few.methods(net, digest)}  # see test_benchmarks_digit_few
    assert {key: r["made"] for key, r in ROWS.items() if key[0] not in few} == wanted
    assert set(digit_steps.GOALS) <= set(ROWS)
    ladder = digit_paths.EVALUATIONS
    assert set(PATHS) == {(m.name, n) for m in [*SOLVERS, *BESIDE] for n in ladder if n >= m.calls}


def test_the_measured_networks_are_the_shipped_ones():
    for name, digest in RESULTS["networks"].items():
        assert weights.shipped(name)[1]["digest"] == digest


def test_the_pictures_belong_to_the_results():
    pictures, _ = weights.read(report.RESULTS / RESULTS["pictures"]["file"])
    assert weights.digest(pictures) == RESULTS["pictures"]["digest"]
    assert sum(value.numel() * value.element_size() for value in pictures.values()) < 300_000
    ends = {f"{m.name}, {n}" for m in SOLVERS for n in (*digit_paths.PICTURED, digit_paths.FINEST)}
    assert set(pictures) == {"reference", "labels"} | ends
    exact = digit_paths.to_bytes(pictures["reference"])[: len(pictures["DDIM, 1000"])]
    for name in CALLS:
        finest = pictures[f"{name}, {digit_paths.FINEST}"]
        assert (finest.float() - exact.float()).square().mean().sqrt() < 2  # of 255 grey levels


@pytest.mark.parametrize("key", list(digit_steps.GOALS), ids=str)
def test_few_steps_come_as_near_to_the_teacher_as_the_goal(key):
    line = ROWS[key]
    assert line["draws"] == digit_steps.GOAL_BLOCKS
    assert line["over_teacher"] <= line["goal"]


@pytest.mark.parametrize(
    ("name", "order"), [("DDIM", 1), ("DPM-Solver++(2M)", 2), ("DPM-Solver-3", 3)], ids=str
)
def test_the_error_falls_as_the_order_says(name, order):
    far, near = (PATHS[name, n] for n in (50, 200))
    found = empirical_order([1 / p["used"] for p in (far, near)], [p["rms"] for p in (far, near)])
    assert abs(found - order) < 0.5  # from steps that are still long


def test_long_first_steps_cost_deis_its_order():
    # of the grid uniform in sqrt(t): the first of 200 is as long in lam as 37 of the grid uniform in lam
    def order(name):
        lines = [PATHS[name, n] for n in (50, 200)]
        return empirical_order([1 / p["used"] for p in lines], [p["rms"] for p in lines])

    # on the lam grid it is what chapter 14 calls reaching the nominal order, 3: less a fifth at most
    assert order("DEIS(3)") < 2.5
    assert order("DEIS(3), lam grid") > 3 - 0.2


def test_the_error_of_the_features_comes_with_a_standard_error():
    for line in RESULTS["paths"]:
        assert 0 < line["feature_error"] < line["feature_rms"]


def test_the_reference_is_nearer_than_all_that_is_measured_against_it():
    assert 5 * RESULTS["reference"]["gap"] < min(p["rms"] for p in PATHS.values())


def test_a_method_spends_no_more_than_it_is_allowed_and_less_than_a_step_less():
    for line in [*RESULTS["rows"], *RESULTS["paths"]]:
        assert 0 <= line["evaluations"] - line["used"] < CALLS.get(line["method"], 1)


def test_a_cell_is_what_the_package_gives():
    pictures, _ = weights.read(report.RESULTS / RESULTS["pictures"]["file"])
    x, labels = digit_paths.few_starts()
    for name, n in (("DPM-Solver++(2M)", 3), ("DPM-Solver-3", 5)):
        (marching,) = [m for m in SOLVERS if m.name == name]
        value, _ = digit_paths.rms(marching.end(MNIST.load(), n, x, labels), pictures["reference"].float())
        assert value == pytest.approx(PATHS[name, n]["rms"], rel=1e-3)


def test_the_table_has_a_line_for_each_row():
    lines = digit_steps.show(RESULTS).splitlines()
    assert sum(line.startswith("DPM-Solver++(2M) ") for line in lines) == 1 + sum(
        r["method"] == "DPM-Solver++(2M)" for r in RESULTS["rows"]
    )


def test_the_jackknife_knows_the_spread_of_a_distance():
    # of 400 draws of N(0, I) in three dimensions from N((3, 0, 0), I): the mean's part dominates
    # FD = |m|^2 + ..., of variance 4 * 9 * var(m_1) = 36 / n from the mean, 2 * ... / n from the rest
    target = moments(torch.tensor([[4.0, 1, 1], [2, -1, 1], [4, -1, -1], [2, 1, -1]], dtype=torch.float64))
    draws = [torch.randn(400, 3, generator=seeded(k), dtype=torch.float64) for k in range(60)]
    spread = float(torch.tensor([frechet_distance(moments(x), target) for x in draws]).std())
    guessed = sum(digit_steps.jackknife(x, target) for x in draws) / len(draws)
    assert guessed == pytest.approx(spread, rel=0.3)
    assert guessed > math.sqrt(36 / 400) * 0.8


def test_the_spread_is_the_variance_within_a_class():
    labels = torch.arange(10).repeat(30)
    noise = torch.randn(300, 64, generator=seeded(1), dtype=torch.float64)
    seen = 5 * labels[:, None] + noise * (1 + labels[:, None])  # the variance of class c is (1 + c)^2
    value, error = digit_steps.spread(seen, labels)
    wanted = 64 * sum((1 + c) ** 2 for c in range(10)) / 10
    assert value == pytest.approx(sum(float(seen[c::10].var(0).sum()) for c in range(10)) / 10)
    # a class's has the variance 64 * 2 (1 + c)^4 / 29
    exact = math.sqrt(sum(64 * 2 * (1 + c) ** 4 / 29 for c in range(10))) / 10
    assert error == pytest.approx(exact, rel=0.2)
    assert abs(value - wanted) < 4 * exact
    assert all(math.isnan(v) for v in digit_steps.spread(seen[:19], labels[:19]))  # of class 9 there is one


def test_the_spread_is_measured_where_the_chapter_looks():
    for key in [("DPM-Solver++(2M)", n) for n in (3, 5, 10, 20)]:
        line = ROWS[key]
        assert 0 < line["spread_error"] < 0.1 * line["spread"]
        assert line["spread_recognised"] < line["spread"]  # what is not recognised is far from its class
    assert all("spread" in r for r in RESULTS["rows"] if r["used"] <= 2 and r["method"] in CALLS)


def test_what_draws_share_cancels_in_the_ratio_to_the_teacher():
    teacher = {"draws": 3, "fd_by_draw": [1.0, 2.0, 3.0]}
    line = {"method": "x", "evaluations": 1, "draws": 3, "fd_by_draw": [1.5, 3.0, 4.5]}
    found = digit_steps.beside_teacher(line, teacher)
    assert found == {"over_teacher": 1.5, "over_teacher_error": pytest.approx(0), "goal": None}
    once = digit_steps.beside_teacher(line | {"draws": 1, "fd_by_draw": [1.5]}, teacher)
    assert once == {"over_teacher": 1.5, "over_teacher_error": None, "goal": None}


def test_the_error_is_the_root_of_the_mean_square():
    reference = torch.zeros(4, 1, 2, 2)
    x = torch.tensor([1.0, 1, 3, 3]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    value, error = digit_paths.rms(x, reference)
    assert value == pytest.approx(math.sqrt(5))
    # the squares 1, 1, 9, 9: deviation sqrt(64/3), of the mean half of it; through the root over 2 sqrt(5)
    assert error == pytest.approx(math.sqrt(64 / 3) / 2 / (2 * math.sqrt(5)))


def test_the_grid_of_jumps_is_even_where_the_digit_is_decided():
    schedule = MNIST.schedule
    times = digit_paths.JUMPING.times(5)
    assert [times[0], times[-1]] == [schedule.t_max, schedule.t_min]
    low, high = digit_paths.DECISIVE
    wanted = [low + k * (high - low) / 3 for k in range(4)]
    assert [schedule.lam(t) for t in times[1:-1]] == pytest.approx(wanted)


def test_what_is_left_over_is_not_spent():
    assert [Marching("", DPMSolver(3), "lam", 3).steps(n) for n in (2, 3, 5, 50)] == [0, 1, 1, 16]
    assert Marching("", DDIM()).steps(7) == 7


def test_what_is_kept_is_not_made_again(tmp_path):
    def refuse():
        raise AssertionError("made again")

    path = tmp_path / "kept"
    first = Kept(path, {"by": "a"}).of("x", lambda: {"value": torch.tensor([1.0, 2.0])})
    again = Kept(path, {"by": "a"})
    assert torch.equal(again.of("x", refuse)["value"], first["value"])
    assert set(again.of("x, 2", lambda: {"value": torch.tensor(3)})) == {"value"}
    assert Kept(path, {"by": "b"}).tensors == {}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A run of blocks of 80 digits, one to three evaluations."""
    for module in (digits, digit_steps):
        monkeypatch.setattr(module, "BLOCK", 80)
    monkeypatch.setattr(
        digit_steps, "SOLVERS", [m for m in SOLVERS if m.name in ("DDIM", "DPM-Solver++(2M)")]
    )
    monkeypatch.setattr(digit_paths, "SOLVERS", [])
    monkeypatch.setattr(digit_paths, "BESIDE", [])
    monkeypatch.setattr(digit_paths, "REFERENCE_EVALUATIONS", 3)
    monkeypatch.setattr(digit_steps, "EVALUATIONS", (1, 2))
    monkeypatch.setattr(digit_steps, "MANY", [("DPM-Solver++(2M)", 3)])
    monkeypatch.setattr(digit_steps, "TEACHER", ("DPM-Solver++(2M)", 3))
    monkeypatch.setattr(digit_steps, "GOALS", {("DPM-Solver++(2M)", 1): 1.5})
    monkeypatch.setattr(digit_steps, "BESIDE", ("DDIM", 7))
    monkeypatch.setattr(digit_few, "methods", lambda net, digest: [])
    monkeypatch.setattr(digit_steps, "floor_of", lambda digest: {"n": 80, "fd": 1.0})
    known = torch.arange(10).repeat(10)
    monkeypatch.setattr(digit_steps, "mnist", lambda split, full: (None, known.to(torch.uint8)))
    return tmp_path


def test_a_run_can_be_interrupted_and_goes_on_to_the_same_numbers(tiny, monkeypatch):
    first = digit_steps.measure(tiny, tiny / "kept")
    assert [(r["method"], r["evaluations"], r["draws"]) for r in first["rows"]] == [
        ("DDIM", 1, 1),
        ("DDIM", 2, 1),
        ("DPM-Solver++(2M)", 1, 3),
        ("DPM-Solver++(2M)", 2, 1),
        ("DPM-Solver++(2M)", 3, 3),
        ("DPM-Solver++(2M), jumps", 5, 1),
    ]
    one, same = (
        next(r for r in first["rows"] if r["method"] == name) for name in ("DDIM", "DPM-Solver++(2M)")
    )
    assert one["fd_by_draw"][0] == pytest.approx(same["fd_by_draw"][0], rel=1e-3)  # one step: the same method
    monkeypatch.setattr(digit_steps, "features", None)  # whoever draws again needs it
    assert digit_steps.measure(tiny, tiny / "kept") == first


def test_the_floor_is_refused_from_another_classifier():
    own = weights.shipped(CLASSIFIER.name)[1]["digest"]
    assert digit_steps.floor_of(own) == RESULTS["floor"]
    with pytest.raises(ValueError, match="run `python -m benchmarks digits` first"):
        digit_steps.floor_of("other")
