"""The benchmark of Bayesian model merging on toy suites: rows of every way, and a page from their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import bmm, bmm_few, bmm_sampling
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


def test_rows_of_few_inputs_and_none(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    lines = bmm_few.lines_of(dataclasses.replace(suite, tasks=tasks), 0, 3, lambda _: None)
    ways = ["RegMean, λ searched", "Activation", "Mixed, share searched"]
    assert [(line.anchor, line.way) for line in lines[:9]] == [(str(n), way) for n in (1, 5, 128) for way in ways]
    assert [(line.way, line.trials) for line in lines[9:]] == [
        ("InputGram", 3),
        ("InputGram, precision by evidence", 0),
    ]
    text = bmm_few.report({("toy", 4): lines, ("toy", 5): lines}, ["an abacus"], "the command")
    assert f"| toy | 5 | Activation | {lines[4].accuracy:.3f} [" in text


def test_fronts_of_draws_and_of_noise(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    found = bmm_sampling.Fronts(suite, 0, 2, 3, lambda _: None).compare("Cauchy")
    kinds = bmm_sampling.series(found)
    assert {kind: len(names) for kind, names in kinds.items()} == {"Gibbs": 3, "white noise": 3}
    assert all(names[0] == "MAP" for names in kinds.values())
    text = bmm_sampling.report({("toy", 0, "Cauchy"): found}, ["an abacus"], 3, "the command")
    assert f"| toy | 0 | Cauchy | {found.mean('MAP').value:.3f} |" in text
    bmm_sampling.draw({("toy", 0, "Cauchy"): found}, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 10_000
