"""The benchmark of ensembles over training seeds and seeds of draws: what is kept, means, and the page."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmarks.registry
from benchmarks import calibration
from benchmarks.calibration import Run, compared, gaps_of, page, runs, verdict, write_csv
from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.outcomes import GIBBS, MAP, NOISE, SCALED, SCALED_MAP, Budget
from benchmarks.harness.suite import Suite
from tests.toy_suites import toy_language, toy_suite

# How far ensembles are from the merge is a column of the demo's table.
pytestmark = pytest.mark.filterwarnings("ignore:.*standard deviations of the draws from the merge")

BUDGET = Budget(members=2, temperatures=2, refinements=0, everywhere=(), last=(GIBBS, NOISE), warmup=1)
WAYS = (MAP, SCALED_MAP, GIBBS, GIBBS + SCALED)


@pytest.mark.parametrize("make", [toy_suite, toy_language])
def test_runs_differ_in_their_draws_alone(make: Callable[[Path], Suite], tmp_path: Path) -> None:
    suite = make(tmp_path)
    heads = {name: dataclasses.replace(head, weight=0.1 * head.weight) for name, head in suite.heads.items()}
    suite = dataclasses.replace(suite, heads=heads)
    first, second = runs(suite, [4, 5], BUDGET)
    assert tuple(first.predictions) == (*WAYS[:3], GIBBS + SCALED, NOISE, NOISE + SCALED)
    for task in suite.tasks:
        for way in (MAP, SCALED_MAP):
            assert torch.equal(first.predictions[way][task], second.predictions[way][task])
        assert not torch.equal(first.predictions[GIBBS][task], second.predictions[GIBBS][task])
    assert first.facts["λ"] in calibration.SCALINGS
    first.save(tmp_path / "kept" / "run.safetensors")
    again = Run.read(tmp_path / "kept" / "run.safetensors")
    assert list(again.predictions) == list(first.predictions)
    assert again.facts["λ"] == first.facts["λ"]
    for way, tables in first.predictions.items():
        for task, probabilities in tables.items():
            assert torch.equal(again.predictions[way][task], probabilities)
    assert torch.equal(again.labels["two"], suite.labels("test")["two"])
    assert task_logits(suite, suite.base, "test")["two"].shape == again.predictions[MAP]["two"].shape


LABELS = {"s": torch.arange(60) % 2, "t": torch.arange(30) % 2}


def sure(confidence: float, wrong: int) -> dict[str, Tensor]:
    """Class probabilities of one confidence, so many wrong on each task."""
    tables = {}
    for task, labels in LABELS.items():
        top = torch.where(torch.arange(len(labels)) >= wrong, labels, 1 - labels)
        tables[task] = torch.where(torch.arange(2) == top.unsqueeze(1), confidence, 1 - confidence).double()
    return tables


def made(draw: int, wrong: int) -> Run:
    """The more a draw's number the less sure is its ensemble; training seeds differ in how many are wrong."""
    facts = {way: (None if way in WAYS[:2] else 1e-4 * (1 + draw), 1.0) for way in WAYS}
    tables = {MAP: sure(0.99, wrong), SCALED_MAP: sure(0.9, wrong), GIBBS: sure(0.9 - 0.1 * draw, wrong)}
    tables[GIBBS + SCALED] = sure(0.8, wrong)
    whole = {"λ": 1.5, "machine": "a machine", "members": 2, "temperatures": facts, "coldest": 1e-4}
    return Run(tables, whole, LABELS)


FOUND = {"toy": [[made(draw, wrong) for draw in (0, 1)] for wrong in (0, 3, 6)]}


def nll(confidence: float) -> float:
    """Mean over tasks and the training seeds' shares of wrong ones."""
    share = sum(wrong / n for wrong in (0, 3, 6) for n in (60, 30)) / 6
    return -(1 - share) * math.log(confidence) - share * math.log(1 - confidence)


def test_means_are_over_tasks_training_seeds_and_draws() -> None:
    found = compared(FOUND["toy"])
    assert found.mean(MAP, "nll").value == pytest.approx(nll(0.99))
    assert found.mean(GIBBS, "nll").value == pytest.approx((nll(0.9) + nll(0.8)) / 2)
    assert found.mean(GIBBS).value == pytest.approx(found.mean(MAP).value)
    gap = found.difference(GIBBS + SCALED, SCALED_MAP, "nll")
    assert gap.value == pytest.approx(nll(0.8) - nll(0.9))
    assert "3 seeds" in " ".join(found.warnings)


def test_seeds_of_draws_are_resampled() -> None:
    """Of two seeds that differ by a constant a resample has one, both or the other: the error is that of their mean."""
    runs = [[made(draw, 0) for draw in (0, 1)] for _ in range(2)]  # nothing else varies
    found = compared(runs)
    assert found.difference(MAP, SCALED_MAP, "nll").error == pytest.approx(0, abs=1e-12)
    apart = math.log(0.9 / 0.8)
    assert found.difference(GIBBS, SCALED_MAP, "nll").value == pytest.approx(apart / 2)
    assert found.difference(GIBBS, SCALED_MAP, "nll").error == pytest.approx(apart / 2 / math.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    ("confidence", "words"),
    [(0.9, "not told apart"), (0.97, "lower"), (0.6, "higher")],
    ids=["same", "surer", "unsure"],
)
def test_verdicts(confidence: float, words: str) -> None:
    run = made(0, 0)
    tables = {**run.predictions, GIBBS: sure(confidence, 0)}
    found = compared([[dataclasses.replace(run, predictions=tables)]])
    assert verdict(found, gaps_of(found)).startswith(f"NLL against the MAP with scaled logits: Gibbs: {words} (")


def test_page_and_csv(tmp_path: Path) -> None:
    text = page(FOUND, (0, 1, 2), (0, 1), "the command")
    assert "Made by `the command` on a machine" in text
    assert "λ by training seed: 1.5, 1.5, 1.5" in text
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line[:2] == "| "
    }
    assert rows[MAP][2].startswith(f"{nll(0.99):.3f} [")
    assert rows[MAP][1] == rows[SCALED_MAP][3] == rows[MAP][6] == rows[MAP][7] == ""
    assert rows[GIBBS][6:] == ["1.0e-04 to 2.0e-04", "3 of 6", f"{nll(0.9):.3f} to {nll(0.8):.3f}"]
    expected = f"{nll(0.8) - nll(0.9):+.3f} ["
    assert rows[GIBBS + SCALED][3].startswith(expected)
    assert text.splitlines()[-1].endswith("3 seeds: intervals are too narrow over seeds")
    write_csv(tmp_path / "calibration.csv", FOUND)
    with (tmp_path / "calibration.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 4
    (one,) = (x for x in lines if (x["members"], x["task"], x["score"]) == (MAP, "t", "accuracy"))
    assert float(one["value"]) == pytest.approx(1 - 3 / 30, rel=1e-5)


def test_what_is_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, drawn = toy_language(tmp_path), []
    monkeypatch.setitem(benchmarks.registry.SUITES, "language", lambda *_: suite)

    def recorded(suite: Suite, seeds: Sequence[int], budget: Budget) -> Iterator[Run]:
        drawn.append(list(seeds))
        yield from (made(seed, 3) for seed in seeds)

    monkeypatch.setattr(calibration, "runs", recorded)
    out, folder = tmp_path / "page.md", tmp_path / "kept"
    arguments = ["--suites", "language", "--seeds", "0", "--draws", "0", "1", "--kept", str(folder), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["calibration", *arguments])
    calibration.main()
    first = out.read_text()
    next(folder.glob("language-0-1-*.safetensors")).unlink()
    calibration.main()
    assert drawn == [[0, 1], [1]]
    assert out.read_text() == first
    assert out.with_suffix(".csv").is_file()
    monkeypatch.setattr("sys.argv", ["calibration", *arguments, "--members", "3"])
    calibration.main()
    assert drawn[2:] == [[0, 1]]
