"""The benchmark of Bayesian model merging on toy suites: rows of every way, and a page from their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import bmm
from benchmarks.harness.suite import Suite
from tests.toy_suites import toy_language, toy_suite


@pytest.mark.parametrize("make", [toy_suite, toy_language])
def test_rows_of_every_way(make: Callable[[Path], Suite], tmp_path: Path) -> None:
    suite = make(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    bench = bmm.Bench(dataclasses.replace(suite, tasks=tasks), 6, 4, 0)
    lines = bmm.lines_of(bench, ["zero", "TIES"], lambda _: None)
    ways = ["data-assisted", "data-free", "data-free, no labels"]
    assert [line.way for line in lines] == [*ways, "data-free, random", "data-free, shared grid", "alone", *ways]
    assert all(0 <= line.accuracy <= 1 for line in lines)
    text = bmm.report({("toy", 4): lines, ("toy", 5): lines}, ["an abacus"], "the command")
    assert f"| zero | data-free | {lines[1].accuracy:.3f} [" in text
    assert "training seeds 4, 5" in text
