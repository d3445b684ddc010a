"""The solvers of the ODE: error by evaluations, order, overhead; beside diffusers where it is installed."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import table
from diffedu.denoiser import Denoiser, NetDenoiser
from diffedu.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP2M, DPMSolverPP3M, fast_plan
from diffedu.metrics import empirical_order
from diffedu.mixtures import ExactDenoiser, GaussianMixture
from diffedu.networks import MLP
from diffedu.sampling import Solver, prior, sample
from diffedu.schedules import VP
from diffedu.solvers import Ancestral, Euler, EulerMaruyama, Heun
from tests.problems import asym3, flow, ring8

POINTS = 2000
EVALUATIONS = (4, 10, 20, 50, 200)
ORDER_STEPS = (80, 160, 320, 640)
LAWS: dict[str, Callable[[], GaussianMixture]] = {"asym3": asym3, "ring8": ring8}


class Method(NamedTuple):
    """A solver on its grid; `other`: the best other's errors on asym3 by evaluations (design goals)."""

    name: str
    solver: Solver
    spacing: str | float
    calls: int = 1  # evaluations a step
    other: tuple[float, ...] = ()


METHODS = [
    Method("Euler", Euler(), "t", 1, (0.37, 0.13, 0.10, 0.053, 8.1e-3)),
    Method("Heun", Heun(), "t", 2, (0.48, 0.22, 0.069, 0.013, 1.0e-3)),
    Method("Heun", Heun(), "edm", 2, (4.5, 1.2, 0.15, 0.018, 1.0e-3)),
    Method("DDIM", DDIM(), "lam", 1, (0.55, 0.26, 0.15, 0.076, 0.035)),
    Method("DPMSolver(2)", DPMSolver(2), "lam", 2, (1.9, 0.33, 0.058, 7.8e-3, 5.3e-4)),
    Method("DPMSolver(3)", DPMSolver(3), "lam", 3, (41, 0.45, 0.075, 3.6e-3, 8.3e-5)),
    Method("DPMSolverPP2M", DPMSolverPP2M(), "lam", 1, (0.33, 0.13, 0.051, 4.9e-3, 3.6e-4)),
    Method("DPMSolverPP3M", DPMSolverPP3M(), "lam", 1, (0.69, 0.066, 0.019, 1.9e-3, 4.0e-5)),
    Method("DPMSolverPP3M", DPMSolverPP3M(), 2),
    Method("DEIS(3)", DEIS(3), 1.8),
    Method("DEIS(3)", DEIS(3), 2),
    Method("DEIS(4)", DEIS(4), 2.2),
]
STOCHASTIC = [Method("EulerMaruyama", EulerMaruyama(), "t"), Method("Ancestral", Ancestral(), "lam")]
# diffusers' DPMSolverMultistepScheduler, by its order: it starts and ends with the lower ones
DIFFUSERS = (1, 2, 3) if find_spec("diffusers") else ()


def starts() -> Tensor:
    """The points at t = 1, (POINTS, 2) float64."""
    return prior(VP(), (POINTS, 2), torch.Generator().manual_seed(0), dtype=torch.float64)


def lengths(x: Tensor, reference: Tensor) -> Tensor:
    """Each point's error."""
    return (x - reference).square().sum(dim=1).sqrt()


def rms(errors: Tensor) -> float:
    """Root of the mean square."""
    return float(errors.square().mean().sqrt())


def accuracy() -> list[dict[str, Any]]:
    """RMS error by evaluations, law and method; a plan for what is left over is DPM-Solver-fast's."""
    rows, x = [], starts()
    for name, make in LAWS.items():
        law = make()
        reference = torch.from_numpy(flow(law, VP(), x.numpy(), 1.0, 1e-3))
        denoiser = ExactDenoiser(law, VP())
        for m in METHODS:
            found = []
            for nfe in EVALUATIONS:
                steps = nfe // m.calls
                out = sample(denoiser, m.solver, x, VP().grid(steps, m.spacing)) if steps else x * math.nan
                found.append(rms(lengths(out, reference)))
            rows.append(row(name, m.name, m.spacing, m.calls, found, m.other if name == "asym3" else ()))
        found = []
        for nfe in EVALUATIONS:
            plan = fast_plan(nfe)
            found.append(rms(lengths(sample(denoiser, DPMSolver(plan), x, VP().grid(len(plan))), reference)))
        rows.append(
            row(
                name,
                "DPMSolver(fast_plan)",
                "lam",
                1,
                found,
                (0.51, 0.24, 0.040, 2.7e-3, 8.0e-5) if name == "asym3" else (),
            )
        )
        for order in DIFFUSERS:
            found = [rms(lengths(diffusers_sample(denoiser, order, x, n), reference)) for n in EVALUATIONS]
            rows.append(row(name, f"diffusers ++{order}M", "its own", 1, found, ()))
    return rows


def row(
    law: str, method: str, grid: str | float, calls: int, errors: list[float], other: tuple[float, ...]
) -> dict[str, Any]:
    """One line of the accuracy table; prints it. Evaluations that do not fill a step are not spent."""
    print(f"  {law} {method} ({grid}): " + " ".join(f"{e:.2g}" for e in errors), flush=True)
    return {
        "law": law,
        "method": method,
        "grid": grid,
        "calls_a_step": calls,
        "evaluations": list(EVALUATIONS),
        "rms_error": [e if math.isfinite(e) else None for e in errors],  # diffusers ++3M divides by 0
        "best_other": list(other),
    }


def orders() -> list[dict[str, Any]]:
    """Slope of the median error on asym3 over 80 to 640 steps, each method on its grid."""
    x, law = starts()[:500], asym3()
    reference = torch.from_numpy(flow(law, VP(), x.numpy(), 1.0, 1e-3))
    rows = []
    for m in METHODS:
        medians = [
            float(
                lengths(
                    sample(ExactDenoiser(law, VP()), m.solver, x, VP().grid(n, m.spacing)), reference
                ).median()
            )
            for n in ORDER_STEPS
        ]
        slope = empirical_order([1 / n for n in ORDER_STEPS], medians)
        rows.append(
            {
                "method": m.name,
                "grid": m.spacing,
                "steps": list(ORDER_STEPS),
                "median_error": medians,
                "order": slope,
            }
        )
        print(f"  {m.name} ({m.spacing}): order {slope:.3f}", flush=True)
    return rows


def overhead(rounds: int = 25) -> list[dict[str, Any]]:
    """Thread CPU time of a whole sampler over that of its bare network calls: medians of paired runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP().eval().requires_grad_(False)
    x, denoiser, rows = starts().float(), NetDenoiser(net, VP(), "eps"), []
    generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def calls(n: int) -> None:
        for lam in torch.linspace(-5, 4, n).tolist():
            net(x, x.new_full((len(x),), lam))

    def seconds(work: Callable[[], object]) -> float:
        start = time.thread_time()
        work()
        return time.thread_time() - start

    def measure(name: str, run: Callable[[], object], evaluations: int, stochastic: bool) -> None:
        run(), calls(evaluations)
        ratios = []
        for k in range(rounds):  # one right after the other, each first in turn
            if k % 2:
                bare, whole = seconds(lambda: calls(evaluations)), seconds(run)
            else:
                whole, bare = seconds(run), seconds(lambda: calls(evaluations))
            ratios.append(whole / bare)
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "method": name,
                "stochastic": stochastic,
                "ratio": statistics.median(ratios),
                "quartiles": [low, high],
            }
        )
        print(f"  {name}: {rows[-1]['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)

    steps = 24
    for m in {m.name: m for m in [*METHODS, *STOCHASTIC]}.values():
        ts = VP().grid(steps // m.calls, m.spacing)
        measure(m.name, partial(sample, denoiser, m.solver, x, ts, generator), steps, m in STOCHASTIC)
    for order in DIFFUSERS:
        measure(f"diffusers ++{order}M", partial(diffusers_sample, denoiser, order, x, steps), steps, False)
    return rows


@torch.no_grad()
def diffusers_sample(denoiser: Denoiser, order: int, x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ of diffusers on our problem: its 1000 time steps are t = .001, .002, ..., 1 of our VP."""
    from diffusers import DPMSolverMultistepScheduler

    vp, times = VP(), [k / 1000 for k in range(1001)]
    sampler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        trained_betas=[-math.expm1(2 * math.log(vp.alpha(t) / vp.alpha(s))) for s, t in pairwise(times)],
        solver_order=order,
        use_lu_lambdas=True,
        final_sigmas_type="sigma_min",
    )
    sampler.set_timesteps(steps)
    for k in sampler.timesteps.tolist():
        x = sampler.step(denoiser(x, (k + 1) / 1000).eps, k, x).prev_sample
    return x


def measure() -> dict[str, Any]:
    """Accuracy, orders, overhead."""
    problem = f"VP, t from 1 to .001, {POINTS} points, exact scores, against DOP853 at 1e-12"
    return {"problem": problem, "accuracy": accuracy(), "orders": orders(), "overhead": overhead()}


def show(results: dict[str, Any]) -> str:
    """The three tables; the best other's error on asym3 behind a stroke."""

    def cells(r: dict[str, Any]) -> list[str]:
        others = r["best_other"] or [None] * len(EVALUATIONS)
        return [
            ("-" if e is None else f"{e:.2g}") + (f" | {o:.2g}" if o else "")
            for e, o in zip(r["rms_error"], others, strict=True)
        ]

    accuracy_table = table(
        ["law, method", "grid", *map(str, EVALUATIONS)],
        [[f"{r['law']} {r['method']}", r["grid"], *cells(r)] for r in results["accuracy"]],
    )
    order_table = table(
        ["order on asym3", "grid", "slope"],
        [[r["method"], r["grid"], f"{r['order']:.3f}"] for r in results["orders"]],
    )
    overhead_table = table(
        ["overhead", "ratio", "quartiles"],
        [
            [r["method"], f"{r['ratio']:.3f}", "{:.3f} {:.3f}".format(*r["quartiles"])]
            for r in results["overhead"]
        ],
    )
    return "\n\n".join([accuracy_table, order_table, overhead_table])
