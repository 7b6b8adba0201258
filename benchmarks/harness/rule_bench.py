"""Merging rules tuned and judged on a suite, alone and as the centre of a posterior's anchor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import Scores, evaluate, mean_scores, task_logits
from benchmarks.harness.methods import MAPS, Loaded, Merge, Method, solve
from benchmarks.harness.rulebook import RULES, Rule
from benchmarks.harness.search import SCALINGS, Settings, search
from benchmarks.harness.suite import Suite

SEEDS = 5
"""Of rules that draw, on the test images."""
POSTERIORS = tuple(next(m for m in MAPS if m.name == f"{name}, Cauchy") for name in ("InputGram", "OutputGram"))
BASE = "none: the base"
ETA_HALF_DECADES = (-4, 6)
FIRST = (Settings(1.0, 0.1), Settings(1.0, 1000.0))
"""First trials of a posterior: the demo's default, and an anchor so strong that hardly more than its centre is left."""

Tables = Mapping[str, Tensor]
"""Task -> class probabilities of the test images, (n, classes)."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """One merge with the settings that validation chose.

    Args:
        settings: What was chosen; None where there was nothing to choose.
        validation: Mean validation accuracy.
        probabilities: On the test images.
        merge: The merge itself, before its scaling; None for the base.
        unconverged: How many modules did not converge.
    """

    settings: Settings | None
    validation: float
    probabilities: Tables
    merge: Merge | None
    unconverged: int = 0


@dataclass(frozen=True, eq=False)
class Line:
    """One rule, alone and as the centre of anchors.

    Args:
        rule: Its title.
        data: What it needs besides the updates.
        parameter: Name of its own parameter.
        alone: The rule itself.
        posteriors: Name of the residual map -> the posterior's MAP.
        seeds: Of a rule that draws: its test probabilities at the same settings for other seeds.
        seconds: All of it.
    """

    rule: str
    data: str
    parameter: str
    alone: Chosen
    posteriors: Mapping[str, Chosen]
    seeds: Sequence[Tables] = field(default=())
    seconds: float = 0.0


class Bench:
    """Rules tuned and judged on one suite.

    Args:
        suite: What to merge and to judge by.
        trials: Settings that each search may try.
        seed: Of searches and calibration images.
        examples: For data-assisted rules, of each task.
        scalings: Least and largest λ that is tried.
    """

    def __init__(
        self, suite: Suite, trials: int, seed: int, examples: int, scalings: tuple[float, float] = SCALINGS
    ) -> None:
        self.suite, self.trials, self.seed, self.scalings = suite, trials, seed, scalings
        self.vectors = suite.vectors()
        self.loaded = Loaded(self.vectors)
        self.calibration = Calibration(suite, examples, seed)

    def line(self, name: str) -> Line:
        """Everything about one rule of `RULES`."""
        started = time.perf_counter()
        rule = RULES[name](self.calibration)
        about = rule.method.about
        alone = self.tune(lambda s: self.merged(rule.at(s)), rule.tuned, rule.choices, rule.first)
        assert alone.settings is not None
        assert alone.merge is not None
        scaling = alone.settings.scaling
        centers = {module: scaling * update for module, update in alone.merge.matrices.items()}
        seeds = [alone.probabilities, *self.other_seeds(rule, alone.settings)] if hasattr(rule.method, "seed") else []
        line = Line(about.title, about.data, rule.parameter, alone, self.posteriors(centers), seeds)
        return replace(line, seconds=time.perf_counter() - started)

    def base_line(self) -> Line:
        """The base, and posteriors that are anchored at it."""
        started = time.perf_counter()
        accuracy = mean_scores(self.validation(self.suite.base)).accuracy
        alone = Chosen(None, accuracy, self.test(self.suite.base), None)
        line = Line(BASE, "none", "", alone, self.posteriors(None))
        return replace(line, seconds=time.perf_counter() - started)

    def posteriors(self, centers: Mapping[str, Tensor] | None) -> dict[str, Chosen]:
        """The tuned MAP under each residual map, anchored at a merge."""
        return {
            each.family: self.tune(
                lambda s, each=each: solve(each, self.loaded, s.eta, centers),  # type: ignore[misc]
                each.tuned,
                first=FIRST,
            )
            for each in POSTERIORS
        }

    def merged(self, method: Method) -> Merge:
        """The merge of a rule, which is shown the calibration images if it wants some."""
        assert method.rule is not None
        if method.rule.needs_loaders:
            method = replace(method, rule=method.rule.prepare(self.vectors, self.calibration.data()))
        return solve(method, self.loaded, 0.0)

    def other_seeds(self, rule: Rule, settings: Settings) -> list[Tables]:
        """Test probabilities of a rule that draws, for the seeds after the first; not of those that learn."""
        if rule.method.needs_loaders:
            return []
        found: list[Tables] = []
        for seed in range(1, SEEDS):
            method = rule.at(settings)
            again = replace(method, rule=replace(method.rule, seed=seed))  # type: ignore[type-var]
            found.append(self.test(self.merged(again).state(settings.scaling)))
        return found

    def tune(
        self,
        merged: Callable[[Settings], Merge],
        tuned: tuple[str, ...],
        choices: Sequence[float] = (),
        first: Sequence[Settings] = (),
    ) -> Chosen:
        """Choose settings on validation and judge them on test; what differs in λ alone is merged once.

        Args:
            merged: The merge of some settings.
            tuned: What is searched for.
            choices: What a parameter of the rule's own may be.
            first: The first trials.

        Returns:
            The choice.
        """
        merges: dict[Settings, Merge] = {}

        def scores(settings: Settings) -> Scores:
            key = replace(settings, scaling=1.0)
            if key not in merges:
                merges[key] = merged(key)
            return mean_scores(self.validation(merges[key].state(settings.scaling)))

        best, _ = search(scores, tuned, self.trials, self.seed, choices, first, ETA_HALF_DECADES, self.scalings)
        merge = merges[replace(best.settings, scaling=1.0)]
        probabilities = self.test(merge.state(best.settings.scaling))
        return Chosen(best.settings, best.scores.accuracy, probabilities, merge, len(merge.unconverged))

    def validation(self, source: Mapping[str, Tensor] | Path) -> dict[str, Scores]:
        """Validation scores of a backbone by task."""
        return evaluate(self.suite, source, "validation")

    def test(self, source: Mapping[str, Tensor] | Path) -> dict[str, Tensor]:
        """Test probabilities of a backbone by task."""
        logits = task_logits(self.suite, source, "test")
        return {task: values.double().softmax(1) for task, values in logits.items()}

    def bounds(self) -> tuple[Tables, Tables]:
        """Every expert on its own task; the mean of all experts' probabilities on every task."""
        everyone = {expert: self.test(folder) for expert, folder in self.suite.experts.items()}
        own = {task: everyone[task][task] for task in self.suite.tasks}
        mean = {task: torch.stack([each[task] for each in everyone.values()]).mean(0) for task in self.suite.tasks}
        return own, mean

    @property
    def labels(self) -> dict[str, Tensor]:
        """Labels of the test examples by task."""
        return self.suite.labels("test")
