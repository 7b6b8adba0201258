"""Make the efficientnet suite once: EfficientNet-lite0 as the base, on the tasks of the vision suite.

`python -m benchmarks.vision.train_efficientnet` makes what is missing in the cache and prints the accuracies. BatchNorm
normalises by its batch while experts are tuned, so that every expert has running statistics of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from typing_extensions import override

from benchmarks import archives
from benchmarks.folders import key_of
from benchmarks.harness import training
from benchmarks.harness.suite import Suite
from benchmarks.vision import train
from benchmarks.vision.efficientnet import EfficientNetwork, base_state
from benchmarks.vision.sources import EFFICIENTNET
from benchmarks.vision.tasks import SplitSizes, load_tasks

VERSION = 1  # raise it when the base or the experts' training changes


@dataclass(frozen=True)
class Recipe(train.Recipe):
    """How experts are made, with half the epochs and images of the vision suite and ten times its learning rate.

    The head was fitted under ImageNet's running statistics, which a task's own batches change at once: at 1e-4 a
    hundred steps did not make good for that. The arguments are those of `benchmarks.vision.train.Recipe`.
    """

    epochs: int = 2
    learning_rate: float = 1e-3
    sizes: SplitSizes = field(default_factory=lambda: SplitSizes(train=2000))

    @override
    def adapted(self, model: nn.Module) -> nn.Module:
        """All of the backbone, with BatchNorm in training mode."""
        for module in model.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        return model


def make_suite(
    recipe: Recipe | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    device: torch.device | str = "cpu",
) -> Suite:
    """Load the suite, making what the cache lacks.

    Args:
        recipe: How experts are made; default `Recipe()`.
        cache: Cache folder; default the user's. The tasks are those of the folder `vision` beside it.
        console: Where progress and skipped tasks are shown.
        device: Where models run.

    Returns:
        The suite, without the tasks whose archives could not be had.

    Raises:
        RuntimeError: If no task is left.
    """
    recipe, cache = recipe or Recipe(), cache or archives.cache_folder("efficientnet")
    return training.suite_from_sources(
        Suite("efficientnet", EfficientNetwork(), cache, {}, {}, {}, device=torch.device(device)),
        key_of(VERSION, EFFICIENTNET.sha256),
        lambda: base_state(cache),
        lambda: load_tasks(recipe.sizes, cache.parent / "vision"),
        recipe,
        cache,
        console,
    )


if __name__ == "__main__":
    train.main(make_suite, Recipe)
