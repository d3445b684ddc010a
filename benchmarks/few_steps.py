"""One to four evaluations: the students beside their teacher and the undistilled sampler."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import table
from benchmarks.training import CHUNK, PAIRS, SAMPLES, SEEDS, draw, excess, seeded
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


def measure(seeds: int = SEEDS, samples: int = SAMPLES, pairs: int = PAIRS) -> dict[str, Any]:
    """Every student of every seed; prints as it goes."""
    rows: list[dict[str, Any]] = []
    floors: dict[str, float] = {}
    for teacher in (SWISS_ROLL, MOONS):
        floor = torch.tensor(
            [
                sliced_w2(teacher.draw(samples, g), teacher.draw(samples, g)) ** 2
                for g in (seeded(31_000 + seed) for seed in range(pairs))
            ],
            dtype=torch.float64,
        )
        floors[teacher.name] = math.sqrt(float(floor.mean()))

        def add(
            method: str,
            evaluations: int,
            values: Tensor,
            trained: tuple[int, float, str] | None = None,
            name: str = teacher.name,
            floor: Tensor = floor,
        ) -> None:
            found, bound = excess(values, floor)
            seed, seconds, digest = trained or (None, None, None)
            rows.append(
                {
                    "data": name,
                    "method": method,
                    "evaluations": evaluations,
                    "seed": seed,
                    "cpu_seconds": seconds,
                    "excess": found,
                    "bound_95": bound,
                    "digest": digest,
                }
            )
            of = "" if seed is None else f", seed {seed}, {seconds:.0f} CPU s"
            print(f"  {name}, {method}, {evaluations}{of}: {found:.4f} (95 % <= {bound:.4f})", flush=True)

        shipped, distilled = teacher.load(), STUDENTS[teacher.name][0]
        add("teacher", 50, squares(teacher, partial(draw, shipped), samples, pairs))
        for n in EVALUATIONS:
            undistilled = stepped(shipped, distilled.grid(n))
            add("ddim", n, squares(teacher, undistilled, samples, pairs))
        for seed in range(seeds):
            start = time.process_time()
            students = distilled.train(seed, progress=False)
            seconds = round(time.process_time() - start, 1)
            for n in (8, *reversed(EVALUATIONS)):
                made = (seed, seconds, weights.digest(students[n].net.state_dict()))
                steps = stepped(students[n], distilled.grid(n))
                add(distilled.suffix, n, squares(teacher, steps, samples, pairs), made)
            for student in STUDENTS[teacher.name][1]:
                start = time.process_time()
                f = student.train(seed, progress=False)
                made = (seed, round(time.process_time() - start, 1), weights.digest(f.net.state_dict()))
                for n in EVALUATIONS:
                    values = squares(teacher, mapped(f, student.times(n)), samples, pairs)
                    add(student.suffix, n, values, made)
    return {
        "problem": f"excess sliced W2 over the floor, {samples} samples a side, {pairs} pairs",
        "floors": floors,
        "means": means(rows),
        "rows": rows,
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
