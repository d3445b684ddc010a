"""The benchmarks' committed results: what they say of their making, the goals, and two cells made again."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report, sde, training
from diffedu import weights
from diffedu.teachers import MOONS, SWISS_ROLL

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


@pytest.mark.parametrize(
    "name",
    [
        "swiss-roll",
        pytest.param(
            "moons",
            marks=pytest.mark.xfail(strict=True, reason="of seed 1 a sample from far out runs away"),
        ),
    ],
)
def test_the_teachers_reach_their_goals(name):
    mean = RESULTS["training"]["means"][name]
    assert mean["excess"] <= mean["goal"]


@pytest.mark.parametrize("teacher", [SWISS_ROLL, MOONS], ids=["swiss-roll", "moons"])
def test_training_takes_no_longer_than_its_goal_and_makes_the_shipped_file(teacher):
    mean = RESULTS["training"]["means"][teacher.name]
    assert mean["cpu_seconds"] <= mean["goal_cpu_seconds"]
    whole = [r for r in RESULTS["training"]["rows"] if r["data"] == teacher.name and r["is_shipped"]]
    assert [r["digest"] for r in whole] == [weights.shipped(teacher.name)[1]["digest"]]


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
