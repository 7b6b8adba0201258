"""Experts on predictions around a centre: the MAP, and an ensemble of draws at T = 1 with nothing tuned, on a suite."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import Scores, mean_scores, score, task_logits
from benchmarks.harness.methods import Loaded
from benchmarks.harness.suite import Head, Suite
from diagnostics import functional_score
from inference.functional import SpanModel, fit, functional, functional_laplace
from inference.logit_temperature import fit_ensemble_temperature, scaled_mean
from inference.solution import FitInfo, Solution
from poe_models import Cauchy, Expert, InputGram, ProductOfExperts
from poe_models.posterior import Posterior

IMPORTANCE = 0.1
"""Of the weight-space experts beside one nat for each nat of divergence."""
STEPS, BATCH, LEARNING_RATE, MEMBERS = 150, 32, 0.05, 10
Logits = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """One way to predict on one suite and seed.

    Args:
        name: Of the row.
        plain: Mean test scores.
        scaled: The same with logits divided by what minimises validation NLL.
        divergence: Mean divergence from the own experts on validation inputs, which no fit has seen, nats.
        cpu_seconds: Of the fit or the draws; nan where there is nothing to measure.
    """

    name: str
    plain: Scores
    scaled: Scores
    divergence: float
    cpu_seconds: float


@dataclass(frozen=True)
class Through:
    """Logits of a task: its head on the network's features.

    Args:
        head: The task's.
    """

    head: Head

    def __call__(self, network: Any, inputs: Any) -> Tensor:
        """Logits (n, classes)."""
        return self.head(network(inputs))


@dataclass(frozen=True, eq=False)
class Predictions:
    """Experts on predictions of a suite's tasks, one a task.

    Args:
        suite: Tasks, heads and experts.
        calibration: The unlabelled examples.
        seed: Of mini-batches and draws.
    """

    suite: Suite
    calibration: Calibration
    seed: int

    @cached_property
    def vectors(self) -> Loaded:
        """The updates, read once."""
        return Loaded(self.suite.vectors())

    @cached_property
    def own(self) -> Logits:
        """Logits of every task's own expert on validation inputs."""
        return {task: task_logits(self.suite, path, "validation")[task] for task, path in self.suite.experts.items()}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The unlabelled inputs of every task."""
        return {task: joined(self.calibration.batches(task)) for task in self.suite.tasks}

    def lines(self, name: str, merged: Mapping[str, Tensor] | None, laplace: bool = True) -> Iterator[Line]:
        """Rows of a centre: by itself, the MAP around it, and perhaps draws of Laplace's approximation there.

        Args:
            name: Of the centre.
            merged: Its merged updates by module; None for the MAP of the weight-space product.
            laplace: Whether to draw, which takes several times as long as the fit.

        Yields:
            Each row when it is done.
        """
        model, posterior = self.posterior(merged)
        yield self._line(name, [model.weights(model.coefficients({"merge": 1.0}))], float("nan"))
        began = time.process_time()
        solution = self.fitted(model, posterior)
        spent = time.process_time() - began
        at = model.weights(posterior.coefficients(solution.value))
        yield self._line(f"{name} + predictions, MAP", [at], spent)
        if laplace:
            began = time.process_time()
            draws = functional_laplace(posterior, solution).sample(MEMBERS, self._generator())
            members = [model.weights(posterior.coefficients(draw)) for draw in draws.values[0]]
            spent = time.process_time() - began
            yield self._line(f"{name} + predictions, Laplace at T = 1", members, spent)

    def posterior(
        self, merged: Mapping[str, Tensor] | None, importance: float = IMPORTANCE
    ) -> tuple[SpanModel, Posterior]:
        """The network in the span through a centre, and the posterior of all experts there.

        Args:
            merged: The centre's merged updates by module; None for the MAP of the weight-space product.
            importance: Of the experts in weight space.
        """
        names = self.vectors.vectors.names
        experts = tuple(Expert(each, InputGram(), Cauchy(), importance=importance) for each in names)
        model = SpanModel(self.suite.model(self.suite.base), self.vectors.vectors, ProductOfExperts(experts), merged)
        heads = {task: Through(self.suite.heads[task]) for task in self.suite.tasks}
        return model, model.posterior(*(functional(t, model, self.inputs[t], head) for t, head in heads.items()))

    def fitted(self, model: SpanModel, posterior: Posterior) -> Solution[FitInfo]:
        """The MAP, from the centre."""
        generator = torch.Generator().manual_seed(self.seed)
        return fit(
            posterior,
            model.start(),
            generator=generator,
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
        )

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.suite.device).manual_seed(self.seed)

    def _line(self, name: str, states: list[dict[str, Tensor]], seconds: float) -> Line:
        """Scores of one model, or of the mean of several."""
        members = {split: self._tables(states, split) for split in ("validation", "test")}
        divisor = fit_ensemble_temperature(members["validation"], self.suite.labels("validation"))
        labels = self.suite.labels("test")
        plain, scaled = (
            mean_scores({task: score(scaled_mean(each, by), labels[task]) for task, each in members["test"].items()})
            for by in (1.0, divisor)
        )
        seen = {task: scaled_mean(each, 1.0) for task, each in members["validation"].items()}
        divergence = functional_score({name: seen}, self.own, seed=0, logits=True).mean(name).value
        return Line(name, plain, scaled, divergence, seconds)

    def _tables(self, states: list[dict[str, Tensor]], split: str) -> Logits:
        """Logits of every member by task, (members, n, classes)."""
        tables = [task_logits(self.suite, {k: v.detach() for k, v in state.items()}, split) for state in states]
        return {task: torch.stack([table[task] for table in tables]) for task in self.suite.tasks}


def joined(batches: list[Any]) -> Any:
    """Batches as one set of inputs; named tuples of padded texts are padded to one length.

    Args:
        batches: Of `Calibration.batches`.
    """
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    longest = max(part.shape[1] for batch in batches for part in batch)
    columns = zip(*batches, strict=True)
    padded = ([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in column] for column in columns)
    return type(batches[0])(*(torch.cat(parts) for parts in padded))


HEADER = ("method", "accuracy", "NLL", "NLL scaled", "ECE", "ECE scaled", "KL", "CPU s")


def cells(line: Line) -> list[str]:
    """A row as text, by `HEADER`."""
    numbers = (line.plain.accuracy, line.plain.nll, line.scaled.nll, line.plain.ece, line.scaled.ece, line.divergence)
    seconds = "" if line.cpu_seconds != line.cpu_seconds else f"{line.cpu_seconds:.0f}"
    return [line.name, *(f"{number:.3f}" for number in numbers), seconds]


def note(lines: Sequence[Line], examples: int) -> str:
    """What the rows are, in words.

    Args:
        lines: The rows.
        examples: Unlabelled, of each task.
    """
    first, fitted = lines[0], lines[1]
    return (
        f"Experts on predictions of {examples} unlabelled training examples a task, around {first.name}: accuracy "
        f"{first.plain.accuracy:.3f} to {fitted.plain.accuracy:.3f}, NLL with scaled logits {first.scaled.nll:.3f} to "
        f"{fitted.scaled.nll:.3f}. KL: mean divergence from the own experts on validation inputs, nats, without labels."
    )
