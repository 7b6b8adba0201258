"""The benchmark of functional experts on toy suites of images and of texts: rows, and a page from their numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import functional, functional_evidence
from benchmarks.harness import functional as harness
from benchmarks.harness.suite import Suite
from poe_models.methods import TaskArithmetic
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # ten steps lead nowhere near the mode
def test_designs_of_functional_posteriors_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "STEPS", 10)
    monkeypatch.setattr(functional_evidence, "RULES", {"task arithmetic": TaskArithmetic(0.3)})
    suite = toy_language(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    lines = functional_evidence.lines_of(dataclasses.replace(suite, tasks=tasks), 0, 3, (1.0,), lambda _: None)
    assert [line.center for line in lines] == ["InputGram, Cauchy", "task arithmetic", "RegMean"]
    assert all(math.isfinite(line.evidence) and line.divergence > 0 and line.fitted > 0 for line in lines)
    text = functional_evidence.report({("toy", 4): lines}, ["an abacus"], 3, "the command")
    assert f"| toy | 4 | RegMean | 1 | {lines[-1].evidence:.0f} |" in text
    assert "| toy | 4 | Laplace evidence | 3 |" in text


def test_designs_without_evidence_are_listed_and_not_ranked() -> None:
    lines = [
        functional_evidence.Line("a center", 0.1, evidence, 0.2, 0.3 + place, 0.9 - place, 0.5 + place, 7.0)
        for place, evidence in enumerate([-40.0, -50.0, -60.0, float("nan")])
    ]
    assert [(one.merges, one.with_accuracy, one.regret) for one in functional_evidence.judged(lines)][::2] == [
        (3, 1.0, 0.0),
        (3, 1.0, 0.0),
    ]
    assert "| a center | 0.1 | none |" in functional_evidence.report({("toy", 0): lines}, ["an abacus"], 6, "it")
