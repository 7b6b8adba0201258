"""A few training examples of every task, and what data-assisted merging rules take from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Suite
from poe_models.methods import TaskData
from poe_models.weights.collecting import collect_activations, collect_fisher
from poe_models.weights.moments import ModuleMoments

BATCH = 16


@dataclass(frozen=True, eq=False)
class Calibration:
    """Examples of the train splits, drawn once.

    Args:
        suite: Experts, tasks and heads.
        examples: Of each task, at most what its train split has.
        seed: Of the choice.
    """

    suite: Suite
    examples: int = 128
    seed: int = 0

    def batches(self, task: str) -> list[Any]:
        """Inputs of the backbone, without labels."""
        train = self.suite.tasks[task].splits["train"]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(train), generator=generator)[: self.examples]
        return [self.suite.network.inputs(train, part, self.suite.device) for part in rows.split(BATCH)]

    @cached_property
    def fisher(self) -> ModuleMoments:
        """Exact diagonal Fisher information of every expert, collected on first use."""

        def of_task(task: str) -> dict[str, Tensor]:
            head, model = self.suite.heads[task], self.suite.model(self.suite.experts[task])
            return collect_fisher(model, self.batches(task), lambda m, x: head(m(x)), self._views)

        found = run_all(of_task, self.suite.experts)
        return ModuleMoments("fisher", dict(zip(self.suite.experts, found, strict=True)))

    @cached_property
    def activations(self) -> ModuleMoments:
        """Second moments of the inputs of every expert's layers, collected on first use; padding does not count."""

        def of_task(task: str) -> dict[str, Tensor]:
            model = self.suite.model(self.suite.experts[task])
            counted = self.suite.network.counted
            return collect_activations(model, self.batches(task), lambda m, x: m(x), self._views, counted=counted)

        found = run_all(of_task, self.suite.experts)
        return ModuleMoments("activations", dict(zip(self.suite.experts, found, strict=True)))

    def data(self) -> TaskData:
        """Unlabelled batches of every task and the logits of a merged model on them, each task by its own head."""
        model = self.suite.model(self.suite.base)

        def forward(weights: Mapping[str, Tensor], batch: Any) -> Tensor:
            inputs, task = batch
            logits: Tensor = self.suite.heads[task](functional_call(model, dict(weights), (inputs,)))
            return logits

        return TaskData({task: [(x, task) for x in self.batches(task)] for task in self.suite.experts}, forward)

    @property
    def _views(self) -> Mapping[str, Any]:
        return self.suite.vectors().views
