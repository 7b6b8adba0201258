"""The demo's stage of experts on predictions, on a toy suite: rows around the merge, and their file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness import demo
from benchmarks.harness import functional as harness
from benchmarks.harness.evaluate import evaluate, mean_scores
from inference.models.design import Design
from poe_models import Cauchy, InputGram, ProductOfExperts
from tests.toy_suites import toy_suite


@pytest.mark.filterwarnings("ignore:.*had not converged")
def test_predictions_are_fitted_around_the_best_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "STEPS", 40)
    suite = toy_suite(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    suite = dataclasses.replace(suite, tasks=tasks)
    design = Design(ProductOfExperts.of(list(suite.experts), InputGram(), Cauchy()), 0.7)
    lines = demo.fit_predictions(suite, design, 12, 0, tmp_path, Console(quiet=True))
    assert [line.name for line in lines] == ["the best merge", "the best merge + predictions, MAP"]
    assert lines[1].divergence < lines[0].divergence
    demo.merge_checkpoint(suite.vectors(), design, tmp_path / "merged")
    merged = mean_scores(evaluate(suite, tmp_path / "merged", "test"))
    assert lines[0].plain.nll == pytest.approx(merged.nll, abs=0.05)  # averaged tensors are the span's, not λ times
    text = (tmp_path / "functional.md").read_text()
    assert f"| the best merge + predictions, MAP | {lines[1].plain.accuracy:.3f} |" in text
    assert "12 unlabelled training examples a task" in text
