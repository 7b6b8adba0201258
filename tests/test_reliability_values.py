"""Reliability as a table, and intervals of a calibration error that would leave its range."""

from __future__ import annotations

import torch

import diagnostics as dx


def test_a_diagram_is_a_table_with_a_row_for_each_bin() -> None:
    table = torch.tensor([[0.3, 0.7]] * 8 + [[0.1, 0.9]] * 4)
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0])
    frame = dx.reliability(table, labels, seed=0, bins=5).to_dataframe()
    assert list(frame.columns) == ["left", "right", "count", "confidence", "accuracy", "low", "high"]
    assert [round(edge, 12) for edge in frame["left"]] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert [round(edge, 12) for edge in frame["right"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert list(frame["count"]) == [0, 0, 0, 8, 4]
    assert list(frame["accuracy"][3:]) == [0.75, 0.75]


def test_a_calibration_error_is_at_most_one() -> None:
    """Nine of ten wrong at full confidence: .9, and a normal interval around it would end at 1.09."""
    table, labels = torch.tensor([[1.0, 0.0]] * 10, dtype=torch.float64), torch.tensor([1] * 9 + [0])
    found = dx.calibration(table, labels, seed=0)
    for score in (found.ece, found.ece_class_wise, found.ece_top_label):
        assert abs(score.value - 0.9) < 1e-12
        assert score.high == 1.0
