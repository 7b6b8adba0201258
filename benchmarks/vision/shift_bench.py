"""Predictions of the demo's merge and of ensembles around it, on images that have changed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.harness.demo import MERGED
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.methods import METHODS
from benchmarks.harness.outcomes import GIBBS, MAP, NOISE, SCALED_MAP, TWIN, Budget
from benchmarks.harness.parallel import run_all
from benchmarks.harness.report import MEAN
from benchmarks.harness.suite import Suite
from benchmarks.vision.model import SqueezeNet, prepared
from diagnostics.predictions.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from inference.logit_temperature import fit_logit_temperature
from inference.models.design import Design
from inference.models.ensemble import Prediction

SCOPE = "last layer"
ENSEMBLES = (GIBBS, TWIN, NOISE)
BATCH = 50
CLEAN, OTHERS = ("clean", 0), ("other tasks", 0)
Condition = tuple[str, int]
"""Kind and severity of a corruption, `CLEAN`, or `OTHERS`."""
CONDITIONS: tuple[Condition, ...] = (CLEAN, *((k, s) for k in CORRUPTIONS for s in SEVERITIES), OTHERS)
Predictions = Mapping[Condition, Mapping[str, Prediction]]
"""Condition -> task of the head -> prediction."""


@dataclass(frozen=True)
class Best:
    """What the demo chose.

    Args:
        name: Of the method.
        design: With λ and η.
        temperatures: Of the last layer's ensembles, by kind.
        members: Of each, with which its temperature was chosen.
        merged: The MAP as a checkpoint folder.
    """

    name: str
    design: Design
    temperatures: Mapping[str, float]
    members: int
    merged: Path


def read_demo(folder: Path, names: Sequence[str]) -> Best:
    """The demo's best product of experts on validation, and each ensemble's temperature with the lowest NLL there.

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
        raise FileNotFoundError(f"`read_demo({str(folder)!r})`: there is no {missing[0]}. Run `make demo` first.")
    methods = {method.name: method for method in METHODS if method.energy is not None}
    with files[0].open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == MEAN and row["method"] in methods]
    best = max(rows, key=lambda row: float(row["validation_accuracy"]))
    with files[1].open(newline="", encoding="utf-8") as file:
        tried = [row for row in csv.DictReader(file) if row["sampled"] == SCOPE]
    chosen = {kind: _coldest_best([row for row in tried if row["members"] == kind]) for kind in ENSEMBLES}
    temperatures = {kind: float(row["temperature"]) for kind, row in chosen.items()}
    design = Design(methods[best["method"]].design(names, float(best["eta"])), float(best["scaling"]))
    return Best(best["method"], design, temperatures, int(chosen[GIBBS]["num_members"]), folder / MERGED)


def _coldest_best(path: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The row of a path with the lowest NLL."""
    return min(path, key=lambda row: (float(row["nll"]), float(row["temperature"])))


class Shift:
    """Predictions of the MAP and of ensembles under every condition.

    Args:
        suite: Tasks, heads and experts.
        best: The merge.
        seed: Of draws and of the noise in images.
        budget: How members are drawn.
    """

    def __init__(self, suite: Suite, best: Best, seed: int, budget: Budget) -> None:
        self.suite, self.best, self.seed, self.budget = suite, best, seed, budget
        state = load_file(best.merged / "model.safetensors")
        self.features = self._opened(state)
        self.features.fire9 = nn.Identity()  # type: ignore[assignment]
        self.layers: dict[str, list[nn.Module]] = {MAP: [self._last_layer(state)]}

    def draw(self) -> None:
        """Make the last layers of all members, once for all conditions."""
        ensembles = Ensembles(self.suite, self.best.design, self.best.merged, self.seed, self.budget)

        def drawn(kind: str) -> list[nn.Module]:
            ensemble = ensembles.ensemble(SCOPE, kind, self.best.temperatures[kind], self.best.members)
            return [self._last_layer(state) for state in ensemble.members()]

        self.layers |= dict(zip(ENSEMBLES, run_all(drawn, ENSEMBLES), strict=True))

    def images(self, condition: Condition) -> dict[str, list[Tensor]]:
        """Head of the task -> images that it is shown, as stored."""
        test = {name: task.splits["test"].images for name, task in self.suite.tasks.items()}
        if condition == CLEAN:
            return {name: [images] for name, images in test.items()}
        if condition == OTHERS:
            return {name: [images for other, images in test.items() if other != name] for name in test}
        kind, severity = condition
        return {name: [corrupt(each, kind, severity, seed=self.seed)] for name, each in test.items()}  # type: ignore[arg-type]

    def predictions(self, progress: Callable[[int, int], None]) -> dict[str, Predictions]:
        """Name of the members or of the point estimate -> its predictions; the MAP comes first.

        Args:
            progress: Called with the number of finished conditions and their total.

        Returns:
            All predictions.
        """
        done = count(1)

        def under(condition: Condition) -> dict[str, dict[str, Prediction]]:
            found = {task: self.of_head(task, images) for task, images in self.images(condition).items()}
            progress(next(done), len(CONDITIONS))
            return found

        self.draw()
        everything = dict(zip(CONDITIONS, run_all(under, CONDITIONS), strict=True))
        found: dict[str, Predictions] = {
            kind: {c: {task: each[kind] for task, each in heads.items()} for c, heads in everything.items()}
            for kind in self.layers
        }
        return {MAP: found[MAP], SCALED_MAP: self.scaled(found[MAP]), **{kind: found[kind] for kind in ENSEMBLES}}

    @torch.inference_mode()
    def of_head(self, task: str, images: Sequence[Tensor]) -> dict[str, Prediction]:
        """Predictions of one head with every kind of last layer; what is before it is computed once."""
        head, parts = self.suite.heads[task], [part for each in images for part in each.split(BATCH)]
        tables: dict[str, list[Tensor]] = {kind: [] for kind in self.layers}
        for part in parts:
            inputs = self.features.activations(prepared(part))
            for kind, layers in self.layers.items():
                logits = torch.stack([head(layer(inputs).mean((2, 3))) for layer in layers])
                tables[kind].append(logits.double().softmax(-1))
        return {kind: mixture(torch.cat(each, 1)) for kind, each in tables.items()}

    def scaled(self, point: Predictions) -> Predictions:
        """The MAP's predictions with logits divided by what is best on validation."""
        logits = task_logits(self.suite, self.best.merged, "validation")
        labels = {name: task.splits["validation"].labels for name, task in self.suite.tasks.items()}
        divisor = fit_logit_temperature(logits, labels)
        return {
            condition: {
                task: mixture((each.probabilities.log() / divisor).softmax(1).unsqueeze(0))
                for task, each in heads.items()
            }
            for condition, heads in point.items()
        }

    def _last_layer(self, state: Mapping[str, Tensor]) -> nn.Module:
        return self._opened(state).fire9

    def _opened(self, state: Mapping[str, Tensor]) -> SqueezeNet:
        opened = self.suite.network.open(state)
        assert isinstance(opened, SqueezeNet)
        return opened


def mixture(probabilities: Tensor) -> Prediction:
    """The prediction of members with probabilities (S, n, classes)."""
    mean = probabilities.mean(0)
    entropy, own = torch.special.entr(mean).sum(-1), torch.special.entr(probabilities).sum(-1).mean(0)
    return Prediction(mean, entropy, (entropy - own).clamp(min=0), len(probabilities), "fire9")
