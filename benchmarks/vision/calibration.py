"""A few training images of every task, and what data-assisted merging rules take from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.vision.evaluate import Head, backbone
from benchmarks.vision.model import preprocess
from benchmarks.vision.parallel import run_all
from benchmarks.vision.train import Suite
from poe_models import TaskVectors
from poe_models.methods import TaskData
from poe_models.weights.collecting import collect_activations, collect_fisher
from poe_models.weights.moments import ModuleStatistics

BATCH = 16


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images of the train splits, drawn once.

    Args:
        suite: Experts, tasks and heads.
        images: Of each task, at most what its train split has.
        seed: Of the choice.
    """

    suite: Suite
    images: int = 128
    seed: int = 0

    def batches(self, task: str) -> list[Tensor]:
        """Inputs of the backbone (b, 3, 64, 64), without labels."""
        train = self.suite.tasks[task].splits["train"]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(train), generator=generator)[: self.images]
        inputs = preprocess(train.images[rows]).contiguous(memory_format=torch.channels_last)
        return list(inputs.split(BATCH))

    @cached_property
    def fisher(self) -> ModuleStatistics:
        """Exact diagonal Fisher information of every expert, collected on first use."""

        def of_task(task: str) -> dict[str, Tensor]:
            head = self.suite.heads[task]
            return collect_fisher(
                backbone(self.suite.experts[task]), self.batches(task), lambda m, x: _logits(m, head, x), self._views
            )

        found = run_all(of_task, self.suite.experts)
        return ModuleStatistics("fisher", dict(zip(self.suite.experts, found, strict=True)))

    @cached_property
    def activations(self) -> ModuleStatistics:
        """Second moments of the inputs of every expert's layers, collected on first use."""

        def of_task(task: str) -> dict[str, Tensor]:
            return collect_activations(
                backbone(self.suite.experts[task]), self.batches(task), lambda m, x: m(x), self._views
            )

        found = run_all(of_task, self.suite.experts)
        return ModuleStatistics("activations", dict(zip(self.suite.experts, found, strict=True)))

    def data(self) -> TaskData:
        """Unlabelled batches of every task and the logits of a merged model on them, each task by its own head."""
        model = backbone(self.suite.base)

        def forward(weights: Mapping[str, Tensor], batch: Any) -> Tensor:
            inputs, task = batch
            logits: Tensor = self.suite.heads[task](functional_call(model, dict(weights), (inputs,)))
            return logits

        return TaskData({task: [(x, task) for x in self.batches(task)] for task in self.suite.experts}, forward)

    @property
    def _views(self) -> Mapping[str, Any]:
        return TaskVectors(self.suite.base, self.suite.experts).views


def _logits(model: nn.Module, head: Head, inputs: Tensor) -> Tensor:
    return head(model(inputs))
