"""Predictions from files, and the scores of methods on the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.predictions.calibration import calibration
from diagnostics.predictions.evaluation import evaluate_predictions
from diagnostics.predictions.files import Predictions, load_predictions, predictions_of, save_predictions
from diagnostics.report.report import report
from diagnostics.verdicts import Level
from tests.levels import binomial_range
from tests.predicted import NAMES, predictions
from tests.seeds import seeded


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_predictions_come_back_from_a_file(suffix: str, tmp_path: Path) -> None:
    given = predictions()
    save_predictions(given, tmp_path / f"p{suffix}")
    back = load_predictions(tmp_path / f"p{suffix}")
    assert set(back.methods) == set(given.methods)
    assert set(back.tasks) == set(given.tasks)
    for task in NAMES:
        assert torch.equal(back.labels[task], given.labels[task])
        for method in given.methods:
            torch.testing.assert_close(back.probabilities[method][task], given.probabilities[method][task])
    if suffix == ".npz":
        assert (back.methods, back.tasks) == (given.methods, given.tasks)


def test_a_file_of_numpy_and_half_precision(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"labels/t": np.array([0, 1], np.int32), "probabilities/t/m": np.eye(2, dtype=np.float16)}
    np.savez(tmp_path / "p.npz", **arrays)
    back = load_predictions(tmp_path / "p.npz")
    assert back.probabilities["m"]["t"].dtype == torch.float64
    assert back.labels["t"].dtype == torch.int64


def test_predictions_that_cannot_be_used(tmp_path: Path) -> None:
    half, labels = torch.full((2, 2), 0.5), torch.tensor([0, 1])
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"labels/t": labels}, "1 tasks and 0 methods"),
        ({"labels/t": labels, "probabilities/t/m": half * 3}, "'m' on 't'.*sums to 3"),
        ({"labels/t": labels + 5, "probabilities/t/m": half}, "label 5"),
        ({"labels/t": labels, "probabilities/u/m": half}, "is in one only"),
        ({"labels/t": labels, "probabilities/t/m": half, "logits/t": half}, "neither 'labels/TASK'"),
        ({"labels/t": labels, "probabilities/t/m": half, "probabilities/t": half}, "neither 'labels/TASK'"),
        ({"labels/t": labels, "probabilities/t/m": half * torch.nan}, "NaN"),
    ]
    for entries, words in cases:
        path = tmp_path / "p.safetensors"
        save_file({name: tensor.clone() for name, tensor in entries.items()}, path)
        with pytest.raises(ValueError, match=words) as caught:
            load_predictions(path)
        assert str(path) in str(caught.value)


def test_files_that_are_no_predictions(tmp_path: Path) -> None:
    for name, content in (("a.npz", b"nonsense"), ("b.safetensors", b"x" * 20), ("c.npz", b"PK\x03\x04broken")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as predictions"):
            load_predictions(tmp_path / name)
    pickled: dict[str, Any] = {"labels/t": np.array([{"evil": 1}], dtype=object)}
    np.savez(tmp_path / "pickled.npz", **pickled)
    with pytest.raises(ValueError, match="cannot be read as predictions"):
        load_predictions(tmp_path / "pickled.npz")
    with pytest.raises(ValueError, match=r"ends in '.csv'"):
        load_predictions(tmp_path / "p.csv")
    with pytest.raises(FileNotFoundError):
        load_predictions(tmp_path / "missing.npz")


def test_a_task_with_a_slash_is_refused(tmp_path: Path) -> None:
    given = predictions_of({"a/b": torch.tensor([0, 1])}, {"m": {"a/b": torch.full((2, 2), 0.5)}})
    with pytest.raises(ValueError, match="slash"):
        save_predictions(given, tmp_path / "p.npz")


def test_judged_scores_are_those_of_the_predictions_alone() -> None:
    given = predictions()
    found = evaluate_predictions(given, seed=0, num_resamples=50)
    alone = calibration(given.probabilities["average"]["mnist"], given.labels["mnist"], seed=0, num_resamples=50)
    assert found.calibrations["average"]["mnist"] == alone
    assert found.comparison.methods == ("average", "product/Cauchy")
    assert found.comparison.experts is not None
    assert set(found.reliability) == set(given.methods)
    counts = found.reliability["average"].counts
    assert int(counts.sum()) == 3 * 60


def overconfident(factor: float, seed: int = 2) -> Predictions:
    generator = seeded(seed)
    logits = 2 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return predictions_of({"t": labels}, {"m": {"t": (factor * logits).softmax(1)}})


@pytest.mark.parametrize(
    ("factor", "words"),
    [(3.0, "too sure"), (0.4, "not sure enough")],
)
def test_confidence_is_judged_against_calibrated_predictions(factor: float, words: str) -> None:
    verdict = evaluate_predictions(overconfident(factor), seed=0, num_resamples=100).verdicts[0]
    assert verdict.level is Level.CAUTION
    assert words in verdict.text


def test_calibrated_predictions_are_rarely_called_off() -> None:
    """By design in a twentieth of the cases: seven of twelve have probability 6e-7."""
    verdicts = [evaluate_predictions(overconfident(1.0, n), seed=0, num_resamples=40).verdicts[0] for n in range(12)]
    good = [verdict for verdict in verdicts if verdict.level is Level.GOOD]
    assert len(good) > 12 - 7
    assert all("calibrated" in verdict.text for verdict in good)


def test_many_tasks_do_not_make_calibrated_predictions_look_off() -> None:
    """Of eight tasks one has an ECE above its 97.5 % point in a fifth of the cases and more."""
    above, off, trials = 0, 0, 60
    for seed in range(trials):
        generator = seeded(seed)
        labels, tables = {}, {}
        for task in "abcdefgh":
            tables[task] = (2 * torch.randn(100, 4, generator=generator)).double().softmax(1)
            labels[task] = torch.multinomial(tables[task], 1, generator=generator).squeeze(1)
        found = evaluate_predictions(predictions_of(labels, {"m": tables}), seed=seed, num_resamples=60)
        each = found.calibrations["m"].values()
        above += any(one.ece.value > one.ece_if_calibrated.high for one in each)
        off += found.verdicts[0].level is not Level.GOOD
    assert above > off
    assert off <= binomial_range(trials, 0.0, 0.05)[1]


def test_doubts_about_single_scores_are_told_with_the_methods() -> None:
    sure = torch.tensor([[1.0, 0.0]] * 30)
    labels = torch.tensor([0] * 29 + [1])
    given = predictions_of({"t": labels, "few": labels[-9:]}, {
        "sure": {"t": sure, "few": sure[:9]}, "fair": {"t": 0.5 + 0 * sure, "few": 0.5 + 0 * sure[:9]},
    })  # fmt: skip
    found = evaluate_predictions(given, seed=0, num_resamples=50)
    texts = [verdict.text for verdict in found.verdicts if verdict.about == "predictions"]
    assert "not to be trusted: t: a label has probability zero (sure)." in texts
    assert "not to be trusted: few: only 9 examples." in texts
    assert "inf [nan, nan] ?" in report("page", predictions=found).html


def test_tasks_of_different_sizes_and_classes_are_pooled() -> None:
    given = predictions_of(
        {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([1, 0])},
        {"m": {"a": torch.full((3, 3), 1 / 3), "b": torch.full((2, 2), 0.5)}},
    )
    found = evaluate_predictions(given, seed=0, num_resamples=20)
    assert int(found.reliability["m"].counts.sum()) == 5
    assert float(found.reliability["m"].accuracy.nan_to_num().max()) == pytest.approx(0.5)


def test_the_winner_and_who_cannot_be_told_from_it() -> None:
    given = predictions()
    found = evaluate_predictions(given, seed=0, num_resamples=50)
    assert "cannot be told from it" in found.winner.text  # the same labels are right in both
    wrong = {task: table.flip(1) for task, table in given.probabilities["average"].items()}
    worse = predictions_of(given.labels, {**given.probabilities, "average": wrong})
    text = evaluate_predictions(worse, seed=0, num_resamples=50).winner.text
    assert text.startswith("product/Cauchy has the largest mean accuracy, 1")
    assert "above average, the next" in text


def test_one_class_only_is_a_doubt() -> None:
    given = predictions_of({"t": torch.zeros(30, dtype=torch.int64)}, {"m": {"t": torch.tensor([[0.8, 0.2]] * 30)}})
    doubts = [v for v in evaluate_predictions(given, seed=0, num_resamples=20).verdicts if v.about == "predictions"]
    assert "one class" in doubts[0].text


def test_a_method_that_lacks_a_task() -> None:
    given = predictions()
    fewer = {task: table for task, table in given.probabilities["average"].items() if task != "mnist"}
    with pytest.raises(ValueError, match="'mnist' is in one only"):
        predictions_of(given.labels, {"average": fewer})
    with pytest.raises(ValueError, match="0 tasks"):
        predictions_of({}, {})
    assert replace(given, labels={}).tasks == ()
