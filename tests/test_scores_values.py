"""Scores and diagrams of predictions worked by hand, with the edges of bins and of intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diagnostics.predictions.calibration import calibration, calibration_difference, scale_logits
from diagnostics.predictions.reliability import reliability
from inference import scores, temper
from inference.logit_temperature import fit_ensemble_temperature, fit_logit_temperature
from tests.helpers import assert_close

P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]], dtype=torch.float64)
Y = torch.tensor([0, 1, 0, 2])


def test_scores_by_hand() -> None:
    assert_close(scores.nll_each(P.log(), Y), -torch.tensor([0.5, 0.8, 0.25, 0.05]).double().log(), 1e-7)
    # (1 - .5)^2 + .3^2 + .2^2 and so on.
    each = torch.tensor([0.38, 0.06, 0.875, 1.715], dtype=torch.float64)
    assert_close(scores.brier_each(P, Y), each)
    assert scores.brier(P, Y) == pytest.approx(float(each.mean()))
    confidence, right = scores.top_label(P, Y)
    assert confidence.tolist() == [0.5, 0.8, 0.5, 0.9]
    assert right.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert scores.accuracy(P, Y) == 0.5
    # Bins of width 1/2: .5, .8, .5 and .9 are all in the upper one: |2 - 2.7| / 4. Of 1/4: (.5, .5), (.8, .9).
    assert scores.ece(P, Y, 2) == pytest.approx(0.7 / 4)
    assert scores.ece(P, Y, 4) == pytest.approx((0.0 + 0.7) / 4)
    assert scores.ece(P, Y) == pytest.approx((0.0 + 0.2 + 0.9) / 4)
    assert scores.ECE_BINS == 20


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_of_no_class_are_refused(label: int) -> None:
    labels = torch.tensor([0, label, 1, 2])
    told = f"label {label} with 3 classes. Give 0 to 2"
    for score, table in (
        (scores.nll, P.log()),
        *((score, P) for score in (scores.brier, scores.accuracy, scores.ece)),
        (fit_logit_temperature, P.log()),
        (fit_ensemble_temperature, P.log().unsqueeze(0)),
    ):
        with pytest.raises(ValueError, match=told):
            score(table, labels)
    with pytest.raises(ValueError, match=told):
        temper(lambda t: torch.ones(2), lambda draw: P.log(), labels, (0.1, 1.0), num_temperatures=3)


def test_bins_are_closed_on_the_left_and_one_is_in_the_last() -> None:
    values = torch.tensor([0.0, 0.25, 0.4999, 0.5, 1.0], dtype=torch.float64)
    assert scores.equal_width_bins(values, 4).tolist() == [0, 1, 1, 2, 3]
    assert scores.equal_width_bins(values).tolist() == [0, 5, 9, 10, 19]


def block(probability: float, right: int, wrong: int) -> tuple[Tensor, Tensor]:
    """Predictions of class 0 with one probability, so many right and wrong."""
    table = torch.tensor([[probability, 1 - probability]], dtype=torch.float64).expand(right + wrong, -1)
    return table, torch.tensor([0] * right + [1] * wrong)


def blocks(*each: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([p for p, _ in each]), torch.cat([y for _, y in each])


def test_a_diagram_by_hand() -> None:
    p, y = blocks(block(0.62, 6, 4), block(0.97, 8, 1))
    found = reliability(p, y, seed=0, bins=10, num_resamples=200)
    assert_close(found.edges, torch.arange(11, dtype=torch.float64) / 10)
    assert found.counts.tolist() == [0] * 6 + [10, 0, 0, 9]
    assert found.trusted.tolist() == [False] * 6 + [True, False, False, False]
    for place, accuracy, confidence in ((6, 0.6, 0.62), (9, 8 / 9, 0.97)):
        assert float(found.accuracy[place]) == pytest.approx(accuracy)
        assert float(found.confidence[place]) == pytest.approx(confidence)
        assert float(found.low[place]) < accuracy < float(found.high[place])
    assert found.level == 0.95
    narrow = reliability(p, y, seed=0, bins=10, num_resamples=200, confidence=0.5)
    assert float(narrow.high[6] - narrow.low[6]) < float(found.high[6] - found.low[6])
    mass = reliability(p, y, seed=0, bins=2, equal_mass=True, num_resamples=20)
    assert_close(mass.edges, torch.tensor([0.0, 0.62, 1.0]).double(), 1e-6)  # ten values of 0.62: the tenth is one


def test_calibration_by_hand_in_every_form() -> None:
    p, y = blocks(block(0.62, 7, 3), block(0.97, 8, 2))
    found = calibration(p, y, seed=0, bins=10, num_resamples=50)
    apart, together = (0.08 * 10 + 0.17 * 10) / 20, abs(0.08 * 10 - 0.17 * 10) / 20
    assert found.accuracy.value == pytest.approx(0.75)
    assert found.ece.value == pytest.approx(apart)
    assert found.ece_top_label.value == pytest.approx(apart)  # both say class 0
    assert found.ece_class_wise.value == pytest.approx(apart)  # the other class mirrors it
    for name, score in found.scores.items():
        assert score.low <= score.value <= score.high or name == "ece_if_calibrated", name
        assert score.high - score.low < 1.0, name
    few = calibration(p, y, seed=0, bins=2, num_resamples=50)
    assert few.ece.value == pytest.approx(together)
    assert few.ece_equal_mass.value == pytest.approx(apart)
    # Debiased: the mean over bins of gap^2 - a (1 - a) / 9, which is negative here.
    assert few.rms_debiased.value == 0.0
    off, truth = block(0.97, 2, 8)
    assert calibration(off, truth, seed=0, bins=2, num_resamples=50).rms_debiased.value == pytest.approx(
        math.sqrt(0.77**2 - 0.16 / 9)
    )
    assert (found.num_examples, found.bins) == (20, 10)
    assert set(found.scores) == {
        "accuracy", "nll", "brier", "ece", "ece_equal_mass", "ece_class_wise", "ece_top_label", "rms_debiased",
        "ece_if_calibrated",
    }  # fmt: skip


def test_top_label_bins_are_split_by_the_class_that_is_said() -> None:
    """At one confidence, class 0 too sure and class 1 not enough: together calibrated, apart not."""
    p = torch.tensor([[0.6, 0.4]] * 10 + [[0.4, 0.6]] * 10, dtype=torch.float64)
    y = torch.tensor([0] * 4 + [1] * 6 + [1] * 8 + [0] * 2)
    found = calibration(p, y, seed=0, bins=10, num_resamples=20)
    assert found.ece.value == pytest.approx(0.0, abs=1e-12)
    assert found.ece_top_label.value == pytest.approx(0.2)


def test_the_error_of_a_root_follows_its_slope() -> None:
    p, y = block(0.97, 40, 160)
    root = calibration(p, y, seed=0, bins=1, num_resamples=2000).rms_debiased
    # The gap .97 - a has the standard error of a share.
    assert root.error == pytest.approx(math.sqrt(0.16 / 200), rel=0.1)
    assert root.low == pytest.approx(root.value - 1.96 * root.error, abs=0.003)
    assert root.high == pytest.approx(root.value + 1.96 * root.error, abs=0.003)
    level = calibration(*block(0.8, 160, 40), seed=0, bins=1, num_resamples=2000).rms_debiased
    assert (level.value, level.low) == (0.0, 0.0)
    # At zero the slope has no end: the root of the square's own error, sd(2 chi^2 like) sqrt(2) .16 / 200.
    assert level.error == pytest.approx(math.sqrt(math.sqrt(2) * 0.16 / 200), rel=0.3)


def test_a_calibrated_models_ece_is_what_labels_drawn_from_it_give() -> None:
    """One bin: the mean of ``|X - n p| / n`` of a binomial, about ``sqrt(2 p (1 - p) / (pi n))``."""
    p, y = block(0.7, 350, 150)
    found = calibration(p, y, seed=0, bins=1, num_resamples=4000).ece_if_calibrated
    mean, sd = math.sqrt(2 * 0.21 / (math.pi * 500)), math.sqrt(0.21 / 500)
    assert found.value == pytest.approx(mean, rel=0.05)
    assert found.high == pytest.approx(2.24 * sd, rel=0.06)  # the 97.5 % quantile of |N(0, sd)|
    assert found.low == pytest.approx(0.0314 * sd, abs=0.0015)


def test_bins_of_one_example_are_left_out_of_the_debiased_square_and_said() -> None:
    p, y = blocks(block(0.62, 1, 0), block(0.97, 2, 8))
    found = calibration(p, y, seed=0, bins=11, num_resamples=20).rms_debiased
    crowd = calibration(*block(0.97, 2, 8), seed=0, bins=1, num_resamples=20).rms_debiased
    assert found.value == pytest.approx(crowd.value)
    assert any("1 bins with one example left out" in each for each in found.warnings)
    assert not any("left out" in each for each in crowd.warnings)


def test_differences_are_the_first_less_the_second() -> None:
    good, bad = block(0.9, 9, 1), block(0.6, 9, 1)
    found = calibration_difference(good[0], bad[0], good[1], seed=0, num_resamples=50)
    assert found["brier"].value == pytest.approx(scores.brier(*good) - scores.brier(*bad))
    assert found["ece"].value == pytest.approx(0.0 - 0.3)
    assert found["ece"].low < 0
    assert found["accuracy"].value == 0.0


def test_zero_probabilities_are_scaled_as_the_smallest_numbers() -> None:
    validation = torch.tensor([[0.99, 0.01]] * 3, dtype=torch.float64)
    found = scale_logits(validation, torch.tensor([0, 1, 0]), torch.tensor([[1.0, 0.0], [0.99, 0.01]]))
    assert_close(found.probabilities[1], torch.tensor([2 / 3, 1 / 3]).double(), 1e-6)
    assert float(found.probabilities[0, 0]) > 1 - 1e-12
    assert found.temperature == pytest.approx(math.log(99) / math.log(2))
    assert found.warnings == ()
