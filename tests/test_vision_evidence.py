"""Evidence against held-out scores: the merges by the solver, the correlations by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.vision import evidence
from benchmarks.vision.evaluate import Scores
from benchmarks.vision.evidence import Candidate, agreements, candidates, merged_state, posteriors, report
from inference import fixed_point
from poe_models import Anchor, Gaussian, OutputGram, ProductOfExperts, Relative, RelativePrecision, TaskVectors
from tests.test_vision_demo import toy_suite


def test_merge_is_the_map_in_span_coordinates(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    vectors = TaskVectors(suite.base, suite.experts)
    bound = posteriors(TaskVectors(suite.base, suite.experts, dtype=torch.float64))
    assert len(bound) == 24
    state = merged_state(*bound["OutputGram, Gaussian, γ = 0.3, η = 1"], vectors)
    anchor = Anchor(precision=RelativePrecision(1.0))
    poe = ProductOfExperts.of(vectors.names, OutputGram(), Gaussian(), Relative(0.3), anchor=anchor)
    base = load_file(suite.base / "model.safetensors")
    for module in list(vectors)[::6]:
        update = fixed_point(poe, module.updates.double(), coordinates="span").value
        found = (state[module.tensor] - base[module.tensor]).flatten(1).double()
        torch.testing.assert_close(found, update, rtol=1e-3, atol=1e-6)


def test_designs_are_ordered_by_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "GAMMAS", (1.0,))
    monkeypatch.setattr(evidence, "ETAS", (1.0, 10.0))
    told: list[str] = []
    found = candidates(toy_suite(tmp_path), 0, 16, told.append)
    assert told[1:] == [each.name for each in found]
    assert len(found) == 8
    values = [each.evidence for each in found]
    assert values == sorted(values, reverse=True)
    for each in found:
        if "Gaussian" in each.name:  # Laplace is exact there
            assert each.evidence == pytest.approx(each.laplace, abs=6 * each.error)


def grid() -> list[Candidate]:
    """Accuracy follows evidence under the first map and runs against it under the second; NLL is twice reversed."""
    found = []
    for i in range(5):
        found.append(Candidate(f"InputGram, {i}", -float(i), 0.1, -float(i), Scores(0.9 - i / 10, 1.0 + i, 0.1, 0.1)))
        found.append(Candidate(f"OutputGram, {i}", -9.0 - i, 0.1, -9.5, Scores(0.5 + i / 10, 2.0 - i / 10, 0.1, 0.1)))
    return sorted(found, key=lambda each: -each.evidence)


def test_agreements() -> None:
    found = agreements(grid())
    assert found["accuracy, InputGram"].value == pytest.approx(1)
    assert found["nll, InputGram"].value == pytest.approx(1)
    assert found["accuracy, OutputGram"].value == pytest.approx(-1)
    assert found["nll, OutputGram"].value == pytest.approx(-1)
    assert abs(found["accuracy, all designs"].value) < 0.5


def test_page() -> None:
    text = report(grid(), ["s", "t"], "the command", 3.0)
    assert "| InputGram, 0 | 0 ± 0.1 | 0 | 0.900 | 1.000 |" in text
    assert "| OutputGram, 4 | -13 ± 0.1 | -10 | 0.900 | 1.600 |" in text
    assert "| accuracy | OutputGram | -1.0" in text
    assert "Made by `the command` in 3 seconds" in text
