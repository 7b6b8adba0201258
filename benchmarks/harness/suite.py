"""A suite: a base, its fine-tunes, the tasks that judge their merges, and the network that reads the tasks' inputs.

A suite of your own needs a `Network` and tasks; `benchmarks.harness.training.make_suite` makes the rest of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from poe_models import DEFAULT_RULES, RuleTable, TaskVectors

SPLITS = ("test", "validation", "head", "train")


class Split(Protocol):
    """Labelled examples; what else they hold is between the tasks and their network."""

    @property
    def labels(self) -> Tensor:
        """Class of each example, (n,) int64."""

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Split:
        """The examples in these rows."""


class Task(Protocol):
    """One classification task, as disjoint splits."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def splits(self) -> Mapping[str, Split]:
        """One split for each of `SPLITS`."""

    @property
    def key(self) -> str:
        """A hash that changes when the examples may change."""


class Network(Protocol):
    """A backbone and the inputs that it reads: all that a suite has to say about images or texts."""

    @property
    def name(self) -> str:
        """Its name on the pages of results."""

    @property
    def config(self) -> Mapping[str, object]:
        """What goes into `config.json` beside its weights."""

    @property
    def last_layer(self) -> str:
        """Regular expression that finds the tensors of its last layer, which ensembles sample alone."""

    @property
    def cut(self) -> str:
        """A submodule of what `open` makes; nothing before it depends on the last layer, so ensembles run that once."""

    def open(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A module in evaluation mode with a copy of these weights; it turns inputs into features (n, features)."""

    def inputs(self, split: Any, rows: Tensor, device: torch.device) -> Any:
        """The module's one argument for the examples ``rows`` of a split."""

    def counted(self, inputs: Any) -> Tensor | None:
        """Mask (n, places) of the places of some inputs that are no padding; None where there is none."""

    def order(self, split: Any) -> Tensor:
        """Rows of a split, those that are cheap to read together side by side."""


@dataclass(frozen=True)
class Head:
    """A linear classifier on frozen features.

    Args:
        weight: Tensor (classes, features).
        bias: Tensor (classes,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, features), on the features' device."""
        return features @ self.weight.to(features).T + self.bias.to(features)


@dataclass(frozen=True, eq=False)
class Suite:
    """A base and its fine-tunes, and what to judge their merges by.

    Args:
        name: Of the suite.
        network: The backbone.
        base: Checkpoint folder of the base.
        experts: Task name to the checkpoint folder of its expert.
        tasks: Task name to its examples.
        heads: Task name to its frozen head.
        records: Task name to accuracies and seconds of the training, as plain data.
        skipped: Task name to the reason why it is not there.
        device: Where models run and updates are merged.
    """

    name: str
    network: Network
    base: Path
    experts: Mapping[str, Path]
    tasks: Mapping[str, Any]
    heads: Mapping[str, Head]
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Different seeds of the experts' trainings, as far as they are recorded."""
        return tuple(sorted({record["recipe"]["seed"] for record in self.records.values()}))

    def limited(self, validation: int | None, test: int | None) -> Suite:
        """The suite with fewer examples to choose and to judge by.

        Args:
            validation: Most examples of each task's validation split, the first ones; None for all.
            test: The same of its test split.
        """
        most = {"validation": validation, "test": test}

        def some(name: str, split: Split) -> Split:
            limit = most.get(name)
            return split if limit is None or limit >= len(split) else split.take(torch.arange(limit))

        tasks = {
            name: replace(task, splits={each: some(each, split) for each, split in task.splits.items()})
            for name, task in self.tasks.items()
        }
        return replace(self, tasks=tasks)

    @property
    def key(self) -> list[str]:
        """Names that change when the base, the tasks or the experts do."""
        return [self.base.name, *(f"{name} {task.key}" for name, task in self.tasks.items()), *map(str, self._made)]

    @property
    def _made(self) -> list[str]:
        return [folder.parent.name for folder in self.experts.values()]

    def vectors(self, dtype: torch.dtype = torch.float32, rules: RuleTable = DEFAULT_RULES) -> TaskVectors:
        """The fine-tunes' updates, on the suite's device."""
        return TaskVectors(self.base, self.experts, device=self.device, dtype=dtype, rules=rules)

    def model(self, source: Mapping[str, Tensor] | Path) -> nn.Module:
        """The backbone of a state dict or of a checkpoint folder, on the suite's device."""
        state = load_file(source / "model.safetensors") if isinstance(source, Path) else source
        return self.network.open(state).to(self.device)

    def labels(self, split: str) -> dict[str, Tensor]:
        """Task name to the labels of one of its splits."""
        return {name: task.splits[split].labels for name, task in self.tasks.items()}
