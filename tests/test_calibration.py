"""Calibration scores against other libraries, closed forms and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from diagnostics.predictions.binning import Binning, equal_mass_bins
from diagnostics.predictions.calibration import _scores, calibration, calibration_difference, scale_logits
from diagnostics.predictions.inputs import Array, labelled
from diagnostics.predictions.reliability import reliability
from inference import scores
from tests.levels import inverse_temperature_error
from tests.seeds import seeded


def predictions(size: int, classes: int, sharpness: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities too sure for `sharpness` above 1, and labels."""
    generator = seeded(seed)
    logits = 1.5 * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return (sharpness * logits).softmax(1), labels


def few(probabilities: Tensor, labels: Tensor, **options: int) -> dict[str, float]:
    found = calibration(probabilities, labels, seed=0, num_resamples=10, **options)
    return {name: estimate.value for name, estimate in found.scores.items()}


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_against_other_libraries(sharpness: float, classes: int) -> None:
    p, y = predictions(600, classes, sharpness)
    found = few(p, y)
    assert found["accuracy"] == pytest.approx(accuracy_score(y.numpy(), p.argmax(1).numpy()))
    assert found["nll"] == pytest.approx(log_loss(y.numpy(), p.numpy(), labels=range(classes)))
    oracle = brier_score_loss(y.numpy(), p.numpy(), labels=range(classes), scale_by_half=False)
    assert found["brier"] == pytest.approx(oracle)
    ece = multiclass_calibration_error(p, y, num_classes=classes, n_bins=20, norm="l1")
    assert found["ece"] == pytest.approx(float(ece), abs=1e-6)
    each = [
        binary_calibration_error(p[:, c].contiguous(), (y == c).long(), n_bins=20, norm="l1") for c in range(classes)
    ]
    assert found["ece_class_wise"] == pytest.approx(float(torch.stack(each).mean()), abs=1e-6)


def test_values_are_those_of_the_plain_scores() -> None:
    p, y = predictions(300, 5, 2.0)
    found = few(p, y, bins=13)
    assert found["ece"] == pytest.approx(scores.ece(p, y, 13), abs=1e-14)
    assert found["nll"] == pytest.approx(scores.nll(p.log(), y))
    assert found["brier"] == pytest.approx(scores.brier(p, y))


def test_equal_mass_and_top_label_by_a_loop() -> None:
    p, y = predictions(200, 3, 3.0)  # ten bins of twenty
    confidence, guess = p.max(1)
    gap = (guess == y).double() - confidence
    found = few(p, y, bins=10)
    order = confidence.argsort()
    mass = sum(float(gap[rows].sum().abs()) for rows in np.array_split(order.numpy(), 10)) / 200
    assert found["ece_equal_mass"] == pytest.approx(mass)
    own = 0.0
    for label in range(3):
        for place in range(10):
            inside = (guess == label) & (confidence >= place / 10) & (confidence < (place + 1) / 10)
            own += float(gap[inside].sum().abs()) / 200
    assert found["ece_top_label"] == pytest.approx(own)
    assert found["ece_top_label"] >= found["ece"] - 1e-12


def test_equal_mass_bins_are_even_and_keep_ties_together(generator: torch.Generator) -> None:
    values = torch.rand(1000, generator=generator, dtype=torch.float64)
    assert torch.equal(equal_mass_bins(values, 8).bincount(), torch.full((8,), 125))
    tied = torch.tensor([0.5] * 7 + [0.9])
    assert len(equal_mass_bins(tied, 4)[:7].unique()) == 1
    assert torch.equal(equal_mass_bins(torch.full((4,), 0.3), 3), torch.full((4,), 2))


def test_debiased_square_is_unbiased() -> None:
    """Confidence 0.8 or 0.6 with accuracy 0.7 or 0.6: the mean squared gap is 0.005."""
    p = torch.tensor([[0.8, 0.2]] * 4 + [[0.6, 0.4]] * 4, dtype=torch.float64)
    accuracy = torch.tensor([0.7] * 4 + [0.6] * 4)
    generator = seeded(5)
    found, plain = [], []
    for _ in range(600):
        y = (torch.rand(8, generator=generator) > accuracy).long()
        found.append(float(_debiased_square(p, y)))
        plain.append(scores.ece(p, y, 5))
    error = float(np.std(found)) / math.sqrt(len(found))
    assert abs(float(np.mean(found)) - 0.005) < 4 * error
    assert float(np.mean(plain)) > 0.05 + 0.02  # ECE itself is biased, so that the test can fail


def _debiased_square(p: Tensor, y: Tensor) -> Tensor:
    return _scores(labelled(p, y, "test"), 2)["square_debiased"].of(torch.ones(1, len(y), dtype=torch.float64))[0]


def test_debiased_square_by_hand() -> None:
    """Four at 0.9 of which three are right: 0.15^2 - 0.75 * 0.25 / 3 < 0, cut at 0; ten of which none are."""
    p = torch.tensor([[0.9, 0.1]] * 4)
    assert few(p, torch.tensor([0, 0, 0, 1]), bins=1)["rms_debiased"] == 0.0
    assert few(torch.tensor([[0.9, 0.1]] * 10), torch.ones(10, dtype=torch.int64), bins=1)["rms_debiased"] == (
        pytest.approx(0.9, abs=1e-7)
    )


def test_intervals_cover_what_they_are_about() -> None:
    """ECE at this size, the true accuracy and NLL, the calibrated ECE, and a difference; 40 data sets of 200."""
    repeats = [predictions(200, 4, 2.0, seed) for seed in range(1000, 1400)]
    ece = float(np.mean([scores.ece(p, y) for p, y in repeats]))
    nll = float(np.mean([scores.nll(p.log(), y) for p, y in repeats]))
    hits = {"ece": 0, "nll": 0, "difference": 0, "calibrated": 0, "calibrated ece": 0}
    softened = [(p.sqrt() / p.sqrt().sum(1, keepdim=True), y) for p, y in repeats]  # calibrated
    floor = float(np.mean([scores.ece(p, y) for p, y in softened]))
    for seed in range(40):
        (p, y), (q, _) = repeats[seed], softened[seed]
        over, right = (calibration(each, y, seed=seed, num_resamples=100) for each in (p, q))
        hits["ece"] += over.ece.low <= ece <= over.ece.high
        hits["nll"] += over.nll.low <= nll <= over.nll.high
        hits["calibrated"] += right.ece_if_calibrated.low <= right.ece.value <= right.ece_if_calibrated.high
        between = calibration_difference(p, q, y, seed=seed, num_resamples=100)["ece"]
        hits["difference"] += between.low <= ece - floor <= between.high
        hits["calibrated ece"] += right.ece.low <= floor <= right.ece.high
        assert over.ece.value > over.ece_if_calibrated.value
    assert min(hits.values()) >= 34, hits


def test_difference_of_equals_is_nothing_and_pairing_helps() -> None:
    p, y = predictions(400, 3)
    same = calibration_difference(p, p, y, seed=0, num_resamples=20)
    assert all(each.value == each.error == 0 for each in same.values())
    q = 0.99 * p + 0.01 / 3
    paired = calibration_difference(q, p, y, seed=0, num_resamples=200)["nll"]
    alone = calibration(p, y, seed=0, num_resamples=200).nll
    differences = (p.log() - q.log()).gather(1, y.unsqueeze(1))
    expected = float(differences.std()) / len(y) ** 0.5
    assert paired.error == pytest.approx(expected, rel=0.3)  # 200 resamples know it to 5 %: six of these
    assert paired.error < alone.error / 5
    assert paired.value == pytest.approx(scores.nll(q.log(), y) - scores.nll(p.log(), y))


def test_reliability_against_scikit_learn() -> None:
    p, y = predictions(800, 4, 2.0)
    found = reliability(p, y, seed=0, bins=10, num_resamples=50)
    confidence, guess = p.max(1)
    right = (guess == y).long().numpy()
    true, predicted = calibration_curve(right, confidence.numpy(), n_bins=10)
    filled = found.counts > 0
    assert found.accuracy[filled].numpy() == pytest.approx(true)
    assert found.confidence[filled].numpy() == pytest.approx(predicted)
    assert int(found.counts.sum()) == 800
    assert bool(found.accuracy[~filled].isnan().all())
    assert not bool(found.trusted[~filled].any())
    recovered = (found.counts * (found.accuracy - found.confidence)).nan_to_num().abs().sum() / 800
    assert float(recovered) == pytest.approx(scores.ece(p, y, 10))


def test_the_band_of_a_bin_is_that_of_a_share() -> None:
    y = torch.tensor([0] * 140 + [1] * 60)
    found = reliability(torch.tensor([[0.77, 0.23]] * 200), y, seed=0, bins=20, num_resamples=2000)
    assert float(found.accuracy[15]) == pytest.approx(0.7)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert float(found.low[15]) == pytest.approx(0.7 - half, abs=0.012)
    assert float(found.high[15]) == pytest.approx(0.7 + half, abs=0.012)


def test_equal_mass_diagram() -> None:
    p, y = predictions(500, 3)
    found = reliability(p, y, seed=0, bins=5, equal_mass=True, num_resamples=20)
    assert torch.equal(found.counts, torch.full((5,), 100))
    assert bool((found.edges[:-1] <= found.confidence).all())
    assert bool((found.confidence <= found.edges[1:]).all())


def test_scaled_logits_are_the_baseline() -> None:
    p, y = predictions(4000, 4, 3.0)
    found = scale_logits(p[:2000], y[:2000], p[2000:])
    assert abs(1 / found.temperature - 1 / 3) < inverse_temperature_error(p[:2000].log(), 1 / 3)
    expected = (p[2000:].log() / found.temperature).softmax(1)
    assert torch.allclose(found.probabilities, expected)
    assert scores.nll(found.probabilities.log(), y[2000:]) < scores.nll(p[2000:].log(), y[2000:])
    assert found.warnings == ()
    sure = torch.tensor([[0.9, 0.1]] * 30)
    assert "all right" in scale_logits(sure, torch.zeros(30, dtype=torch.int64), sure).warnings[0]
    assert "no better than chance" in scale_logits(sure, torch.ones(30, dtype=torch.int64), sure).warnings[0]
    nothing = scale_logits(torch.full((30, 2), 0.5), torch.arange(30) % 2, sure)
    assert (nothing.temperature, nothing.warnings) == (1.0, ())
    assert torch.allclose(nothing.probabilities, sure.double())
    hard = scale_logits(torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 1]), torch.eye(2))
    assert bool(hard.probabilities.isfinite().all())


def test_binning_sums_against_a_loop(generator: torch.Generator) -> None:
    index = torch.randint(0, 4, (30, 3), generator=generator)
    values = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 30, generator=generator, dtype=torch.float64)
    found = Binning.of(index, 4).sums(values, weights)
    for c in range(3):
        for b in range(4):
            expected = weights @ (values[:, c] * (index[:, c] == b))
            assert torch.allclose(found[:, 4 * c + b], expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "numpy", "strided"])
def test_kinds_of_input(kind: str) -> None:
    p, y = predictions(200, 3)
    kinds: dict[str, Array] = {
        "float32": p.float(),
        "bfloat16": p.bfloat16(),
        "numpy": p.numpy(),
        "strided": p.T.contiguous().T,
    }
    found = calibration(kinds[kind], y.numpy() if kind == "numpy" else y.int(), seed=0, num_resamples=10)
    assert found.nll.value == pytest.approx(scores.nll(p.log(), y), rel=1e-2 if kind == "bfloat16" else 1e-6)


def test_doubtful_results_carry_their_number() -> None:
    p, y = predictions(100, 3)
    one_class = calibration(p, torch.zeros_like(y), seed=0, num_resamples=10)
    assert "one class" in one_class.warnings[0]
    assert not one_class.ece.trusted
    assert math.isfinite(one_class.ece.value)
    impossible = calibration(torch.eye(3)[y - 1], y, seed=0, num_resamples=10)
    assert impossible.nll.value == math.inf
    assert "probability zero" in impossible.nll.warnings[0]
    assert impossible.brier.value == 2.0
    assert (impossible.accuracy.value, impossible.accuracy.error) == (0.0, 0.0)
    assert "all wrong" in impossible.accuracy.warnings[0]
    single = calibration(torch.tensor([[0.9, 0.1]]), torch.tensor([0]), seed=0, num_resamples=10)
    assert single.ece.value == pytest.approx(0.1, abs=1e-7)
    assert "only 1 examples" in single.ece.warnings[0]
    assert math.isnan(single.rms_debiased.value)
    assert any("one example left out" in each for each in single.rms_debiased.warnings)


NAN = torch.tensor([[0.5, math.nan]])


@pytest.mark.parametrize(
    ("table", "labels", "bins", "message"),
    [
        (NAN, torch.tensor([0]), 20, "row 0 has NaN"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), 20, "row 0 has NaN or a negative"),
        (torch.tensor([[0.5, 0.5], [3.0, 1.0]]), torch.tensor([0, 0]), 20, "row 1 sums to 4"),
        (torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), 20, "two classes"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 20, "one example"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1]), 20, "one integer for each row"),
        (torch.full((2, 2), 0.5), torch.tensor([0.0, 1.0]), 20, "one integer for each row"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), 20, "label 2 with 2 classes"),
        (torch.full((2, 2), 0.5), torch.tensor([0, -100]), 20, "label -100"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 1]), 0, "at least one bin"),
    ],
)
def test_refused(table: Tensor, labels: Tensor, bins: int, message: str) -> None:
    for call in (calibration, reliability):
        with pytest.raises(ValueError, match=message):
            call(table, labels, seed=0, bins=bins)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_levels_refused(confidence: float) -> None:
    p, y = predictions(50, 3, 2.0)
    for call in (calibration, reliability):
        with pytest.raises(ValueError, match="give a level between 0 and 1, such as 0.95"):
            call(p, y, seed=0, num_resamples=10, confidence=confidence)


@pytest.mark.gpu
def test_on_a_device_as_on_the_cpu(device: torch.device) -> None:
    p, y = predictions(200, 3, 2.0)
    here, there = (calibration(p.to(place), y, seed=0, num_resamples=20) for place in ("cpu", device))
    for name, estimate in here.scores.items():
        assert there.scores[name].value == pytest.approx(estimate.value)
        assert there.scores[name].high == pytest.approx(estimate.high)
    assert int(reliability(p.to(device), y, seed=0, num_resamples=10).counts.sum()) == 200
