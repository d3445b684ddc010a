"""One to four evaluations: the students beside their teacher and the undistilled sampler."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, package_digest, table
from benchmarks.training import CHUNK, PAIRS, SAMPLES, SEEDS, draw, excess, load, seeded
from diffedu import weights
from diffedu.consistency import ConsistencyFunction, multistep
from diffedu.consistency_students import (
    MOONS_CONSISTENCY,
    MOONS_CONSISTENCY_TRAINED,
    SWISS_ROLL_CONSISTENCY,
    SWISS_ROLL_CONSISTENCY_TRAINED,
    ConsistencyStudent,
)
from diffedu.denoiser import NetDenoiser
from diffedu.exponential import DDIM
from diffedu.metrics import sliced_w2
from diffedu.sampling import prior, sample
from diffedu.students import MOONS_DISTILLED, SWISS_ROLL_DISTILLED, Distilled
from diffedu.teachers import MOONS, SWISS_ROLL, Teacher

EVALUATIONS = (1, 2, 4)
BUDGET = 60  # CPU seconds of training
STUDENTS: dict[str, tuple[Distilled, tuple[ConsistencyStudent, ...]]] = {
    "swiss-roll": (SWISS_ROLL_DISTILLED, (SWISS_ROLL_CONSISTENCY, SWISS_ROLL_CONSISTENCY_TRAINED)),
    "moons": (MOONS_DISTILLED, (MOONS_CONSISTENCY, MOONS_CONSISTENCY_TRAINED)),
}
# excess to reach (design goals), by data, method, evaluations; the moons' one is 1.3 times the teacher's
GOALS = {
    ("swiss-roll", "distill", 1): 0.014,
    ("swiss-roll", "consistency", 1): 0.018,
    ("swiss-roll", "consistency", 2): 0.016,
    ("swiss-roll", "consistency", 4): 0.014,
    ("swiss-roll", "consistency-training", 1): 0.035,
    ("swiss-roll", "consistency-training", 2): 0.028,
    ("swiss-roll", "consistency-training", 4): 0.024,
}
OVER_TEACHER = 1.3
UNFINISHED = RESULTS / "few_steps.unfinished"
Draw = Callable[[int, torch.Generator], Tensor]


def stepped(denoiser: NetDenoiser, grid: Tensor) -> Draw:
    """Draws of DDIM's steps on the grid: n -> (n, 2)."""

    def few(n: int, generator: torch.Generator) -> Tensor:
        start = prior(denoiser.schedule, (n, 2), generator)
        return torch.cat([sample(denoiser, DDIM(), x, grid) for x in start.reshape(-1, CHUNK, 2)])

    return few


def mapped(f: ConsistencyFunction, times: Sequence[float]) -> Draw:
    """Draws of `multistep` at the times: n -> (n, 2)."""

    def few(n: int, generator: torch.Generator) -> Tensor:
        start = prior(f.schedule, (n, 2), generator)
        return torch.cat([multistep(f, x, times, f.schedule, generator) for x in start.reshape(-1, CHUNK, 2)])

    return few


def squares(teacher: Teacher, sampler: Draw, samples: int, pairs: int) -> Tensor:
    """SW2^2 of draws against data, per pair."""
    found = []
    for seed in range(pairs):
        g = seeded(30_000 + seed)
        data = teacher.draw(samples, g)
        found.append(sliced_w2(sampler(samples, g), data) ** 2)
    return torch.tensor(found, dtype=torch.float64)


def floor(teacher: Teacher, samples: int, pairs: int) -> Tensor:
    """SW2^2 of data against data, per pair, other pairs than those of `squares`."""
    generators = [seeded(31_000 + seed) for seed in range(pairs)]
    found = [sliced_w2(teacher.draw(samples, g), teacher.draw(samples, g)) ** 2 for g in generators]
    return torch.tensor(found, dtype=torch.float64)


Samplers = dict[int, tuple[Draw, str | None]]  # by evaluations: the sampler and its network's digest


def digest(denoiser: NetDenoiser | ConsistencyFunction) -> str:
    """The digest of a network's tensors."""
    return weights.digest(denoiser.net.state_dict())


def distilled(recipe: Distilled, seed: int) -> Samplers:
    """The students of 8, 4, 2 and 1 steps, trained from the seed."""
    students = recipe.train(seed, progress=False)
    return {
        n: (stepped(students[n], recipe.grid(n)), digest(students[n])) for n in (8, *reversed(EVALUATIONS))
    }


def consistent(recipe: ConsistencyStudent, seed: int, evaluations: Sequence[int] = EVALUATIONS) -> Samplers:
    """One consistency function, trained from the seed, with so many evaluations."""
    f = recipe.train(seed, progress=False)
    return {n: (mapped(f, recipe.times(n)), digest(f)) for n in evaluations}


def untrained(teacher: Teacher, recipe: Distilled) -> dict[str, Samplers]:
    """The shipped teacher in 50 steps, and its DDIM in few."""
    shipped = teacher.load()
    few: Samplers = {n: (stepped(shipped, recipe.grid(n)), None) for n in EVALUATIONS}
    return {"teacher": {50: (partial(draw, shipped), None)}, "ddim": few}


def half(recipe: ConsistencyStudent) -> ConsistencyStudent:
    """The recipe with half of its steps, as chapter 11 trains it in the page."""
    steps = recipe.recipe.steps // 2
    division: Any = recipe.division  # a dataclass, though the protocol does not say so
    halved = replace(recipe.recipe, steps=steps)
    return replace(recipe, recipe=halved, division=replace(division, steps=steps))


class Kept:
    """The rows of an interrupted run in a file: good for this package source and these numbers only."""

    def __init__(self, path: Path, **numbers: int) -> None:
        self.path, self.made = path, {"package_digest": package_digest(), **numbers}
        held = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[dict[str, Any]] = held["rows"] if held.get("made") == self.made else []

    def of(self, data: str, method: str, seed: int | None) -> list[dict[str, Any]]:
        """The rows of one training, none where it has not been measured."""
        return [r for r in self.rows if (r["data"], r["method"], r["seed"]) == (data, method, seed)]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of one training."""
        self.rows += rows
        with weights.replacing(self.path) as file:
            file.write_text(json.dumps({"made": self.made, "rows": self.rows}))


def measure(
    seeds: int = SEEDS, samples: int = SAMPLES, pairs: int = PAIRS, kept: Path | None = None
) -> dict[str, Any]:
    """Every student of every seed; prints as it goes.

    An interrupted run goes on after the last training whose rows are in `kept`, a file that is removed at
    the end.
    """
    floors = {t.name: floor(t, samples, pairs) for t in (SWISS_ROLL, MOONS)}
    held = Kept(UNFINISHED if kept is None else kept, samples=samples, pairs=pairs)
    rows: list[dict[str, Any]] = []

    def add(teacher: Teacher, method: str, seed: int | None, make: Callable[[], Samplers]) -> None:
        if not (found := held.of(teacher.name, method, seed)):
            start = time.process_time()
            samplers = make()
            seconds = None if seed is None else round(time.process_time() - start, 1)
            loaded = None if seed is None else load()
            for n, (sampler, made) in samplers.items():
                value, bound = excess(squares(teacher, sampler, samples, pairs), floors[teacher.name])
                row = {"data": teacher.name, "method": method, "evaluations": n, "seed": seed}
                row |= {"cpu_seconds": seconds, "load": loaded, "excess": value, "bound_95": bound}
                found.append(row | {"digest": made})
            held.add(found)
        for r in found:
            of = "" if seed is None else f", seed {seed}, {r['cpu_seconds']:.0f} CPU s"
            print(
                f"  {teacher.name}, {method}, {r['evaluations']}{of}: {r['excess']:.4f} "
                f"(95 % <= {r['bound_95']:.4f})",
                flush=True,
            )
        rows.extend(found)

    for teacher in (SWISS_ROLL, MOONS):
        for method, samplers in untrained(teacher, STUDENTS[teacher.name][0]).items():
            add(teacher, method, None, partial(dict, samplers))
    for seed in range(seeds):
        for teacher in (SWISS_ROLL, MOONS):
            progressive, consistency = STUDENTS[teacher.name]
            add(teacher, progressive.suffix, seed, partial(distilled, progressive, seed))
            for student in consistency:
                add(teacher, student.suffix, seed, partial(consistent, student, seed))
            if teacher is SWISS_ROLL:
                recipe = half(consistency[0])
                add(teacher, "consistency-half", seed, partial(consistent, recipe, seed, (1,)))
    held.path.unlink(missing_ok=True)
    return {
        "problem": f"excess sliced W2 over the floor, {samples} samples a side, {pairs} pairs",
        "floors": {name: math.sqrt(float(values.mean())) for name, values in floors.items()},
        "means": means(rows),
        "rows": sorted(rows, key=lambda r: r["data"] != SWISS_ROLL.name),
    }


def goal(rows: Sequence[dict[str, Any]], data: str, method: str, evaluations: int) -> float | None:
    """The excess to reach, or None."""
    if (data, method, evaluations) == ("moons", "distill", 1):
        of_teacher = [r["excess"] for r in rows if (r["data"], r["method"]) == (data, "teacher")]
        return OVER_TEACHER * of_teacher[0] if of_teacher else None
    return GOALS.get((data, method, evaluations))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data, method and evaluations: the means over seeds, and the goal."""
    found = []
    for data, method, evaluations in dict.fromkeys((r["data"], r["method"], r["evaluations"]) for r in rows):
        group = [r for r in rows if (r["data"], r["method"], r["evaluations"]) == (data, method, evaluations)]
        values = torch.tensor([r["excess"] for r in group], dtype=torch.float64)
        seconds = [r["cpu_seconds"] for r in group if r["cpu_seconds"] is not None]
        found.append(
            {
                "data": data,
                "method": method,
                "evaluations": evaluations,
                "seeds": len(seconds),
                "excess": float(values.mean()),
                "deviation": float(values.std()) if len(group) > 1 else None,
                "cpu_seconds": sum(seconds) / len(seconds) if seconds else None,
                "goal": goal(rows, data, method, evaluations),
                "goal_cpu_seconds": BUDGET,
            }
        )
    return found


def show(results: dict[str, Any]) -> str:
    """The means over seeds as a table, beside the goals."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return table(
        ["data", "method", "evaluations", "excess", "deviation", "CPU s", "goal"],
        [
            [
                m["data"],
                m["method"],
                m["evaluations"],
                cell(m["excess"], 4),
                cell(m["deviation"], 4),
                cell(m["cpu_seconds"], 0),
                cell(m["goal"], 4),
            ]
            for m in results["means"]
        ],
    )
