"""MNIST in fewer steps: what each way of drawing digits is worth, by evaluations of its network."""

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks import digit_few
from benchmarks.digit_judge import spread
from benchmarks.digit_methods import Method, marched
from benchmarks.digit_paths import JUMPING, SOLVERS, paths
from benchmarks.digits import BLOCK, CHUNK, starts
from benchmarks.kept import Kept
from benchmarks.report import RESULTS, table
from benchmarks.training import seeded
from diffedu import weights
from diffedu.classifier import CLASSIFIER
from diffedu.data import mnist
from diffedu.digit_metrics import features, probabilities, statistics
from diffedu.digits import MNIST
from diffedu.metrics import Moments, frechet_distance, moments

GROUPS = 20  # of a block, for the standard error of its distance by the jackknife
GOAL_FLOOR = 1.77  # of the goals' distances, which are in the features of another classifier
KEPT = RESULTS / "digit_steps.kept"
PICTURES = "digit_steps.safetensors"


# Evaluations of the samples whose distance is taken; those of the last rows are the expensive ones.
EVALUATIONS = (1, 2, 3, 5, 10)
MANY = [*((m.name, 20) for m in SOLVERS), ("DPM-Solver++(2M)", 50)]
# Distances over that of the teacher's samples, the same starts and labels: to be at most the goal
TEACHER = ("DPM-Solver++(2M)", 50)
GOALS = {(JUMPING.name, 5): 1.15}
BESIDE = ("DPM-Solver++(2M)", 5)  # the same without the choice of a grid: as many draws
GOAL_BLOCKS = 3
BEST_SEEN = {  # Fréchet distance at n = 1,000
    ("DDIM", 5): 10.4,
    ("DDIM", 10): 5.7,
    ("DDIM", 20): 4.75,
    ("DDIM", 50): 4.58,
    ("DPM-Solver++(2M)", 5): 5.2,
    ("DPM-Solver++(2M)", 10): 4.8,
    ("DPM-Solver++(2M)", 20): 4.7,
}


def methods(net: nn.Module, digest: str) -> list[Method]:
    """All solvers that are measured, the cheap ones first."""
    by_name = {m.name: m for m in [*SOLVERS, JUMPING]}
    few = [(m.name, n) for n in EVALUATIONS for m in SOLVERS if m.steps(n)]
    return [marched(by_name[name], n, net, digest) for name, n in [*few, (JUMPING.name, 5), *MANY]]


def teacher_of(key: tuple[str, int]) -> tuple[str, int]:
    """The method, by name and evaluations, beside whose distance that of another is put."""
    few = {method for method, _ in digit_few.GOALS} | {digit_few.UNDISTILLED.name}
    return digit_few.TEACHER if key[0] in few else TEACHER


def blocks_of(key: tuple[str, int]) -> int:
    """How many blocks of 1,000 samples: more where a goal asks for a ratio."""
    many = {TEACHER, BESIDE, digit_few.TEACHER, *GOALS, *digit_few.GOALS}
    return GOAL_BLOCKS if key in many else 1


def jackknife(seen: Tensor, test: Moments) -> float:
    """The standard error of the distance of features (n, 64): each of 20 groups is left out once."""
    group = torch.arange(len(seen)) % GROUPS
    values = [frechet_distance(moments(seen[group != k]), test) for k in range(GROUPS)]
    spread = torch.tensor(values, dtype=torch.float64).var(correction=0)
    return math.sqrt(float(spread) * (GROUPS - 1))


def block(
    method: Method, x: Tensor, labels: Tensor, generator: Generator, test: Moments
) -> dict[str, Tensor]:
    """Distance and spread with standard errors, class accuracy, CPU seconds per image of some samples."""
    start = time.process_time()
    parts = zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True)
    digits = torch.cat([method.draw(a, b, generator) for a, b in parts]).clamp(-1, 1)
    seconds = (time.process_time() - start) / len(x)
    seen = features(digits)
    within, its_error = spread(seen, labels)
    right = probabilities(digits).argmax(1) == labels
    numbers = {
        "fd": frechet_distance(moments(seen), test),
        "error": jackknife(seen, test),
        "accuracy": float(right.double().mean()),
        "seconds": seconds,
        "spread": within,
        "spread_error": its_error,
        "spread_recognised": spread(seen[right], labels[right])[0],
    }
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}


def row(method: Method, blocks: Sequence[dict[str, Tensor]], floor: float) -> dict[str, Any]:
    """A method's line in the results, but for what it is beside its teacher.

    The spread, of all its digits and of those that are recognised as what was asked for, is that of the
    first block; it is left out where there is none, or the block was kept before it was taken.
    """
    fds, errors, right, seconds = (
        torch.stack([b[key] for b in blocks]) for key in ("fd", "error", "accuracy", "seconds")
    )
    best = (BEST_SEEN | digit_few.BEST_SEEN).get(method.key)
    return {
        "method": method.name,
        "grid": method.grid,
        "evaluations": method.evaluations,
        "used": method.used,
        "made": method.made,
        "n": BLOCK,
        "draws": len(blocks),
        "fd": float(fds.mean()),
        "standard_error": float(errors.square().mean().sqrt()) / math.sqrt(len(blocks)),
        "fd_by_draw": fds.tolist(),
        "over_floor": float(fds.mean()) / floor,
        "best_seen_over_floor": best / GOAL_FLOOR if best else None,
        "accuracy": float(right.mean()),
        **{k: float(v) for k, v in blocks[0].items() if k.startswith("spread") and v.isfinite()},
        "seconds_per_image": float(seconds.mean()),
    }


def beside_teacher(line: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """The ratio of the two distances over the draws that both have, its standard error, and the goal.

    The draws are pairs, of the same starts and labels: what they share cancels.
    """
    both = min(line["draws"], teacher["draws"])
    ours, theirs = (torch.tensor(v["fd_by_draw"][:both], dtype=torch.float64) for v in (line, teacher))
    ratio = float(ours.mean() / theirs.mean())
    error = None
    if both > 1:
        error = float((ours - ratio * theirs).std() / theirs.mean()) / math.sqrt(both)
    goal = (GOALS | digit_few.GOALS).get((line["method"], line["evaluations"]))
    return {"over_teacher": ratio, "over_teacher_error": error, "goal": goal}


def floor_of(digest: str) -> dict[str, Any]:
    """The floor at n = 1,000 in the features of this classifier, from the benchmark `digits`.

    Raises ValueError where that was measured with another classifier.
    """
    other = json.loads((RESULTS / "digits.json").read_text())
    if other["networks"][CLASSIFIER.name] != digest:
        raise ValueError("the floor is another classifier's: run `python -m benchmarks digits` first")
    (found,) = [f for f in other["floors"] if f["n"] == BLOCK]
    return {key: found[key] for key in ("n", "draws", "fd", "deviation")}


def measure(out: Path = RESULTS, kept: Path | None = None) -> dict[str, Any]:
    """Paths and samples of every method; prints as it goes, and writes pictures into the folder `out`.

    What is measured is kept in a file, `kept`, and is not measured again while solver, grid and network are
    the same: delete the file for that.
    """
    known, net, classifier = mnist("train", full=True)[1].long(), MNIST.load(), CLASSIFIER.load()
    names = (MNIST.name, CLASSIFIER.name, *digit_few.files())
    digests = {name: weights.shipped(name)[1]["digest"] for name in names}
    digest = digests[MNIST.name]
    held = Kept(kept or KEPT, {"classifier": digests[CLASSIFIER.name]})
    test, floor = statistics(classifier), floor_of(digests[CLASSIFIER.name])
    of_paths, pictures = paths(held, net, digest)
    noise = [starts(known, seed) for seed in range(GOAL_BLOCKS)]
    pictures["labels"] = noise[0][1].to(torch.uint8)
    rows = []
    for method in [*methods(net, digest), *digit_few.methods(net, digest)]:
        found = []
        for seed in range(blocks_of(method.key)):
            make = partial(block, method, *noise[seed], seeded(50_000 + seed), test)
            found.append(held.of(f"{method.made}, seed {seed}", make))
        rows.append(row(method, found, floor["fd"]))
        r = rows[-1]
        print(
            f"  {r['method']}, {r['evaluations']}: FD {r['fd']:.3g} +- {r['standard_error']:.2g}, accuracy "
            f"{r['accuracy']:.1%}, {1000 * r['seconds_per_image']:.0f} ms an image",
            flush=True,
        )
    by_key = {(r["method"], r["evaluations"]): r for r in rows}
    rows = []
    for key, r in by_key.items():
        teacher = teacher_of(key)
        rows.append(r | {"teacher": list(teacher)} | beside_teacher(r, by_key[teacher]))
    order = {name: k for k, name in enumerate(dict.fromkeys(r["method"] for r in rows))}
    own = weights.digest(pictures)
    weights.write(out / PICTURES, pictures, {"digest": own})
    return {
        "problem": "MNIST, class-conditional, guidance 1; FD at n = 1,000 in the shipped classifier's "
        "features against the 10,000 test images; labels drawn from the training set's; the same starts "
        "for all",
        "networks": digests,
        "pictures": {"file": PICTURES, "digest": own},
        "floor": floor,
        "teacher": list(TEACHER),
        **of_paths,
        "rows": sorted(rows, key=lambda r: (order[r["method"]], r["evaluations"])),
    }


HEADS = (
    "digits",
    "grid",
    "calls",
    "used",
    "FD",
    "+-",
    "floors",
    "best seen",
    "of teacher",
    "+-",
    "goal",
    "accuracy",
    "ms",
)


def show(results: dict[str, Any]) -> str:
    """The results as tables beside the goals."""

    def number(value: float | None, form: str = ".3g") -> str:
        return "" if value is None else format(value, form)

    samples = table(
        [*HEADS],
        [
            [
                r["method"],
                r["grid"],
                r["evaluations"],
                r["used"],
                number(r["fd"]),
                number(r["standard_error"], ".2g"),
                number(r["over_floor"], ".2f"),
                number(r["best_seen_over_floor"], ".2f"),
                number(r["over_teacher"], ".2f"),
                number(r["over_teacher_error"], ".2g"),
                number(r["goal"]),
                number(r["accuracy"], ".1%"),
                number(1000 * r["seconds_per_image"], ".0f"),
            ]
            for r in results["rows"]
        ],
    )
    lines = results["paths"]
    evaluations = sorted({p["evaluations"] for p in lines})
    by = {(p["method"], p["evaluations"]): p["rms"] for p in lines}
    names = dict.fromkeys(p["method"] for p in lines)
    errors = table(
        ["RMS from the trajectory", *map(str, evaluations)],
        [[name, *(number(by.get((name, n)), ".2g") for n in evaluations)] for name in names],
    )
    f, ref = results["floor"], results["reference"]
    few = digit_few.TEACHER[1]
    return (
        f"{samples}\nFloor {f['fd']:.3g} at n = {f['n']}; the teacher is {TEACHER[0]} with {TEACHER[1]} "
        f"evaluations, of students and of DDIM on their grid with {few}\n\n"
        f"{errors}\nReference: {ref['evaluations']} evaluations, two solvers {ref['gap']:.2g} apart"
    )
