"""The benchmark of judges of merges on toy suites: rows that are kept, ranks by hand, and a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import evidence, ranking
from benchmarks.evidence import Evidences
from benchmarks.harness.suite import Suite
from benchmarks.ranking import Row, judged, report, rows_of, write_table
from poe_models import InputGram
from tests.toy_suites import toy_language, toy_suite


def row(name: str, said: float, accuracy: float) -> Row:
    few = {str(count): [accuracy] * ranking.SUBSETS for count in ranking.LABELS}
    return Row(name, 1.0, said, "InputGram", -said, -said, few, accuracy, 1 - accuracy)


def test_a_score_on_few_inputs_is_one_of_its_own_only_where_there_are_more() -> None:
    rows = [row("one", 1.0, 0.7), row("two", 3.0, 0.8), row("three", 2.0, 0.9)]
    few = f"functional score, {ranking.INPUTS} inputs"
    assert few not in {each.judge for each in judged(rows)}
    fewer = [replace(rows[0], divergence_few=rows[0].divergence_few - 3), *rows[1:]]  # now the second-best
    found = {each.judge: each for each in judged(fewer)}
    assert found["functional score, all inputs"].regret == pytest.approx(10.0)
    assert found[few].regret == pytest.approx(20.0)


def test_judges_are_ranked_by_hand() -> None:
    rows = [row("one", 1.0, 0.7), row("two", 3.0, 0.8), row("three", 2.0, 0.9)]
    found = {each.judge: each for each in judged(rows)}
    score = found["functional score, all inputs"]
    assert score.merges == 3
    assert score.with_accuracy == pytest.approx(0.5)  # ranks 1, 3, 2 against 1, 2, 3
    assert score.with_nll == pytest.approx(0.5)
    assert score.regret == pytest.approx(10.0)
    evidence = found["evidence, InputGram"]
    assert (evidence.with_accuracy, evidence.with_nll) == (score.with_accuracy, score.with_accuracy)
    assert evidence.regret == score.regret
    assert math.isnan(score.scaling_regret)
    assert found["accuracy on 8 labels"].with_accuracy == pytest.approx(1.0)
    assert found["accuracy on 8 labels"].regret == pytest.approx(0.0)


def test_a_judge_of_one_setting_is_right_or_wrong_in_each_method() -> None:
    """Two methods at two settings: it loses nothing in the first and 0.2 in the second."""
    rows = [row("one", 1.0, 0.7), row("one", 2.0, 0.8), row("two", 3.0, 0.5), row("two", 4.0, 0.3)]
    found = {each.judge: each for each in judged(rows)}
    assert found["functional score, all inputs"].scaling_regret == pytest.approx(10.0)
    assert found["functional score, all inputs"].regret == pytest.approx(50.0)
    assert found["accuracy on 8 labels"].scaling_regret == pytest.approx(0.0)


@pytest.mark.filterwarnings("ignore:.*had not converged", "ignore::UserWarning")
@pytest.mark.parametrize("make", [toy_suite, toy_language])
def test_merges_are_judged_once_and_kept(
    make: Callable[[Path], Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MAPS", {"InputGram": InputGram()})
    monkeypatch.setattr(ranking, "RULES", ())
    monkeypatch.setattr(evidence, "GAMMAS", (1.0,))
    monkeypatch.setattr(evidence, "ETAS", (0.1,))
    suite = make(tmp_path / "suite")
    told: list[str] = []
    evidences = Evidences(suite, 0, 200, tmp_path / "evidence", told.append)
    rows = rows_of(suite, 0, tmp_path / "kept", (0.5, 1.0), evidences, told.append)
    assert len(rows) == 2 * (len(evidence.ENERGIES) + len(ranking.BASELINES))
    assert [math.isnan(each.evidence) for each in rows[:4]] == [True, False, True, False]
    assert all(each.divergence > 0 and 0 <= each.accuracy <= 1 for each in rows)
    again: list[str] = []
    evidences = Evidences(suite, 0, 200, tmp_path / "evidence", again.append)
    same = rows_of(suite, 0, tmp_path / "kept", (0.5, 1.0), evidences, again.append)
    assert again == []
    bare = rows_of(suite, 0, tmp_path / "kept", (0.5, 1.0), None, again.append)
    assert again == []
    assert [replace(each, evidence=0.0) for each in bare] == [replace(each, evidence=0.0) for each in rows]
    assert all(math.isnan(each.evidence) for each in bare)
    assert [each.judge for each in judged(bare)] == [each.judge for each in judged(rows) if "Gram" not in each.judge]
    assert [each.divergence for each in same] == [each.divergence for each in rows]
    text = report({("toy", 0): rows}, ["an abacus"], "the command")
    assert "| toy | 0 | functional score, all inputs | 10 |" in text
    write_table(tmp_path / "table.csv", {("toy", 0): rows})
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 11
