"""Predictions of a demo's merge and of ensembles around it, on inputs that have changed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.corruptions import Corruptions
from benchmarks.harness.demo import MERGED
from benchmarks.harness.ensembles import PREFIX, Ensembles
from benchmarks.harness.methods import METHODS
from benchmarks.harness.outcomes import GIBBS, LAST, MAP, NOISE, SCALED, SCALED_MAP, TWIN, Budget
from benchmarks.harness.parallel import run_all
from benchmarks.harness.report import MEAN
from benchmarks.harness.suite import Split, Suite
from benchmarks.harness.suite_model import Examples
from diagnostics.predictions.corruptions import SEVERITIES
from inference.logit_temperature import fit_logit_temperature
from inference.models.design import Design
from inference.models.ensemble import Prediction

ENSEMBLES = (GIBBS, TWIN, NOISE)
CLEAN, OTHERS = ("clean", 0), ("other tasks", 0)
Condition = tuple[str, int]
"""Kind and severity of a corruption, `CLEAN`, or `OTHERS`."""
Predictions = Mapping[Condition, Mapping[str, Prediction]]
"""Condition -> task of the head -> prediction."""
Tables = Mapping[str, Mapping[str, Tensor]]
"""Way to predict -> task of the head -> log probabilities of each member, (S, n, classes)."""


def conditions(corruptions: Corruptions) -> tuple[Condition, ...]:
    """Everything that the heads are shown."""
    return (CLEAN, *((kind, severity) for kind in corruptions.kinds for severity in SEVERITIES), OTHERS)


@dataclass(frozen=True)
class Best:
    """What the demo chose.

    Args:
        name: Of the method.
        design: With λ and η.
        heat: Temperature of the last layer's ensembles and what divides their members' logits, by kind, as they are and
            scaled.
        members: Of each, with which its temperature was chosen.
        merged: The MAP as a checkpoint folder.
    """

    name: str
    design: Design
    heat: Mapping[str, tuple[float, float]]
    members: int
    merged: Path


def read_demo(folder: Path, names: Sequence[str]) -> Best:
    """The demo's best product of experts on validation, and what has the lowest NLL there of each kind of ensemble.

    Args:
        folder: The demo's output folder.
        names: Of the experts.

    Returns:
        The choice.

    Raises:
        FileNotFoundError: If the folder is not the demo's.
    """
    files = [folder / "results.csv", folder / "temperatures.csv", folder / MERGED / "model.safetensors"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"`read_demo({str(folder)!r})`: there is no {missing[0]}. Run the suite's demo first.")
    methods = {method.name: method for method in METHODS if method.energy is not None}
    with files[0].open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == MEAN and row["method"] in methods]
    best = max(rows, key=lambda row: float(row["validation_accuracy"]))
    with files[1].open(newline="", encoding="utf-8") as file:
        tried = [row for row in csv.DictReader(file) if row["sampled"] == LAST]
    ways = [way for kind in ENSEMBLES for way in (kind, kind + SCALED)]
    chosen = {way: _coldest_best([row for row in tried if row["members"] == way]) for way in ways}
    heat = {way: (float(row["temperature"]), float(row["logit_temperature"])) for way, row in chosen.items()}
    design = Design(methods[best["method"]].design(names, float(best["eta"])), float(best["scaling"]))
    return Best(best["method"], design, heat, int(chosen[GIBBS]["num_members"]), folder / MERGED)


def _coldest_best(path: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The row of a path with the lowest NLL."""
    return min(path, key=lambda row: (float(row["nll"]), float(row["temperature"])))


class Shift:
    """Predictions of the MAP and of ensembles under every condition, with logits as they are and scaled.

    Args:
        suite: Tasks, heads and experts.
        best: The merge.
        corruptions: Of the tasks' test examples.
        seed: Of draws and corruptions.
        budget: How members are drawn.
    """

    def __init__(self, suite: Suite, best: Best, corruptions: Corruptions, seed: int, budget: Budget) -> None:
        self.suite, self.best, self.corruptions, self.seed = suite, best, corruptions, seed
        self._ensembles = Ensembles(suite, best.design, best.merged, seed, budget)

    def predictions(self, progress: Callable[[int, int], None]) -> dict[str, Predictions]:
        """Every way to predict -> its predictions; the MAP comes first.

        Args:
            progress: Called with the number of finished conditions and their total.

        Returns:
            All predictions.
        """
        states, everything, done = self.members(), conditions(self.corruptions), count(1)
        validation = self.tables({MAP: states[MAP]}, self._ensembles.validation)[MAP]
        point = {task: table[0] for task, table in validation.items()}
        divisors = {way: divisor for way, (_, divisor) in self.best.heat.items()}
        divisors |= {MAP: 1.0, SCALED_MAP: fit_logit_temperature(point, self._ensembles.validation.labels)}

        def under(condition: Condition) -> Tables:
            found = self.tables(states, Examples.shown(self.suite, self.shown(condition)))
            progress(next(done), len(everything))
            return found

        tables = dict(zip(everything, run_all(under, everything), strict=True))
        return {
            way: {
                condition: {task: self.mixture(each, divisors[way]) for task, each in by[way].items()}
                for condition, by in tables.items()
            }
            for way in states
        }

    def members(self) -> dict[str, list[dict[str, Tensor]]]:
        """Tensors of the last layer of every member, by the names in the suite's model; the MAP is its own one."""
        states: dict[str, list[dict[str, Tensor]]] = {}
        for way, (temperature, _) in self.best.heat.items():  # noise asks for Gibbs draws, which are made once
            kind = way.removesuffix(SCALED)
            draws = self._ensembles.draw(LAST, kind, temperature, self.best.members)
            states[way] = self._ensembles.states(draws, kind)
        merged = load_file(self.best.merged / "model.safetensors")
        point = [{name: merged[name.removeprefix(PREFIX)] for name in states[GIBBS][0]}]
        return {MAP: point, SCALED_MAP: point, **states}

    def shown(self, condition: Condition) -> dict[str, list[Split]]:
        """Task of the head -> what it is shown."""
        test = {name: task.splits["test"] for name, task in self.suite.tasks.items()}
        if condition == OTHERS:
            return {name: [split for other, split in test.items() if other != name] for name in test}
        if condition != CLEAN:
            kind, severity = condition
            test = {n: self.corruptions.corrupted(each, kind, severity, self.seed) for n, each in test.items()}
        return {name: [split] for name, split in test.items()}

    def tables(self, states: Mapping[str, Sequence[Mapping[str, Tensor]]], examples: Examples) -> Tables:
        """Log probabilities of all members; what comes before the last layer is computed once.

        Args:
            states: Way to predict -> the tensors of each member.
            examples: What the heads are shown.
        """
        runner, found = self._ensembles.runner(LAST, GIBBS, examples), {}
        for way, members in states.items():
            by_task = examples.by_task(torch.stack([runner(state) for state in members], 1))
            found[way] = self._ensembles.own({task: table.transpose(0, 1) for task, table in by_task.items()})
        return found

    def mixture(self, log_probabilities: Tensor, divisor: float) -> Prediction:
        """The prediction of members (S, n, classes) whose logits are divided."""
        return replace(mixture(log_probabilities, divisor), reused=self.suite.network.cut)


def mixture(log_probabilities: Tensor, divisor: float = 1.0) -> Prediction:
    """The prediction of members.

    Args:
        log_probabilities: (S, n, classes).
        divisor: Of every member's logits.
    """
    each = (log_probabilities.double() / divisor).softmax(-1)
    mean = each.mean(0)
    entropy, own = torch.special.entr(mean).sum(-1), torch.special.entr(each).sum(-1).mean(0)
    return Prediction(mean, entropy, (entropy - own).clamp(min=0), len(each), None)
