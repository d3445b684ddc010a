"""Quality of the toy teachers against the CPU seconds of their training."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import table
from diffedu import weights
from diffedu.denoiser import Denoiser
from diffedu.exponential import DPMSolverPP2M
from diffedu.metrics import sliced_w2
from diffedu.sampling import prior, sample
from diffedu.teachers import MOONS, SWISS_ROLL, Teacher

SAMPLES, PAIRS, SEEDS = 100_000, 6, 3
CHUNK = 1000  # samples that pass through the network at a time: as much as the cache holds
# excess to reach and CPU seconds for it, and the best other with its seconds (design goals)
GOALS = {"swiss-roll": (0.010, 30, 0.0107, 45), "moons": (0.012, 20, 0.0131, 25)}
SHARES = (0.1, 0.25, 0.5)  # of the recipe's steps: shorter trainings, for one seed


def seeded(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


def draw(denoiser: Denoiser, n: int, generator: torch.Generator) -> Tensor:
    """n samples of 50 steps of DPM-Solver++(2M), (n, 2)."""
    ts, start = denoiser.schedule.grid(50), prior(denoiser.schedule, (n, 2), generator)
    return torch.cat([sample(denoiser, DPMSolverPP2M(), x, ts) for x in start.reshape(-1, CHUNK, 2)])


def load() -> float:
    """The machine's load average over the last minute: what stood beside the training."""
    return round(os.getloadavg()[0], 1)


def squares(teacher: Teacher, denoiser: Denoiser | None, seeds: Sequence[int]) -> Tensor:
    """SW2^2 of samples against data, per pair; without a denoiser of data against data: the floor."""
    found = []
    for seed in seeds:
        g = seeded(30_000 + seed)
        data = teacher.draw(SAMPLES, g)
        other = teacher.draw(SAMPLES, g) if denoiser is None else draw(denoiser, SAMPLES, g)
        found.append(sliced_w2(other, data) ** 2)
    return torch.tensor(found, dtype=torch.float64)


def excess(model: Tensor, floor: Tensor) -> tuple[float, float]:
    """sqrt(mean SW2^2 - floor^2), and its upper 95 % bound."""
    gap = float(model.mean() - floor.mean())
    error = math.sqrt(float(model.var() / len(model) + floor.var() / len(floor)))
    return math.sqrt(max(0.0, gap)), math.sqrt(max(0.0, gap + 1.645 * error))


def trained(teacher: Teacher, seed: int, share: float) -> tuple[Denoiser, str, float]:
    """A network of a share of the recipe's steps, its digest, and the CPU seconds of its training."""
    recipe = replace(teacher.recipe, steps=round(share * teacher.recipe.steps))
    start = time.process_time()
    denoiser = replace(teacher, recipe=recipe).train(seed, progress=False)
    return denoiser, weights.digest(denoiser.net.state_dict()), time.process_time() - start


def measure(seeds: int = SEEDS) -> dict[str, Any]:
    """Both teachers: whole trainings for every seed, shorter ones for the first; prints as it goes."""
    rows: list[dict[str, Any]] = []
    floors: dict[str, float] = {}
    for teacher in (SWISS_ROLL, MOONS):
        floor = squares(teacher, None, range(1000, 1000 + PAIRS))
        floors[teacher.name] = math.sqrt(float(floor.mean()))
        shipped = weights.shipped(teacher.name)[1]["digest"]
        for share, seed in [(s, 0) for s in SHARES] + [(1.0, seed) for seed in range(seeds)]:
            denoiser, digest, seconds = trained(teacher, seed, share)
            value, bound = excess(squares(teacher, denoiser, range(PAIRS)), floor)
            rows.append(
                {
                    "data": teacher.name,
                    "steps": round(share * teacher.recipe.steps),
                    "seed": seed,
                    "cpu_seconds": round(seconds, 1),
                    "load": load(),
                    "excess": value,
                    "bound_95": bound,
                    "digest": digest,
                    "is_shipped": digest == shipped,
                }
            )
            print(
                f"  {teacher.name}, seed {seed}, {rows[-1]['steps']} steps, {seconds:.1f} CPU s: "
                f"excess {value:.4f} (95 % <= {bound:.4f})",
                flush=True,
            )
    whole = {
        teacher.name: [r for r in rows if (r["data"], r["steps"]) == (teacher.name, teacher.recipe.steps)]
        for teacher in (SWISS_ROLL, MOONS)
    }
    means = {
        name: {
            "excess": sum(r["excess"] for r in group) / len(group),
            "cpu_seconds": sum(r["cpu_seconds"] for r in group) / len(group),
            "goal": GOALS[name][0],
            "goal_cpu_seconds": GOALS[name][1],
            "best_other": GOALS[name][2],
            "best_other_cpu_seconds": GOALS[name][3],
        }
        for name, group in whole.items()
    }
    return {
        "problem": f"excess sliced W2 over the floor, {SAMPLES} samples a side, {PAIRS} pairs",
        "floors": floors,
        "means": means,
        "rows": rows,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table, and the means over seeds beside the goals."""
    lines = table(
        ["data", "steps", "seed", "CPU s", "excess", "95 % bound"],
        [
            [r["data"], r["steps"], r["seed"], r["cpu_seconds"], f"{r['excess']:.4f}", f"{r['bound_95']:.4f}"]
            for r in results["rows"]
        ],
    )
    means = table(
        ["mean over seeds", "excess", "CPU s", "goal", "in CPU s", "best other", "in CPU s"],
        [
            [
                name,
                f"{m['excess']:.4f}",
                f"{m['cpu_seconds']:.0f}",
                f"{m['goal']:.3f}",
                m["goal_cpu_seconds"],
                f"{m['best_other']:.4f}",
                m["best_other_cpu_seconds"],
            ]
            for name, m in results["means"].items()
        ],
    )
    return f"{lines}\n\n{means}"
