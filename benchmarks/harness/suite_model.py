"""A backbone under the heads of all tasks as one model, and the examples of all tasks as its batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.harness.evaluate import BATCH
from benchmarks.harness.suite import Split, Suite

NO_CLASS = -1e4
"""Logit of classes that a task does not have."""


class SuiteModel(nn.Module):
    """A backbone with the frozen heads of all tasks, whose logits are filled up to the same number of classes.

    Args:
        suite: The network and the heads; a batch names its task by position.
        source: State dict or checkpoint folder of the backbone.
    """

    def __init__(self, suite: Suite, source: Mapping[str, Tensor] | Path) -> None:
        super().__init__()
        self.backbone = suite.model(source)
        self.heads = list(suite.heads.values())
        self.classes = max(len(head.bias) for head in self.heads)

    @override
    def forward(self, inputs: Any, task: int) -> Tensor:
        """Logits (b, classes) of the backbone's inputs of one task."""
        return filled(self.heads[task](self.backbone(inputs)), self.classes)


def filled(logits: Tensor, classes: int) -> Tensor:
    """Logits (..., classes) with the classes that a task lacks."""
    return F.pad(logits, (0, classes - logits.shape[-1]), value=NO_CLASS)


@dataclass(frozen=True, eq=False)
class Examples:
    """One split of all tasks, one task after another, and in each of them those that are cheap to read side by side.

    Args:
        batches: Inputs of the backbone and the position of their task.
        labels: Task name -> (n,), in the split's own order.
        places: Task name -> (n,), where in its batches each example of the split is.
    """

    batches: list[tuple[Any, int]]
    labels: dict[str, Tensor]
    places: dict[str, Tensor]

    @classmethod
    def of(cls, suite: Suite, split: str, batch_size: int | None = None) -> Self:
        """Examples of a suite.

        Args:
            suite: Whose tasks and network.
            split: Name of the split.
            batch_size: Examples at a time; default `BATCH` of the suite's device.
        """
        return cls.shown(suite, {name: [task.splits[split]] for name, task in suite.tasks.items()}, batch_size)

    @classmethod
    def shown(cls, suite: Suite, splits: Mapping[str, Sequence[Split]], batch_size: int | None = None) -> Self:
        """What each head of a suite is shown, be it of its own task or not.

        Args:
            suite: Whose heads and network.
            splits: Task of each head -> its examples, one split after another.
            batch_size: Examples at a time; default `BATCH` of the suite's device.
        """
        size, batches, places = batch_size or BATCH[suite.device.type], [], {}
        for position, name in enumerate(suite.tasks):
            orders = [suite.network.order(split) for split in splits[name]]
            starts = itertools.accumulate([0, *(len(order) for order in orders[:-1])])
            places[name] = torch.cat([start + torch.argsort(each) for start, each in zip(starts, orders, strict=True)])
            for split, order in zip(splits[name], orders, strict=True):
                batches += [(suite.network.inputs(split, rows, suite.device), position) for rows in order.split(size)]
        labels = {name: torch.cat([split.labels for split in splits[name]]) for name in suite.tasks}
        return cls(batches, labels, places)

    def by_task(self, values: Tensor) -> dict[str, Tensor]:
        """Rows of all examples (n, ...) by task, in the split's own order."""
        parts = values.split([len(labels) for labels in self.labels.values()])
        return {name: part[self.places[name]] for name, part in zip(self.labels, parts, strict=True)}
