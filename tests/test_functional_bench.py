"""The benchmark of functional experts on toy suites of images and of texts: rows, and a page from their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import functional
from benchmarks.harness import functional as harness
from benchmarks.harness.suite import Suite
from tests.toy_suites import toy_language, toy_suite


@pytest.mark.filterwarnings("ignore:.*had not converged", "ignore:.*no forward pass uses pooler")
@pytest.mark.parametrize("make", [toy_suite, toy_language])
def test_fits_come_nearer_to_the_experts(
    make: Callable[[Path], Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "STEPS", 20)
    monkeypatch.setattr(harness, "MEMBERS", 2)
    suite = make(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    lines = functional.lines_of(dataclasses.replace(suite, tasks=tasks), 0, 6, lambda _: None)
    assert [line.name.partition(" + ")[0] for line in lines] == ["InputGram, Cauchy"] * 3 + ["RegMean"] * 3
    assert lines[1].divergence < lines[0].divergence
    text = functional.report({("toy", 4): lines}, ["an abacus"], "the command")
    assert f"| toy | 4 | InputGram, Cauchy + predictions, MAP | {lines[1].plain.accuracy:.3f} |" in text
    assert "Made by `the command` on an abacus" in text
