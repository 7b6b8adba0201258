"""Score of a merged model on tasks, for searches that ask for it many times: one number, no intervals.

>>> tasks = [Task("sign", [(torch.eye(2), torch.tensor([0, 1]))])]
>>> score = TaskScore(tasks, nn.Linear(2, 2), "accuracy")
>>> score({"weight": torch.eye(2), "bias": torch.zeros(2)}), score.minimize
(1.0, False)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.predictions.metrics import METRICS, metrics_named
from diagnostics.predictions.model_outputs import open_model
from inference.models.outputs import class_rows
from inference.models.predictor import Runner
from inference.models.tasks import Task
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.task_vectors import Source

__all__ = ["FUNCTIONAL", "TaskScore"]

FUNCTIONAL = "functional"
"""Mean divergence from the own experts' predictions, in nats, which needs no labels."""


class TaskScore:
    """Mean over tasks of one metric, as a function of a state dict.

    Args:
        tasks: The tasks.
        network: The architecture; never written to.
        metric: A metric of ``evaluate``, or ``"functional"``: the mean KL divergence of the model's class
            probabilities from those of the task's own expert, without labels.
        experts: Task to its own expert, for ``"functional"``.
        base: Checkpoint that adapters are opened on.
        submodule: Where in the network the checkpoints are.
        fraction: Share of each task's batches that are used, the first ones.

    Attributes:
        minimize: Whether a smaller score is better.

    Raises:
        ValueError: If there are no tasks, the metric is unknown, a task has no batch or no expert that it needs, or the
            fraction is not in (0, 1].
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        network: nn.Module,
        metric: str = "accuracy",
        *,
        experts: Mapping[str, Source] | None = None,
        base: Source | None = None,
        submodule: str = "",
        fraction: float = 1.0,
    ) -> None:
        if not tasks:
            raise ValueError("`TaskScore(tasks=[])`: there are none. Give at least one `Task`.")
        if not 0 < fraction <= 1:
            raise ValueError(f"`TaskScore(fraction={fraction})`: a share of the batches, above 0 and at most 1.")
        self.metric = metric
        self.minimize = metric == FUNCTIONAL or not metrics_named([metric], "TaskScore")[0].higher
        self._tasks = [replace(task, loader=_first(task, fraction)) for task in tasks]
        self._network, self._submodule = network, submodule
        self._teachers = self._taught(experts or {}, base) if metric == FUNCTIONAL else {}

    def __call__(self, state: Mapping[str, Tensor]) -> float:
        """The score of a model.

        Raises:
            ValueError: If the state lacks a tensor of the network, or a batch cannot be scored.
        """
        if self.metric == FUNCTIONAL:
            found = [self._divergence(task, state) for task in self._tasks]
        else:
            model = open_model("the merged model", dict(state), self._network, None, self._submodule)
            metric = METRICS[self.metric]
            every = [model.classes(t) if metric.kind == "classes" else model.values(t) for t in self._tasks]
            found = [float(metric.statistic(kept)(kept.rows.new_ones(1, kept.size))) for kept in every]
        return math.fsum(found) / len(found)

    def _taught(self, experts: Mapping[str, Source], base: Source | None) -> dict[str, Tensor]:
        """Log probabilities of every task's own expert, ``(n, classes)``."""
        lacking = [task.name for task in self._tasks if task.name not in experts]
        if lacking:
            raise ValueError(
                f"`TaskScore(metric='functional')`: task {lacking[0]!r} has no expert, only "
                f"{', '.join(experts) or 'none'} are given. Tasks are called like their experts."
            )
        opened = None if base is None else open_checkpoint(base)
        found = {}
        for task in self._tasks:
            expert = open_checkpoint(experts[task.name], base=opened)
            found[task.name] = self._log_probabilities(task, {name: expert.read(name) for name in expert.tensors})
        return found

    def _divergence(self, task: Task, state: Mapping[str, Tensor]) -> float:
        teacher, student = self._teachers[task.name], self._log_probabilities(task, state)
        differences = torch.where(teacher > -torch.inf, teacher - student, 0.0)
        return float((teacher.exp() * differences).sum(-1).mean())

    def _log_probabilities(self, task: Task, state: Mapping[str, Tensor]) -> Tensor:
        open_model("the model", dict(state), self._network, None, self._submodule)  # which refuses what does not fit
        prefix = f"{self._submodule}." if self._submodule else ""
        own = self._network.state_dict()
        fixed = {prefix + name: value for name, value in state.items() if prefix + name in own}
        return Runner(self._network, task.loader, fixed, {}, task.logits, None, class_rows)({})


def _first(task: Task, fraction: float) -> list[Any]:
    """The first batches of a task, in memory."""
    batches = list(task.loader)
    if not batches:
        raise ValueError(f"task {task.name!r}: the loader has no batches. Give it some data.")
    return list(itertools.islice(batches, math.ceil(fraction * len(batches))))
