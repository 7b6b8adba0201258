"""Logits and scores of one backbone on every task, each through its own frozen head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.vision import metrics
from benchmarks.vision.model import SqueezeNet, build, preprocess
from benchmarks.vision.parallel import run_all
from benchmarks.vision.tasks import Task


@dataclass(frozen=True)
class Head:
    """A linear classifier on frozen features.

    Args:
        weight: (classes, 512).
        bias: (classes,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, 512)."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Scores:
    """How good one model is on one task.

    Args:
        accuracy: Share of correct predictions.
        nll: Nats per example.
        brier: Squared error summed over classes.
        ece: Expected calibration error, 20 equal-width bins.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


def score(logits: Tensor, labels: Tensor) -> Scores:
    """All scores of logits (n, classes) for labels (n,)."""
    return Scores(*(metric(logits, labels) for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece)))


def backbone(source: Mapping[str, Tensor] | Path) -> SqueezeNet:
    """A backbone from a state dict or a checkpoint folder, ready to evaluate.

    Args:
        source: State dict, or folder with `model.safetensors`.

    Returns:
        The model in evaluation mode, channels last: a third of the time on a CPU.
    """
    state = load_file(source / "model.safetensors") if isinstance(source, Path) else source
    return build(state).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def features(model: SqueezeNet, images: Tensor, batch_size: int = 50) -> Tensor:
    """Features of stored images, batches side by side.

    Args:
        model: The backbone.
        images: (n, channels, side, side) uint8.
        batch_size: Images at a time.

    Returns:
        (n, 512) float32.
    """

    @torch.inference_mode()
    def of_batch(batch: Tensor) -> Tensor:
        return model(preprocess(batch).contiguous(memory_format=torch.channels_last))

    return torch.cat(run_all(of_batch, images.split(batch_size)))


def task_logits(
    source: Mapping[str, Tensor] | Path, tasks: Mapping[str, Task], heads: Mapping[str, Head], split: str
) -> dict[str, Tensor]:
    """Logits of one backbone on every task.

    Args:
        source: State dict or checkpoint folder of the backbone.
        tasks: The tasks by name.
        heads: Each task's frozen head.
        split: Name of the split.

    Returns:
        Task name -> (n, classes).
    """
    model = backbone(source)
    return {name: heads[name](features(model, task.splits[split].images)) for name, task in tasks.items()}


def evaluate(
    source: Mapping[str, Tensor] | Path, tasks: Mapping[str, Task], heads: Mapping[str, Head], split: str
) -> dict[str, Scores]:
    """Scores of one backbone on every task; arguments as in `task_logits`."""
    logits = task_logits(source, tasks, heads, split)
    return {name: score(values, tasks[name].splits[split].labels) for name, values in logits.items()}


def mean_scores(scores: Mapping[str, Scores]) -> Scores:
    """Unweighted mean over tasks."""
    rows = list(scores.values())
    return Scores(*(sum(getattr(row, field) for row in rows) / len(rows) for field in Scores.__dataclass_fields__))
