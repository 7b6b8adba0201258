"""The suites there are, and how their experts are made in the demos and at full size."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.decoder import train as decoder
from benchmarks.harness.suite import Suite
from benchmarks.harness.training import Recipe
from benchmarks.language import tasks as language_tasks
from benchmarks.language import train as language
from benchmarks.vision import tasks as vision_tasks
from benchmarks.vision import train as vision
from benchmarks.vision import train_efficientnet as efficientnet

SUITES: dict[str, Callable[..., Suite]] = {
    "vision": vision.make_suite,
    "language": language.make_suite,
    "decoder": decoder.make_suite,
    "efficientnet": efficientnet.make_suite,
}
USUAL = ("vision", "language")
"""Suites of a benchmark by itself: the decoder has a page of its own and takes hours in the others, and efficientnet is
there for its BatchNorm."""
RECIPES: dict[tuple[str, bool], Callable[[int], Any]] = {
    ("vision", False): lambda seed: vision.Recipe(seed=seed),
    ("vision", True): lambda seed: vision.Recipe(
        seed=seed, sizes=vision_tasks.SplitSizes(test=4000, validation=1000, train=8000)
    ),
    ("language", False): lambda seed: language.Recipe(seed=seed),
    ("language", True): lambda seed: language.Recipe(
        seed=seed, sizes=language_tasks.SplitSizes(test=2000, validation=500, train=8000)
    ),
    ("efficientnet", False): lambda seed: efficientnet.Recipe(seed=seed),
    ("efficientnet", True): lambda seed: efficientnet.Recipe(
        seed=seed, sizes=vision_tasks.SplitSizes(test=4000, validation=1000, train=8000)
    ),
    ("decoder", False): lambda seed: decoder.Recipe(seed=seed),
    ("decoder", True): lambda seed: decoder.Recipe(seed=seed, blocks=None, sizes=decoder.FULL),
}
"""Suite, and whether at full size, to the recipe of a training seed. At full size all splits have more examples."""


def recipe_of(name: str, seed: int, full: bool) -> Recipe:
    """How the experts of a suite are made.

    Args:
        name: Of the suite.
        seed: Of the order of the training examples.
        full: At full size; else as in the demos.
    """
    recipe: Recipe = RECIPES[name, full](seed)
    return recipe


def load(name: str, recipe: Recipe, cache: Path | None, console: Console, device: str) -> Suite:
    """A suite, whose heads and experts are made where its cache lacks them.

    Args:
        name: Of the suite.
        recipe: How experts are made.
        cache: Folder with one cache for each suite; default the user's.
        console: Where progress is shown.
        device: Where models run.
    """
    return SUITES[name](recipe, cache and cache / name, console, device)


def suite_parser(
    about: str | None, name: str, seeds: str, default_seeds: Sequence[int] = (0, 1, 2)
) -> argparse.ArgumentParser:
    """Parser of a benchmark on the suites, with the arguments that all of these have.

    Args:
        about: Docstring of the benchmark.
        name: Its name: of its page in `benchmarks/results` and of the folder where it keeps what is done.
        seeds: What the seeds are of, besides training.
        default_seeds: The seeds that it has by itself.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else None)
    page = Path("benchmarks/results") / f"{name}.md"
    parser.add_argument("--out", type=Path, default=page, help="the page; tables are put beside it")
    parser.add_argument("--kept", type=Path, default=Path("out") / name, help="where what is done is kept")
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(USUAL))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default_seeds), help=f"of training, {seeds}")
    parser.add_argument("--full", action="store_true", help="more examples of every kind in training and tests")
    parser.add_argument("--device", default="cpu", help="where models run and updates are merged")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the suites' caches (default: the user's)")
    return parser


PLACES = ("out", "kept", "evidence", "cache", "device", "report", "machines")
"""Arguments that say where something is, and do not decide what comes out."""


def command_line(module: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What was typed, as far as it decides what comes out: arguments that are not the defaults.

    Args:
        module: Of the benchmark.
        parser: Its parser, with flags only.
        arguments: What was parsed.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--seeds", type=int, nargs="+", default=[0]), parser.add_argument("--out")
    >>> command_line("benchmarks.rules", parser, parser.parse_args(["--seeds", "1", "2", "--out", "x"]))
    'python -m benchmarks.rules --seeds 1 2'
    """
    words = []
    for name, value in vars(arguments).items():
        if name not in PLACES and value != parser.get_default(name):
            given = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, given)]
    return shlex.join(["python", "-m", module, *words])
