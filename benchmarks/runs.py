"""Runs of a benchmark over suites and training seeds, each kept as a file, so that an interrupted one goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console

from benchmarks.folders import kept, key_of
from benchmarks.harness.parallel import machine
from benchmarks.harness.suite import Suite
from benchmarks.registry import load, recipe_of

Line = TypeVar("Line")
Tell = Callable[[Line], None]


def kept_runs(
    arguments: argparse.Namespace,
    settings: object,
    lines_of: Callable[[Suite, int, Tell[Line]], Sequence[Line]],
    read: Callable[[dict[str, Any]], Line],
    console: Console,
) -> tuple[dict[tuple[str, int], list[Line]], list[str]]:
    """Rows of every suite and training seed, made where they are not kept yet.

    Args:
        arguments: Of `suite_parser`.
        settings: Plain data that decides what comes out, beside suite and seed.
        lines_of: Makes the rows, dataclasses, of a suite and seed; its last argument is called with each.
        read: A row from plain data.
        console: Where experts' training and every row are shown.

    Returns:
        Suite and seed to its rows, and the machines they were measured on, in words.
    """
    found, machines = {}, []
    for name in arguments.suites:
        for seed in arguments.seeds:
            suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)

            def make(suite: Suite = suite, seed: int = seed) -> dict[str, Any]:
                lines: Sequence[Any] = lines_of(suite, seed, lambda line: console.print(line, highlight=False))
                return {"machine": machine(suite.device), "lines": [asdict(each) for each in lines]}

            saved = kept(arguments.kept / f"{name}-{seed}-{key_of(suite.key, settings)}.json", make)
            machines.append(saved["machine"])
            found[name, seed] = [read(each) for each in saved["lines"]]
    return found, machines
