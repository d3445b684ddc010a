"""The benchmarks' committed results: what they say of their making, the goals, and two cells made again."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import few_steps, report, sde, training
from diffedu import weights
from diffedu.consistency_students import ConsistencyDistilled
from diffedu.teachers import MOONS, SWISS_ROLL
from diffedu.training import Recipe

RESULTS = {path.stem: json.loads(path.read_text()) for path in report.RESULTS.glob("*.json")}


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_result_says_how_it_was_made(name):
    made = RESULTS[name]["made"]
    assert re.fullmatch(rf"python -m benchmarks {name}( --\w+ \d+)*", made["command"])
    assert re.fullmatch("[0-9a-f]{64}", made["package_digest"])
    assert made["machine"]["threads"] == 1


def row(method, grid, steps):
    rows = RESULTS["sde"]["rows"]
    return next(r for r in rows if (r["method"], r["grid"], r["steps"]) == (method, grid, steps))


@pytest.mark.parametrize(("method", "grid"), [("VP EM", "lam"), ("VP ancestral", "lam")])
def test_200_steps_come_near_the_floor(method, grid):
    assert row(method, grid, 200)["over_floor"] <= 1.3


def test_a_cell_of_the_sde_table_is_what_the_package_gives():
    # EM at 10 steps: its bias is ten times its scatter, so two of the 20 seeds tell a wrong step
    want = row("VP EM", "lam", 10)
    found, _ = sde.root_mean_square(sde.distances(sde.ROWS[1], 10, [0, 1]))
    spread = want["standard_error"] * math.sqrt(20)  # of one seed
    assert abs(found - want["distance"]) < 4 * spread / math.sqrt(2)


@pytest.mark.parametrize("name", ["swiss-roll", "moons"])
def test_the_teachers_reach_their_goals(name):
    mean = RESULTS["training"]["means"][name]
    assert mean["excess"] <= mean["goal"]


SLOW = pytest.mark.xfail(
    strict=True, reason="18 to 26 CPU s by seed and hour, goal 20; an earlier session's machine took 16"
)


@pytest.mark.parametrize("name", ["swiss-roll", pytest.param("moons", marks=SLOW)])
def test_training_takes_no_longer_than_its_goal(name):
    mean = RESULTS["training"]["means"][name]
    assert mean["cpu_seconds"] <= mean["goal_cpu_seconds"]


@pytest.mark.parametrize("teacher", [SWISS_ROLL, MOONS], ids=["swiss-roll", "moons"])
def test_the_training_measured_made_the_shipped_file(teacher):
    whole = [r for r in RESULTS["training"]["rows"] if r["data"] == teacher.name and r["is_shipped"]]
    assert [r["digest"] for r in whole] == [weights.shipped(teacher.name)[1]["digest"]]


MEANS = {(m["data"], m["method"], m["evaluations"]): m for m in RESULTS["few_steps"]["means"]}


MISSED = {  # why; a strict expected failure, which ends when the goal is met
    ("moons", "distill", 1): "1.55 times the teacher's excess, goal 1.3; from 8 steps on nearly the same",
    ("swiss-roll", "distill", 1): "0.01407, goal 0.014; the step from 4 to 2 went less well with seed 2",
}
GOALS = [
    pytest.param(of, marks=pytest.mark.xfail(strict=True, reason=MISSED[of])) if of in MISSED else of
    for of, mean in MEANS.items()
    if mean["goal"] is not None
]


@pytest.mark.parametrize("of", GOALS, ids=str)
def test_the_students_reach_their_goals(of):
    assert MEANS[of]["excess"] <= MEANS[of]["goal"]


@pytest.mark.parametrize("method", ["distill", "consistency", "consistency-training"])
@pytest.mark.parametrize("data", ["swiss-roll", "moons"])
def test_more_evaluations_are_not_worse(data, method):
    one, two, four = (MEANS[data, method, n]["excess"] for n in (1, 2, 4))
    assert max(two, four) <= one


def test_the_shipped_students_are_the_measured_ones_of_seed_0():
    suffixes = ["consistency", "consistency-training", *(f"distill-{n}" for n in (8, 4, 2, 1))]
    names = [f"{name}-{suffix}" for name in ("swiss-roll", "moons") for suffix in suffixes]
    shipped = {name: weights.shipped(name)[1]["digest"] for name in names}
    measured = {}
    for r in RESULTS["few_steps"]["rows"]:
        if r["seed"] == 0:
            suffix = f"-{r['evaluations']}" if r["method"] == "distill" else ""
            measured[f"{r['data']}-{r['method']}{suffix}"] = r["digest"]
    assert {name: measured[name] for name in shipped} == shipped


def test_the_excess_is_zero_at_the_floor_and_the_rest_above_it():
    floor = torch.full((6,), 0.0056**2, dtype=torch.float64)
    assert training.excess(floor, floor) == (0.0, 0.0)
    value, bound = training.excess(torch.full((6,), 0.0056**2 + 0.01**2, dtype=torch.float64), floor)
    assert value == pytest.approx(0.01)
    assert bound == pytest.approx(0.01)


def test_the_command_refuses_what_it_does_not_know():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "speed"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "NAME must be one of" in done.stderr
    assert "got speed" in done.stderr


TINY = Recipe(steps=3, lr=1e-3, ema=0.9)


@pytest.fixture
def tiny(monkeypatch):
    """The students' benchmark with trainings of three steps; the list of the trainings made."""
    made = []

    class Watched(few_steps.Distilled):
        def train(self, seed, **options):
            made.append((self.name, seed))
            return super().train(seed, **options)

    class WatchedMap(ConsistencyDistilled):
        def train(self, seed, **options):
            made.append((self.name, seed))
            if made == [("swiss-roll-distill", 0), ("swiss-roll-consistency", 0)]:
                raise KeyboardInterrupt
            return super().train(seed, **options)

    students = {
        name: (
            Watched(**vars(progressive) | {"generations": tuple((n, TINY) for n in (8, 4, 2, 1))}),
            (WatchedMap(**vars(maps[0]) | {"recipe": TINY}),),
        )
        for name, (progressive, maps) in few_steps.STUDENTS.items()
    }
    monkeypatch.setattr(few_steps, "STUDENTS", students)
    return made


def test_an_interrupted_benchmark_goes_on_where_it_stood(tiny, tmp_path):
    kept = tmp_path / "rows"
    with pytest.raises(KeyboardInterrupt):
        few_steps.measure(1, 1000, 2, kept)
    assert kept.exists()
    resumed = few_steps.measure(1, 1000, 2, kept)
    assert not kept.exists()
    assert tiny.count(("swiss-roll-distill", 0)) == 1  # not trained again
    tiny.clear()
    tiny.append("so that nothing interrupts")
    whole = few_steps.measure(1, 1000, 2, kept)

    def results(found):
        return [{k: v for k, v in r.items() if k not in ("cpu_seconds", "load")} for r in found["rows"]]

    assert results(resumed) == results(whole)
    assert resumed["floors"] == whole["floors"]


def test_rows_of_another_size_are_measured_again(tmp_path):
    held = few_steps.Kept(tmp_path / "rows", samples=1000, pairs=2)
    held.add([{"data": "moons", "method": "ddim", "seed": None}])
    assert few_steps.Kept(tmp_path / "rows", samples=1000, pairs=2).rows == held.rows
    assert few_steps.Kept(tmp_path / "rows", samples=1000, pairs=3).rows == []
