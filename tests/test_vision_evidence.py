"""Evidence against held-out scores: the merges by the solver, the correlations by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import evidence
from benchmarks.evidence import Candidate, agreements, candidates, designs, merged_state, report
from benchmarks.harness.evaluate import Scores
from inference import fixed_point
from inference.evidence.estimate import log_evidence
from poe_models import Gaussian, OutputGram
from tests.seeds import seeded
from tests.toy_suites import toy_suite


def test_merge_is_the_map_in_full_coordinates(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    vectors = suite.vectors()
    poes = designs(vectors.names, OutputGram())
    assert len(poes) == 18
    poe = poes["Cauchy, γ = 0.3, η = 1"]
    state = merged_state(poe, vectors)
    base = load_file(suite.base / "model.safetensors")
    for module in list(vectors)[::6]:
        update = fixed_point(poe.bind(module.updates.double())).value[0]
        found = (state[module.tensor] - base[module.tensor]).flatten(1).double()
        torch.testing.assert_close(found, update, rtol=1e-3, atol=1e-6)


def test_designs_are_ordered_by_evidence_within_each_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "GAMMAS", (1.0,))
    monkeypatch.setattr(evidence, "ETAS", (1.0, 10.0))
    monkeypatch.setattr(evidence, "ENERGIES", {"Gaussian": Gaussian()})
    told: list[str] = []
    suite = toy_suite(tmp_path)
    found = [
        *candidates(suite, 0, "InputGram", 100, told.append),
        *candidates(suite, 0, "OutputGram", 100, told.append),
    ]
    assert [line for line in told if "scores" in line] == [f"{e.residual_map}, scores of {e.name}" for e in found]
    assert [each.residual_map for each in found] == ["InputGram"] * 2 + ["OutputGram"] * 2
    vectors = suite.vectors(torch.float64)
    asked = [line for line in told if "evidence" in line]
    assert sorted(asked) == sorted(f"{name}, evidence at {each.name}" for name in evidence.MAPS for each in vectors)
    for one, other in (found[:2], found[2:]):
        assert one.evidence > other.evidence
    poe = designs(vectors.names, evidence.MAPS["InputGram"])[found[0].name]
    generator = seeded(0)
    single = [log_evidence(poe.bind(module.updates), generator=generator).total for module in vectors]
    assert found[0].evidence == pytest.approx(sum(single), rel=1e-9)


def grid() -> list[Candidate]:
    """Accuracy follows evidence under the first map and runs against it under the second; NLL is twice reversed."""
    first = [Candidate("InputGram", f"{i}", -float(i), 0.1, Scores(0.9 - i / 10, 1.0 + i, 0.1, 0.1)) for i in range(5)]
    return first + [
        Candidate("OutputGram", f"{i}", -9.0 - i, 0.1, Scores(0.5 + i / 10, 2.0 - i / 10, 0.1, 0.1)) for i in range(5)
    ]


def test_agreements() -> None:
    found = agreements(grid())
    assert found["accuracy", "InputGram"].value == pytest.approx(1)
    assert found["nll", "InputGram"].value == pytest.approx(1)
    assert found["accuracy", "OutputGram"].value == pytest.approx(-1)
    assert found["nll", "OutputGram"].value == pytest.approx(-1)
    assert len(found) == 4


def test_page(tmp_path: Path) -> None:
    runs = {("toy", 3): grid()}
    text = report(runs, "an abacus", "the command")
    first, second = (str(agreements(grid())["accuracy", name]) for name in ("InputGram", "OutputGram"))
    assert f"| toy | 3 | InputGram | {first} |" in text
    assert f"| toy | 3 | OutputGram | {second} |" in text
    assert text.rstrip().endswith("| 0 | 0.500 | 2.000 | 4 | 0.900 |")  # the evidence's choice, and the best
    assert "Made by `the command` on an abacus" in text
    evidence.write_table(tmp_path / "table.csv", runs)
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 11
    assert rows[10] == "toy,3,OutputGram,4,-13,0.1,0.9,1.6"


def test_what_one_map_has_is_kept_where_the_next_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, asked = toy_suite(tmp_path / "suite"), list[str]()

    def interrupted(_: object, seed: int, map_name: str, samples: int, progress: object) -> list[Candidate]:
        asked.append(map_name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [each for each in grid() if each.residual_map == map_name]

    monkeypatch.setattr(evidence, "load", lambda *_: suite)
    monkeypatch.setattr(evidence, "recipe_of", lambda *_: None)
    monkeypatch.setattr(evidence, "candidates", interrupted)
    page = tmp_path / "page.md"
    monkeypatch.setattr(
        "sys.argv",
        ["evidence", "--out", str(page), "--kept", str(tmp_path / "kept"), "--suites", "vision", "--seeds", "3"],
    )
    with pytest.raises(KeyboardInterrupt):
        evidence.main()
    assert not page.exists()
    evidence.main()
    assert asked == ["InputGram", "OutputGram", "OutputGram"]
    assert "| vision | 3 | OutputGram |" in page.read_text()
    assert "highest evidence" in capsys.readouterr().out
