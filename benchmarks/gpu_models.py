"""Whole models on a GPU: merges of checkpoints, rows of the benchmark of speed, a model in shards, both suites."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from typing_extensions import override

from benchmarks.gpu_measures import CPU, EXPERTS, SEED, Sizes, measured, write_models, write_shards
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import evaluate, mean_scores
from benchmarks.harness.functional import Predictions
from benchmarks.harness.methods import MAPS, Method, solve
from benchmarks.harness.suite import Suite, Task
from benchmarks.registry import load, recipe_of
from benchmarks.speed_models import llama, shapes_of, write
from benchmarks.speed_rows import ROWS
from inference import merge_checkpoint, plan
from inference.models.digest import Silent
from poe_models import Cauchy, InputGram, ProductOfExperts, TaskArithmetic, TaskVectors

_INPUT_GRAM = next(each for each in MAPS if each.name == "InputGram, Cauchy")


def checkpoints(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Merges of whole folders, reading, checksums and writing included.

    Yields:
        Lines of the table.
    """
    yield (
        "| device | layers | million parameters | s | MB read / s | peak GPU MiB | peak main memory MiB | "
        "predicted by `plan`, MiB |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    poe = ProductOfExperts.of([f"expert{i}" for i in range(EXPERTS)], InputGram(), Cauchy())
    for layers, places in sizes.models:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            parameters = write_models(home, layers, sizes.width, EXPERTS, SEED, device)
            for name in places:
                place = CPU if name == "CPU" else device
                experts = {each: home / each for each in poe.update_names}
                vectors = TaskVectors(home / "base", experts, device=place)
                predicted = plan(vectors, poe).peak_bytes / 2**20
                spent = measured(lambda: _merged(vectors, poe, home), place, 0)  # noqa: B023 (called at once)
                read = sum(path.stat().st_size for path in home.rglob("*.safetensors")) / 1e6 / spent.seconds
                memory = f"{spent.mebibytes} | {spent.main / 2**20:.0f} | {predicted:.0f}"
                yield f"| {name} | {layers} | {parameters / 1e6:.0f} | {spent.seconds:.1f} | {read:.0f} | {memory} |"


def _merged(vectors: TaskVectors, poe: ProductOfExperts, home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as out:
        merge_checkpoint(vectors, poe, Path(out) / "merged")


def speeds(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """The rows of the benchmark of speed on the device, after one of them that loads its libraries.

    Yields:
        Lines of the table.
    """
    yield "| row | s | peak GPU MiB | peak main memory MiB | not converged |\n|---|---:|---:|---:|---:|"
    shapes = shapes_of(sizes.speed)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shapes)
        ROWS["InputGram, Cauchy"](Path(folder), shapes, device)
        for name in ROWS:
            missed: list[int] = []
            spent = measured(lambda: missed.append(ROWS[name](Path(folder), shapes, device)), device, 0)  # noqa: B023
            yield f"| {name} | {spent.seconds:.2f} | {spent.mebibytes} | {spent.main / 2**20:.0f} | {missed[0]} |"


class Stages(Silent):
    """Notes when the stages of a merge began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    @override
    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self.began[stage] = time.perf_counter()


def seven_billion(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """The merge of a large sharded bfloat16 model.

    Yields:
        Lines of the table.
    """
    yield (
        "| experts | billion parameters | GB read | GB written | checksums s | merging s | all s | peak GPU GiB | "
        "predicted by `plan`, GiB | peak main memory GiB | not converged |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    *model, in_shard, experts = sizes.large
    shapes = replace(llama(*model), experts=experts)
    with tempfile.TemporaryDirectory() as folder:
        base, *tuned = write_shards(Path(folder), shapes, in_shard, SEED, device, torch.bfloat16)
        vectors = TaskVectors(base, {each.name: each for each in tuned}, device=device)
        poe = ProductOfExperts.of(vectors.names, InputGram(), Cauchy())
        predicted, stages, missed = plan(vectors, poe).peak_bytes / 2**30, Stages(), []

        def work() -> None:
            done = merge_checkpoint(vectors, poe, Path(folder) / "merged", progress=stages)
            missed.append(len(done.not_converged))

        started = time.perf_counter()
        spent = measured(work, device, 0)
        merging = started + spent.seconds - stages.began["merging"]
        sums = stages.began["merging"] - stages.began["checksums"]
        read = (experts + 1) * shapes.numel * 2 / 1e9
        peak = "" if spent.peak is None else f"{spent.peak / 2**30:.2f}"
        yield (
            f"| {experts} | {shapes.numel / 1e9:.2f} | {read:.1f} | {shapes.numel * 2 / 1e9:.1f} | {sums:.1f} | "
            f"{merging:.1f} | {spent.seconds:.1f} | {peak} | {predicted:.2f} | {spent.main / 2**30:.1f} | {missed[0]} |"
        )


def suites(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Merges of the suites, made and judged in both places, and a fit of experts on predictions on the device.

    Yields:
        Lines of the table.
    """
    yield (
        "| suite | merge | accuracy, CPU | accuracy, GPU | NLL, CPU | NLL, GPU | CPU s | GPU s |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|"
    )
    names, most = sizes.suites
    for name in names:
        recipe = recipe_of(name, SEED, full=True)
        made = {place: load(name, recipe, None, Console(stderr=True), str(place)) for place in (device, CPU)}
        yield from suite_rows(made[CPU], made[device], most)


def suite_rows(here: Suite, there: Suite, most: int) -> Iterator[str]:
    """Rows of one suite.

    Args:
        here: On the CPU.
        there: On the device.
        most: Test examples of a task.

    Yields:
        Lines of the table.
    """
    here, there = (replace(each, tasks=shortened(each.tasks, most)) for each in (here, there))
    for method, scaling in ((Method("task arithmetic", "", TaskArithmetic()), 0.3), (_INPUT_GRAM, 1.0)):
        cells = []
        for suite in (here, there):
            began = time.perf_counter()
            merge = solve(method, suite.vectors(), 0.0 if method.rule else 0.1)
            scores = mean_scores(evaluate(suite, merge.state(scaling), "test"))
            cells.append((scores, time.perf_counter() - began))
        (one, spent), (other, took) = cells
        yield (
            f"| {here.name} | {method.name} | {one.accuracy:.4f} | {other.accuracy:.4f} | {one.nll:.4f} | "
            f"{other.nll:.4f} | {spent:.1f} | {took:.1f} |"
        )
    began = time.perf_counter()
    *_, fitted = Predictions(there, Calibration(there, 128, SEED), SEED).lines("", None, laplace=False)
    took = time.perf_counter() - began
    plain = fitted.plain
    yield (
        f"| {here.name} | InputGram, Cauchy + predictions | not measured | {plain.accuracy:.4f} | not measured | "
        f"{plain.nll:.4f} | not measured | {took:.1f} |"
    )


def shortened(tasks: Mapping[str, Task], most: int) -> dict[str, Any]:
    """Tasks with no more test examples than this."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        test = task.splits["test"]
        few = test.take(torch.arange(min(most, len(test))))
        found[name] = replace(task, splits={**task.splits, "test": few})  # type: ignore[type-var]
    return found
