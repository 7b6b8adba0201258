r"""Models evaluated on tasks: every metric with its interval, normalised by the tasks' own experts, paired comparison.

>>> tasks = [Task("sign", [(torch.eye(2), torch.tensor([0, 1]))] * 20, metrics=("accuracy", "ece"))]
>>> right, wrong = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
>>> right.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
<All keys matched successfully>
>>> wrong.load_state_dict({"weight": -torch.eye(2), "bias": torch.zeros(2)})
<All keys matched successfully>
>>> found = evaluate({"wrong": wrong, "right": right}, tasks, seed=0, reference="wrong")
>>> print(found.score("right", "accuracy", "sign").value, found.difference("right", "accuracy").value)
1.0 1.0
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.text import Text
from torch import Tensor, nn

from diagnostics.estimates import Estimate, Statistic, estimate_of, interval_ends, resamples
from diagnostics.predictions.metrics import METRICS, Kept, Metric, metrics_named
from diagnostics.predictions.model_outputs import Model, OpenModel, open_model
from inference.models.ranks import ALONE, Ranks
from inference.models.tasks import Task
from poe_models.printing import Brief, visible
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.task_vectors import Source

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["ModelScores", "evaluate"]

CLASS_METRICS = ("accuracy", "nll", "brier", "ece")
MEAN = "mean"
"""Name in tables of the mean over the tasks that have a metric."""
Cell = tuple[str, str]
"""A task and a metric."""


@dataclass(frozen=True, eq=False, repr=False)
class ModelScores(Brief):
    """Scores of M models on tasks, with B resamples of each task's examples that all models share.

    Attributes:
        models: Names.
        examples: Task to its number of examples.
        values: Task and metric to ``(M,)``.
        replicates: Task and metric to ``(B, M)``.
        experts: Task and metric to the score of the task's own expert, ``(1 + B,)``, the data first.
        reference: The model that differences are from, or None.
        confidence: Level of the intervals.
    """

    models: tuple[str, ...]
    examples: Mapping[str, int]
    values: Mapping[Cell, Tensor]
    replicates: Mapping[Cell, Tensor]
    experts: Mapping[Cell, Tensor]
    reference: str | None
    confidence: float

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.examples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that any task has."""
        return tuple(dict.fromkeys(metric for _, metric in self.values))

    def score(self, model: str, metric: str, task: str | None = None) -> Estimate:
        """A metric of a model on a task, or its mean over the tasks that have it."""
        place = self._place(model)
        found = [(self.values[cell][place], self.replicates[cell][:, place]) for cell in self._cells(metric, task)]
        kind = METRICS[metric]
        return self._estimate(found, kind, kind.bounds)

    def difference(self, model: str, metric: str, task: str | None = None, reference: str | None = None) -> Estimate:
        """Score of a model less that of the reference, paired over examples; arguments as in ``score``.

        The interval is for one pair that was named without looking at these scores.

        Raises:
            ValueError: If there is no reference.
        """
        other = reference or self.reference
        if other is None:
            raise ValueError("`ModelScores.difference(...)`: compared with what? Give `reference=`, a model's name.")
        one, two = self._place(model), self._place(other)
        found = [
            (self.values[cell][one] - self.values[cell][two], replicates[:, one] - replicates[:, two])
            for cell in self._cells(metric, task)
            for replicates in (self.replicates[cell],)
        ]
        return self._estimate(found, METRICS[metric])

    def normalised(self, model: str, metric: str = "accuracy", task: str | None = None) -> Estimate:
        """Score of a model divided by that of the task's own expert on the same examples, or its mean over tasks.

        Raises:
            ValueError: If lower is better, or a task has no expert.
        """
        if not METRICS[metric].higher:
            raise ValueError(f"`ModelScores.normalised({metric!r})`: lower is better. Look at the difference instead.")
        cells = self._cells(metric, task)
        lacking = next((task for task, name in cells if (task, name) not in self.experts), None)
        if lacking is not None:
            raise ValueError(
                f"`ModelScores.normalised(...)`: task {lacking!r} has no expert to divide by. Give "
                "`evaluate(experts={task: model})`."
            )
        place = self._place(model)
        found = [
            (self.values[cell][place] / self.experts[cell][0], self.replicates[cell][:, place] / self.experts[cell][1:])
            for cell in cells
        ]
        return self._estimate(found, METRICS[metric])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, task and metric, and for the mean over tasks (task ``MEAN``) where there are several.

        Columns are the value with the ends of its interval, its standard error, the normalised score where there is an
        expert, and the difference from the reference.
        """
        import pandas as pd

        rows = []
        for where, found in self._entries():
            row: dict[str, Any] = dict(zip(("model", "task", "metric"), where, strict=True))
            row["examples"] = self.examples.get(where[1], sum(self.examples.values()))
            for name, each in found.items():
                start = "" if name == "value" else f"{name}_"
                row |= {
                    name: each.value,
                    f"{start}low": each.low,
                    f"{start}high": each.high,
                    f"{start}error": each.error,
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def __rich__(self) -> Table:
        """The table that ``rich.print`` and the command line print; a number not to be trusted has a question mark."""
        from rich.table import Table

        compared = {} if self.reference is None else {"difference": f"less {self.reference}"}
        columns = {"value": "score", **({"normalised": "over expert"} if self.experts else {}), **compared}
        heads = [escape(visible(head)) for head in ("task", "metric", "model", *columns.values())]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for head in heads:
            table.add_column(head, overflow="fold")  # names that are cut off could not be told apart
        last = ("", "")
        for (model, task, metric), found in self._entries():
            same = (task, metric) == last
            names = ("" if same else task, "" if same else metric, model)
            cells = (_shown(found[name]) if name in found else "" for name in columns)
            table.add_row(*(Text(visible(cell)) for cell in (*names, *cells)))
            last = (task, metric)
        return table

    def _entries(self) -> list[tuple[tuple[str, str, str], dict[str, Estimate]]]:
        """Model, task or ``MEAN``, and metric, with the estimates that there are; the mean last."""
        several = [metric for metric in self.metrics if len(self._cells(metric, None)) > 1]
        places: list[tuple[str | None, str]] = [*self.values, *((None, metric) for metric in several)]
        return [
            ((model, task or MEAN, metric), self._found(model, task, metric))
            for task, metric in places
            for model in self.models
        ]

    def _found(self, model: str, task: str | None, metric: str) -> dict[str, Estimate]:
        found = {"value": self.score(model, metric, task)}
        if METRICS[metric].higher and all(cell in self.experts for cell in self._cells(metric, task)):
            found["normalised"] = self.normalised(model, metric, task)
        if self.reference is not None and model != self.reference:
            found["difference"] = self.difference(model, metric, task)
        return found

    def _cells(self, metric: str, task: str | None) -> list[Cell]:
        cells = [cell for cell in self.values if cell[1] == metric and task in (None, cell[0])]
        if not cells:
            known = [f"{metric} on {task}" for task, metric in self.values]
            raise ValueError(
                f"`ModelScores`: no {metric!r}{f' on {task!r}' if task else ''}; there are {', '.join(known)}."
            )
        return cells

    def _place(self, model: str) -> int:
        return self.models.index(_known(model, self.models, "ModelScores"))

    def _estimate(
        self,
        found: Sequence[tuple[Tensor, Tensor]],
        metric: Metric,
        bounds: tuple[float, float] = (-torch.inf, torch.inf),
    ) -> Estimate:
        value, replicates = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
        return estimate_of(float(value), replicates, self.confidence, interval=metric.interval, bounds=bounds)


def _shown(estimate: Estimate) -> str:
    return str(replace(estimate, warnings=())) + (" ?" if estimate.warnings else "")


def evaluate(
    models: Mapping[str, Model],
    tasks: Sequence[Task],
    *,
    seed: int,
    metrics: Sequence[str] = CLASS_METRICS,
    network: nn.Module | None = None,
    experts: Mapping[str, Model] | None = None,
    base: Source | None = None,
    reference: str | None = None,
    submodule: str = "",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> ModelScores:
    """Evaluate models on tasks, on the same examples and the same resamples of them.

    Of a class prediction four numbers are kept, so that language models are no different: a task of tokens has batches
    whose labels are -100 where nothing is asked.

    Args:
        models: Name to model: a network with its weights, a state dict, folder, weight file, adapter, a list of the
            folders of an ensemble's members, or a ``MergedEnsemble``. Of an ensemble mean probabilities are scored.
        tasks: The tasks.
        seed: Of the resamples.
        metrics: Names of ``diagnostics.predictions.metrics.METRICS``, for tasks that name none of their own.
        network: The architecture that weights are loaded into, on the device to compute on; never written to.
        experts: Task to the model that was fine-tuned on it; scores are divided by its.
        base: The base that adapters among the models are of.
        reference: Name of the model that the others are compared with.
        submodule: Where in the network the checkpoints are, if a head was put on them.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.
        progress: Called with the number of pairs of model and task that are done, and of all that are this process's.
        ranks: The processes that divide these pairs between them; all get the same scores.

    Raises:
        ValueError: If a metric is unknown, a task has no batches or unfit labels, outputs are NaN, or names do not fit.
        CheckpointError: If a checkpoint cannot be opened, or lacks a tensor of the network.
    """
    interval_ends(confidence, "evaluate")
    wanted = _wanted(models, tasks, metrics, experts or {}, reference)
    origin = None if base is None else open_checkpoint(base)
    opened = [open_model(name, model, network, origin, submodule) for name, model in models.items()]
    own = {t: open_model(f"expert of {t}", m, network, origin, submodule) for t, m in (experts or {}).items()}
    pairs = [(task, m) for task in tasks for m in [*opened, *([own[task.name]] if task.name in own else [])]]
    seen: dict[str, Tensor] = {}
    calls = [partial(_kept, model, task, wanted[task.name][0].kind, seen) for task, model in pairs]
    found = ranks.results(calls, progress)
    for (task, model), each in zip(pairs, found, strict=True):  # of all processes
        _require_same_examples(model, task, each, seen)
    values, replicates, divisors, sizes = {}, {}, {}, {}
    for number, task in enumerate(tasks):
        kept = [each for each, (its, _) in zip(found, pairs, strict=True) if its is task]
        sizes[task.name] = kept[0].size
        weights = list(resamples(kept[0].size, num_resamples, seed=seed + 1 + number))
        for metric in wanted[task.name]:
            scores = torch.stack([_replicates(metric.statistic(each), weights) for each in kept], 1)
            cell = task.name, metric.name
            values[cell], replicates[cell] = scores[0, : len(opened)], scores[1:, : len(opened)]
            if task.name in own:
                divisors[cell] = scores[:, -1]
    return ModelScores(tuple(models), sizes, values, replicates, divisors, reference, confidence)


def _replicates(statistic: Statistic, weights: Sequence[Tensor]) -> Tensor:
    """The statistic of the data as they are, then of resamples, ``(1 + B,)``."""
    whole = torch.ones(1, weights[0].shape[1], dtype=torch.float64)
    return torch.cat([statistic(each) for each in (whole, *weights)])


def _kept(model: OpenModel, task: Task, kind: str, seen: dict[str, Tensor]) -> Kept:
    """Predictions of a model on a task; errors name both."""
    try:
        found = model.classes(task) if kind == "classes" else model.values(task)
    except ValueError as error:
        text = str(error)
        for start in ("predict(...)", "predict(loader=...)", "predict_values(...)"):
            text = text.removeprefix(f"`{start}`: ")
        raise ValueError(f"`evaluate(...)`: {model.name!r} on task {task.name!r}: {text}") from error
    _require_same_examples(model, task, found, seen)
    return found


def _require_same_examples(model: OpenModel, task: Task, found: Kept, seen: dict[str, Tensor]) -> None:
    """Refuse predictions of other examples than the first ones of the task, which are noted by its name."""
    if not torch.equal(found.examples, seen.setdefault(task.name, found.examples)):
        raise ValueError(
            f"`evaluate(...)`: {model.name!r} on task {task.name!r}: its predictions are of other examples than those "
            "of the model before it. Turn shuffling off."
        )


def _wanted(
    models: Mapping[str, Model],
    tasks: Sequence[Task],
    metrics: Sequence[str],
    experts: Mapping[str, Model],
    reference: str | None,
) -> dict[str, tuple[Metric, ...]]:
    """Task to its metrics, once it is clear that all names fit."""
    if not models or not tasks:
        raise ValueError(f"`evaluate(...)`: {len(models)} models and {len(tasks)} tasks. Give one of both at least.")
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`evaluate(tasks=...)`: two tasks are called {twice!r}. Give each a name of its own.")
    for task in experts:
        _known(task, names, "evaluate(experts=...)", "task")
    if reference is not None:
        _known(reference, list(models), "evaluate(reference=...)")
    return {task.name: metrics_named(task.metrics or metrics, "evaluate") for task in tasks}


def _known(name: str, names: Sequence[str], called: str, what: str = "model") -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"`{called}`: no {what} {name!r}; {hint}There are {', '.join(names)}.")
    return name
