"""Features, logits and scores of one backbone on the tasks of a suite, each through its own frozen head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Network, Split, Suite
from diagnostics.predictions.metrics import METRICS, Kept

BATCH = {"cpu": 50, "cuda": 1000}
"""Examples at a time: what a core's cache holds; what fills a GPU."""


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
    kept = Kept.of_logits(logits, labels.to(logits.device))
    return Scores(**{name: METRICS[name].value(kept) for name in Scores.__dataclass_fields__})


def features(network: Network, model: nn.Module, split: Split, batch_size: int | None = None) -> Tensor:
    """Features of a split, batches side by side.

    Args:
        network: What reads the split.
        model: Its backbone, in evaluation mode.
        split: The examples.
        batch_size: Examples at a time; default `BATCH` of the model's device.

    Returns:
        Tensor (n, features) on the CPU, float32.
    """
    device = next(model.parameters()).device
    order = network.order(split)

    @torch.inference_mode()
    def of_rows(rows: Tensor) -> Tensor:
        found: Tensor = model(network.inputs(split, rows, device))
        return found.float().cpu()

    found = torch.cat(run_all(of_rows, order.split(batch_size or BATCH[device.type])))
    return found[torch.argsort(order)]


def task_logits(suite: Suite, source: Mapping[str, Tensor] | Path, split: str) -> dict[str, Tensor]:
    """Logits of one backbone on every task.

    Args:
        suite: The tasks, their heads and the network.
        source: State dict or checkpoint folder of the backbone.
        split: Name of the split.

    Returns:
        Task name to logits (n, classes).
    """
    model = suite.model(source)
    return {name: own_logits(suite, model, name, split) for name in suite.tasks}


def own_logits(suite: Suite, model: nn.Module, task: str, split: str) -> Tensor:
    """Logits (n, classes) of one open backbone on one task."""
    return suite.heads[task](features(suite.network, model, suite.tasks[task].splits[split]))


def evaluate(suite: Suite, source: Mapping[str, Tensor] | Path, split: str) -> dict[str, Scores]:
    """Scores of one backbone on every task; arguments as in `task_logits`."""
    labels = suite.labels(split)
    return {name: score(values, labels[name]) for name, values in task_logits(suite, source, split).items()}


def mean_scores(scores: Mapping[str, Scores]) -> Scores:
    """Unweighted mean over tasks."""
    rows = list(scores.values())
    return Scores(*(sum(getattr(row, field) for row in rows) / len(rows) for field in Scores.__dataclass_fields__))
