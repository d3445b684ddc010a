"""MNIST: Fréchet distance and class accuracy of the base network's digits, and how fast it trains."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.digit_judge import held_out_loss, told, with_earlier
from benchmarks.kept import Kept
from benchmarks.report import RESULTS, table
from benchmarks.training import load, seeded
from diffedu import weights
from diffedu.classifier import CLASSIFIER, Classifier, in_chunks
from diffedu.data import mnist
from diffedu.denoiser import Denoiser, Guided
from diffedu.digit_metrics import features, statistics
from diffedu.digits import MNIST, SIDE, half_precision
from diffedu.exponential import DPMSolverPP2M
from diffedu.metrics import Moments, frechet_distance, moments
from diffedu.sampling import prior, sample
from diffedu.training import fit

SAMPLES, EVALUATIONS = 10_000, 10
BLOCK = 1000  # samples of one seed
FEW = 300  # as many as the book's page draws; a part of the samples at hand
CHUNK = 250  # of which so many pass through the network at a time: as much as the cache holds
FEW_BLOCKS = 2  # of the rows that are not asked for at n = 10,000
FLOOR_DRAWS = 10  # or as many as the samples have parts of n
TEST_ACCURACY_GOAL = 0.995
# Design goals. Their distances were measured in the features of another classifier, with these floors:
# so what compares is the distance over the floor at the same n.
GOAL_FLOORS = {1000: 1.77, 2000: 0.87, 10_000: 0.28}
SPEED_GOAL = {"images_per_second": 450, "threads": 2, "precision": "bf16", "best_seen_float32": 237}
UNFINISHED = RESULTS / "digits.unfinished"


class Row(NamedTuple):
    """A way to draw digits, its goals and the best seen: distances by n, class accuracy."""

    name: str
    weight: float | None  # of the guidance; None: unconditional
    goals: dict[int, float]
    best_seen: dict[int, float]
    accuracy_goal: float | None = None


ROWS = [
    Row("conditional", 1.0, {1000: 2.5, 10_000: 1.2}, {1000: 3.5, 10_000: 3.9}, 0.98),
    Row("unconditional", None, {1000: 4.0}, {1000: 29.0}),
    Row("guided, weight 1.5", 1.5, {}, {}, 0.995),
]


def denoiser(row: Row, net: nn.Module, labels: Tensor) -> Denoiser:
    """What draws the row's digits of these labels."""
    if row.weight is None:
        return MNIST.denoiser(net)
    conditional = MNIST.denoiser(net, labels)
    return conditional if row.weight == 1 else Guided(conditional, MNIST.denoiser(net), row.weight)


def starts(known: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Noise for a block of digits, and labels for them, drawn from the `known` ones, the data's.

    So the classes are as uneven as in as many training images: the floor is one for the samples, too.
    """
    generator = seeded(40_000 + seed)
    labels = known[torch.randint(len(known), (BLOCK,), generator=generator)]
    return prior(MNIST.schedule, (BLOCK, 1, SIDE, SIDE), generator), labels


def draw(row: Row, net: nn.Module, known: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 digits in [-1, 1] and the labels that were asked for."""
    start, labels = starts(known, seed)
    ts, found = MNIST.schedule.grid(EVALUATIONS), []
    for x, y in zip(torch.split(start, CHUNK), torch.split(labels, CHUNK), strict=True):
        with torch.no_grad():
            found.append(sample(denoiser(row, net, y), DPMSolverPP2M(), x, ts))
    return torch.cat(found).clamp(-1, 1), labels


class Blocks:
    """Blocks of samples of a network, drawn once: of each its features and the labels asked for."""

    def __init__(self, path: Path, net: nn.Module, classifier: Classifier, labels: Tensor) -> None:
        own = {"net": weights.digest(net.state_dict()), "by": weights.digest(classifier.state_dict())}
        self.kept, self.net, self.classifier, self.labels = Kept(path, own), net, classifier, labels

    def block(self, row: Row, seed: int) -> tuple[Tensor, Tensor]:
        """The features of a block of samples (1000, 64), and the labels that were asked for (1000,)."""
        name = f"{row.name}, seed {seed}"

        def make() -> dict[str, Tensor]:
            start = time.process_time()
            images, labels = draw(row, self.net, self.labels, seed)
            print(f"  {name}: {BLOCK} samples in {time.process_time() - start:.0f} CPU s", flush=True)
            return {"features": features(images), "labels": labels}

        found = self.kept.of(name, make)
        return found["features"], found["labels"]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of one value where there are two or more."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else None


def distances(seen: Tensor, n: int, test: Moments) -> list[float]:
    """The distances from the test images of the disjoint parts of n features, one after another."""
    return [frechet_distance(moments(part), test) for part in torch.split(seen, n) if len(part) == n]


def floor(train: Tensor, test: Moments, n: int) -> dict[str, Any]:
    """The distance of n training images from the test images: disjoint draws."""
    draws = min(max(FLOOR_DRAWS, SAMPLES // n), len(train) // n)
    rows = torch.randperm(len(train), generator=seeded(n))[: draws * n]
    value, deviation = mean_and_deviation(distances(train[rows], n, test))
    goal = GOAL_FLOORS.get(n)
    return {"n": n, "draws": draws, "fd": value, "deviation": deviation, "in_the_goals_features": goal}


def rows_of(
    row: Row, drawn: Blocks, test: Moments, floors: dict[int, float], blocks: int
) -> list[dict[str, Any]]:
    """The row's distances: means over all parts of 300 and of 1,000, and that of all, where there is a floor.

    What the classifier tells of the digits is of all of them in every line.
    """
    seen, labels = (
        torch.cat(parts) for parts in zip(*(drawn.block(row, k) for k in range(blocks)), strict=True)
    )
    judged = told(drawn.classifier, seen, None if row.weight is None else labels)
    lines = []
    for n in sorted({FEW, BLOCK, len(seen)} & set(floors)):
        each = distances(seen, n, test)
        (value, deviation), draws = mean_and_deviation(each), len(each)
        goal, best, theirs = row.goals.get(n), row.best_seen.get(n), GOAL_FLOORS.get(n)
        lines.append(
            {
                "samples": row.name,
                "weight": row.weight,
                "n": n,
                "draws": draws,
                "fd": value,
                "deviation": deviation,
                "over_floor": value / floors[n],
                "goal": goal,
                "goal_over_floor": goal / theirs if goal and theirs else None,
                "best_seen": best,
                "best_seen_over_floor": best / theirs if best and theirs else None,
                **judged,
                "accuracy_goal": row.accuracy_goal,
            }
        )
    return lines


def convolution_rate(repeats: int = 5) -> float:
    """Floating-point operations a second in a 3 x 3 convolution like the network's, there and back.

    128 channels, 7 x 7, a batch of training, float32; the best of so many tries.
    """
    layer = nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(MNIST.batch, 128, 7, 7, generator=seeded(0)).to(memory_format=torch.channels_last)
    x.requires_grad_()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(4):
            torch.autograd.backward(layer(x).sum())
        seconds.append((time.perf_counter() - start) / 4)
    return 3 * 2 * 128 * 128 * 9 * 7 * 7 * MNIST.batch / min(seconds)


def speed(images: Tensor, labels: Tensor, threads: int, steps: int = 25) -> dict[str, Any]:
    """Training images a second of the base network's recipe, and what its convolutions alone would allow."""
    torch.set_num_threads(threads)
    try:
        net, loss, generator = MNIST.untrained(0), MNIST.loss(images, labels), seeded(0)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(loss(net, generator).mean())
        each = counter.get_total_flops() / MNIST.batch
        rate, wall, cpu = convolution_rate(), time.perf_counter(), time.process_time()
        recipe = replace(MNIST.with_budget(steps * MNIST.batch).recipe, warmup=0)
        fit(net, loss, recipe, generator, progress=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        torch.set_num_threads(1)
    return {
        "threads": threads,
        "images_per_second": steps * MNIST.batch / wall,
        "images_per_cpu_second": steps * MNIST.batch / cpu,
        "flops_per_image": each,
        "convolution_flops_per_second": rate,
        "allowed_by_convolutions": rate / each,
        "share_of_that": steps * MNIST.batch / wall / (rate / each),
        "load": load(),
    }


def processor() -> dict[str, Any]:
    """What the processor's vector unit offers torch, and whether training uses bf16 for it."""
    plain = isinstance(half_precision(torch.device("cpu")), contextlib.nullcontext)
    return {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "precision": "float32: the processor does not multiply bf16" if plain else "bf16",
    }


def measure(samples: int = SAMPLES, unfinished: Path | None = None) -> dict[str, Any]:
    """The floor, the classifier, the speed of training, the samples; prints as it goes.

    An interrupted run goes on after the last thousand samples whose features are in `unfinished`; `finish`
    removes that file. Raises ValueError unless the number of samples is a multiple of 1,000.
    """
    if samples % BLOCK or samples <= 0:
        raise ValueError(f"samples must be a positive multiple of {BLOCK}; got {samples}")
    (images, labels), (test_images, test_labels) = (mnist(split, full=True) for split in ("train", "test"))
    classifier, net = CLASSIFIER.load(), MNIST.load()
    test, drawn = statistics(classifier), Blocks(unfinished or UNFINISHED, net, classifier, labels)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    speeds = [speed(images, labels, threads) for threads in (1, 2) if threads <= allowed]
    for s in speeds:
        print(
            f"  {s['threads']} threads: {s['images_per_second']:.0f} images/s, {s['share_of_that']:.0%} of "
            f"what float32 convolutions allow (load {s['load']})",
            flush=True,
        )
    with torch.no_grad():
        seen = torch.cat([classifier.features(x) for x in in_chunks(test_images)])
        sure = float(classifier.head(seen).softmax(1).max(1).values.mean())
    judged = told(classifier, seen, test_labels.long())
    print(f"  classifier: {judged['accuracy']:.2%} of the {len(seen)} test images", flush=True)
    facts = weights.shipped(MNIST.name)[1]
    loss = held_out_loss(net, test_images, test_labels.long(), facts)
    print(f"  loss on test images: {loss['loss']:.4f} +- {loss['standard_error']:.4f}", flush=True)
    with torch.no_grad():
        train = torch.cat([classifier.features(x) for x in in_chunks(images)])
    floor_rows = [floor(train, test, n) for n in sorted({FEW, BLOCK, FEW_BLOCKS * BLOCK, samples})]
    for f in floor_rows:
        print(f"  floor at n = {f['n']}: {f['fd']:.3g} (deviation {f['deviation']:.2g})", flush=True)
    floors, rows = {f["n"]: f["fd"] for f in floor_rows}, []
    for row in ROWS:
        blocks = samples // BLOCK if SAMPLES in row.goals else min(FEW_BLOCKS, samples // BLOCK)
        for line in rows_of(row, drawn, test, floors, blocks):
            rows.append(line)
            print(
                f"  {row.name}, n = {line['n']}: FD {line['fd']:.3g}, {line['over_floor']:.2f} floors",
                flush=True,
            )
    return {
        "problem": f"MNIST, {EVALUATIONS} evaluations of DPM-Solver++(2M) on the lambda grid, FD in the "
        "shipped classifier's features against the 10,000 test images; labels drawn from the training set's",
        "networks": {name: weights.shipped(name)[1]["digest"] for name in (MNIST.name, CLASSIFIER.name)},
        "classifier": judged | {"accuracy_goal": TEST_ACCURACY_GOAL, "mean_confidence": sure},
        "test_losses": with_earlier(loss, RESULTS / "digits.json"),
        "processor": processor(),
        "speed": speeds,
        "speed_goal": SPEED_GOAL,
        "floors": floor_rows,
        "rows": rows,
    }


def finish() -> None:
    """Remove the file of an interrupted run: its results are written."""
    UNFINISHED.unlink(missing_ok=True)


def show(results: dict[str, Any]) -> str:
    """The results as tables beside the goals."""

    def number(value: float | None, form: str = ".3g") -> str:
        return "" if value is None else format(value, form)

    floors = table(
        ["floor: training images", "FD", "deviation", "draws", "in the goals' features"],
        [
            [f["n"], number(f["fd"]), number(f["deviation"]), f["draws"], number(f["in_the_goals_features"])]
            for f in results["floors"]
        ],
    )
    rows = table(
        ["samples", "n", "draws", "FD", "+-", "floors", "goal", "best seen", "accuracy", "goal", "spread"],
        [
            [
                r["samples"],
                r["n"],
                r["draws"],
                number(r["fd"]),
                number(r["deviation"], ".2g"),
                number(r["over_floor"], ".2f"),
                number(r["goal_over_floor"], ".2f"),
                number(r["best_seen_over_floor"], ".2f"),
                number(r["accuracy"], ".2%"),
                number(r["accuracy_goal"], ".1%"),
                number(r["spread"] and r["spread"] / results["classifier"]["spread"], ".2f"),
            ]
            for r in results["rows"]
        ],
    )
    speeds = table(
        ["training, threads", "images/s", "images/CPU s", "convolutions allow", "share", "load"],
        [
            [
                s["threads"],
                number(s["images_per_second"], ".0f"),
                number(s["images_per_cpu_second"], ".0f"),
                number(s["allowed_by_convolutions"], ".0f"),
                number(s["share_of_that"], ".0%"),
                s["load"],
            ]
            for s in results["speed"]
        ],
    )
    c, p, goal = results["classifier"], results["processor"], results["speed_goal"]
    return (
        f"classifier: {c['accuracy']:.2%} of the test images (goal {c['accuracy_goal']:.1%})\n\n{floors}\n\n"
        f"Distances in floors at the same n, ours and the goals' each in its own features:\n{rows}\n\n"
        f"{speeds}\ngoal: {goal['images_per_second']} images/s, {goal['threads']} threads, "
        f"{goal['precision']} (best seen in float32: {goal['best_seen_float32']}); "
        f"here {p['vectors']}, {p['precision']}"
    )
