"""Quality of the stochastic samplers against evaluations, on a law whose score is exact."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.report import table
from diffedu.metrics import sliced_energy
from diffedu.mixtures import ExactDenoiser
from diffedu.sampling import Solver, prior, sample, trajectory
from diffedu.schedules import VE, VP, Schedule
from diffedu.solvers import Ancestral, AnnealedLangevin, EulerMaruyama, PredictorCorrector, ReverseDiffusion
from tests.problems import asym3

SAMPLES, SEEDS = 10_000, 20
GOAL = 1.3  # times the floor, at 200 steps of EM and of ancestral sampling (design goals)


class Row(NamedTuple):
    """A sampler on its grid; `other` is one seed of the best other, by number of steps."""

    name: str
    schedule: Schedule
    solver: Solver
    spacing: str
    steps: tuple[int, ...]
    other: dict[int, float]


STEPS = (10, 50, 100, 200, 1000)
VE_CORRECTED = PredictorCorrector(ReverseDiffusion(), 1, 0.16)
ROWS = [
    Row("VP EM", VP(), EulerMaruyama(), "t", STEPS, {10: 0.145, 50: 0.016, 100: 0.018, 1000: 0.015}),
    Row("VP EM", VP(), EulerMaruyama(), "lam", STEPS, {}),
    Row("VP ancestral", VP(), Ancestral(), "t", STEPS, {10: 0.107, 50: 0.037, 100: 0.024}),
    Row("VP ancestral", VP(), Ancestral(), "lam", STEPS, {}),
    Row("VP PC", VP(), PredictorCorrector(EulerMaruyama(), 1, 0.16), "lam", (5, 25, 50, 100, 500), {}),
    Row(
        "VE reverse diffusion",
        VE(),
        ReverseDiffusion(),
        "lam",
        (10, 50, 200, 500),
        {10: 0.148, 50: 0.040, 200: 0.025, 500: 0.012},
    ),
    Row("VE ancestral", VE(), Ancestral(), "lam", (10, 50, 200, 500), {}),
    Row(
        "VE annealed Langevin", VE(), AnnealedLangevin(2, 0.3), "lam", (25, 100, 250), {100: 0.30, 250: 0.030}
    ),
    Row("VE PC", VE(), VE_CORRECTED, "lam", (5, 25, 100, 250), {}),
]


def seeded(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


def root_mean_square(distances: Sequence[float]) -> tuple[float, float]:
    """The root of the mean square, and its standard error by the delta method."""
    squares = torch.tensor(distances, dtype=torch.float64).square()
    root = math.sqrt(float(squares.mean()))
    return root, float(squares.std()) / math.sqrt(len(squares)) / (2 * root)


def distances(row: Row, steps: int, seeds: Sequence[int], samples: int = SAMPLES) -> list[float]:
    """The root of the sliced energy distance between samples and data, per seed."""
    law = asym3()
    denoiser, found = ExactDenoiser(law, row.schedule), []
    for seed in seeds:
        g = seeded(seed)
        x = prior(row.schedule, (samples, 2), g, dtype=torch.float64)
        out = sample(denoiser, row.solver, x, row.schedule.grid(steps, row.spacing), g)
        found.append(sliced_energy(out, law.sample(samples, seeded(10_000 + seed))))
    return found


def evaluations(row: Row, steps: int) -> int:
    """How often the row's sampler calls its denoiser."""
    denoiser = ExactDenoiser(asym3(), row.schedule)
    x = prior(row.schedule, (1, 2), seeded(0), dtype=torch.float64)
    ts = row.schedule.grid(steps, row.spacing)
    return max(step.nfe for step in trajectory(denoiser, row.solver, x, ts, seeded(0)))


def measure(seeds: int = SEEDS) -> dict[str, Any]:
    """Every row at every number of steps; prints as it goes."""
    law, pairs = asym3(), [seeded(20_000 + seed) for seed in range(seeds)]
    floor, floor_error = root_mean_square(
        [sliced_energy(law.sample(SAMPLES, g), law.sample(SAMPLES, g)) for g in pairs]
    )
    print(f"floor {floor:.4f} +- {floor_error:.4f}: data against data, {SAMPLES} a side, {seeds} pairs")
    rows = []
    for row in ROWS:
        for steps in row.steps:
            value, error = root_mean_square(distances(row, steps, range(seeds)))
            nfe = evaluations(row, steps)
            rows.append(
                {
                    "method": row.name,
                    "grid": row.spacing,
                    "steps": steps,
                    "nfe": nfe,
                    "distance": value,
                    "standard_error": error,
                    "over_floor": value / floor,
                    "best_other": row.other.get(steps),
                }
            )
            print(f"  {row.name} ({row.spacing}), {nfe} evaluations: {value:.4f} +- {error:.4f}", flush=True)
    return {
        "problem": "asym3, root of the sliced energy distance, root mean square over seeds",
        "samples": SAMPLES,
        "seeds": list(range(seeds)),
        "floor": floor,
        "floor_standard_error": floor_error,
        "goal_over_floor": GOAL,
        "rows": rows,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    return table(
        ["method", "grid", "evaluations", "distance", "+-", "over floor", "best other (one seed)"],
        [
            [
                r["method"],
                r["grid"],
                r["nfe"],
                f"{r['distance']:.4f}",
                f"{r['standard_error']:.4f}",
                f"{r['over_floor']:.2f}",
                "" if r["best_other"] is None else f"{r['best_other']:.3f}",
            ]
            for r in results["rows"]
        ],
    )
