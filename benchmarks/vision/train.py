"""Make the vision suite once: SqueezeNet as the base, and heads and experts of four tasks.

`python -m benchmarks.vision.train` makes what is missing in the cache and prints the accuracies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.folders import key_of
from benchmarks.harness import training
from benchmarks.harness.suite import Suite
from benchmarks.vision.model import SqueezeNetwork, base_state
from benchmarks.vision.sources import SQUEEZENET, cache_folder
from benchmarks.vision.tasks import SplitSizes, load_tasks

VERSION = 1  # raise it when this file makes another base from the same archive


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How experts are made; other arguments are those of `training.Recipe`.

    Args:
        sizes: How the tasks are split.
    """

    epochs: int = 4
    sizes: SplitSizes = field(default_factory=SplitSizes)


def make_suite(
    recipe: Recipe | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    device: torch.device | str = "cpu",
) -> Suite:
    """Load the suite, making what the cache lacks.

    Args:
        recipe: How experts are made; default `Recipe()`.
        cache: Cache folder; default `sources.cache_folder()`.
        console: Where progress and skipped tasks are shown.
        device: Where models run.

    Returns:
        The suite, without the tasks whose archives could not be had.

    Raises:
        RuntimeError: If no task is left.
    """
    recipe, cache = recipe or Recipe(), cache or cache_folder()
    return training.suite_from_sources(
        Suite("vision", SqueezeNetwork(), cache, {}, {}, {}, device=torch.device(device)),
        key_of(VERSION, SQUEEZENET.sha256),
        lambda: base_state(cache),
        lambda: load_tasks(recipe.sizes, cache),
        recipe,
        cache,
        console,
    )


def main(make: Callable[..., Suite] = make_suite, kind: type[Recipe] = Recipe) -> None:
    """Make a suite of the images and print the accuracies.

    Args:
        make: Makes it.
        kind: Its recipe.
    """
    parser = argparse.ArgumentParser(description="Make the suite and print the accuracies.")
    parser.add_argument("--seed", type=int, default=0, help="order of the training images")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    parser.add_argument("--device", default="cpu", help="where to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    suite = make(kind(seed=arguments.seed), arguments.cache, console, arguments.device)
    training.show_suite(suite, console)


if __name__ == "__main__":
    main()
