"""Evidence against held-out scores: the merges by the solver, the correlations by hand."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import evidence
from benchmarks.evidence import Candidate, Evidences, agreements, candidates, designs, merged_state, report
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
    suite = toy_suite(tmp_path / "suite")
    evidences = Evidences(suite, 0, 100, tmp_path / "kept", told.append)
    found = [*candidates(evidences, "InputGram"), *candidates(evidences, "OutputGram")]
    assert len([line for line in told if line.startswith("evidence of InputGram, Gaussian")]) == 2
    assert [each.residual_map for each in found] == ["InputGram"] * 2 + ["OutputGram"] * 2
    vectors = suite.vectors(torch.float64)
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


def test_an_evidence_is_computed_once(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path / "suite")
    poes = designs(suite.vectors().names, OutputGram(), (2.0, 3.0))
    told: list[str] = []
    names = ("Gaussian, γ = 2, η = 1", "Gaussian, γ = 3, η = 1")

    def known(name: str, seed: int = 0) -> evidence.Known:
        return Evidences(suite, seed, 100, tmp_path / "kept", told.append).of("OutputGram", name, poes[name])

    first, other = known(names[0]), known(names[1])
    assert first.total != other.total
    assert told == [f"evidence of OutputGram, {name}" for name in names]
    assert [known(name) for name in names] == [first, other]
    assert len(told) == 2
    assert known(names[0], seed=1).total == first.total
    assert len(told) == 3  # another seed's is another evidence, though exact for Gaussians


def test_an_interrupted_run_keeps_its_evidences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "ETAS", (0.1, 1.0, 10.0))
    monkeypatch.setattr(evidence, "ENERGIES", {"Gaussian": Gaussian()})
    suite, page = toy_suite(tmp_path / "suite"), tmp_path / "page.md"
    monkeypatch.setattr(evidence, "load", lambda *_: suite)
    monkeypatch.setattr(evidence, "recipe_of", lambda *_: None)
    settings = [
        "--kept",
        str(tmp_path / "kept"),
        "--suites",
        "vision",
        "--seeds",
        "3",
        "--samples",
        "100",
        "--gammas",
        "2",
    ]
    monkeypatch.setattr("sys.argv", ["evidence", "--out", str(page), *settings])
    with monkeypatch.context() as interrupted:
        interrupted.setattr(evidence, "merged_state", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evidence.main()
    assert not page.exists()
    assert capsys.readouterr().out.count("evidence of") == 1
    evidence.main()
    assert capsys.readouterr().out.count("evidence of") == 5
    assert "| vision | 3 | OutputGram |" in page.read_text()
    assert "x scales Balanced(2) x" in page.read_text()
