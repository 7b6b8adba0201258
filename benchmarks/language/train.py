"""Make the language suite once: MiniLM as the base, and heads and experts of six tasks.

`python -m benchmarks.language.train` makes what is missing in the cache and prints the accuracies.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.folders import key_of
from benchmarks.harness import training
from benchmarks.harness.suite import Suite
from benchmarks.language.model import MiniLMNetwork, base_state
from benchmarks.language.sources import MINILM, cache_folder
from benchmarks.language.tasks import SplitSizes, load_tasks

VERSION = 2  # raise it when this file makes another base from the same archive


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How experts are made; further arguments are those of `training.Recipe`.

    Args:
        sizes: How the tasks are split.
    """

    epochs: int = 1
    learning_rate: float = 5e-5
    head_c: float = 10.0
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
        MissingSourceError: If the base is not there and cannot be downloaded.
    """
    recipe, cache = recipe or Recipe(), cache or cache_folder()
    return training.suite_from_sources(
        Suite("language", MiniLMNetwork(), cache, {}, {}, {}, device=torch.device(device)),
        key_of(VERSION, MINILM.sha256),
        lambda: base_state(cache),
        lambda: load_tasks(recipe.sizes, cache),
        recipe,
        cache,
        console,
    )


def main() -> None:
    """Make the suite and print the accuracies."""
    usual = Recipe()
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=usual.seed, help="order of the training texts")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="passes over the training texts")
    parser.add_argument("--test", type=int, default=usual.sizes.test, help="most texts to judge by")
    parser.add_argument("--validation", type=int, default=usual.sizes.validation, help="most texts to choose by")
    parser.add_argument("--shots", type=int, default=usual.sizes.shots, help="texts per class of the frozen head")
    parser.add_argument("--train", type=int, default=usual.sizes.train, help="most texts to tune on")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder; None is the user's")
    parser.add_argument("--device", default="cpu", help="where to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    sizes = SplitSizes(arguments.test, arguments.validation, arguments.shots, arguments.train)
    recipe = Recipe(epochs=arguments.epochs, seed=arguments.seed, sizes=sizes)
    suite = make_suite(recipe, arguments.cache, console, arguments.device)
    training.show_suite(suite, console)


if __name__ == "__main__":
    main()
