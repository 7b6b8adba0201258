r"""Calibration of class probabilities, every number with its interval.

The expected calibration error (ECE) has several forms, all ``sum_b |sum_{i in b} (right_i - p_i)| / n`` over bins of
the predicted probability; noise pushes them up, so that a calibrated model has a positive one. Intervals reflect that
(``interval="normal"``); the debiased form subtracts it.

>>> generator = torch.Generator().manual_seed(0)
>>> probabilities = (2 * torch.randn(2000, 3, generator=generator)).double().softmax(1)
>>> labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
>>> print(calibration(probabilities, labels, seed=0).nll)
0.595 [0.565, 0.628]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diagnostics.estimates import BATCH, Estimate, Interval, Scores, Statistic, bootstrap, estimate_of, weighted_mean
from diagnostics.predictions.binning import Binning, check_bins, equal_mass_bins
from diagnostics.predictions.inputs import Array, Labelled, checked_probabilities, labelled
from inference.logit_temperature import LOGIT_TEMPERATURES, fit_logit_temperature
from inference.scores import ECE_BINS, brier_each, equal_width_bins, nll_each, top_label
from poe_models.printing import Brief


@dataclass(frozen=True)
class Calibration(Scores):
    """Scores of one set of predictions.

    Attributes:
        accuracy: Share of correct predictions.
        nll: Negative log-likelihood, nats per example.
        brier: Brier score summed over classes, 0 to 2.
        ece: Expected calibration error of the largest probability over bins of equal width, [BMM] Eq. 34 (Naeini et
            al., 2015).
        ece_equal_mass: The same over bins of equal mass (Nguyen and O'Connor, 2015, arXiv 1508.05154).
        ece_class_wise: Calibration error of every class's probability over bins of equal width, mean over classes
            (Kull et al., 2019, arXiv 1910.12656; the static calibration error of Nixon et al., 2019, arXiv 1904.01685).
        ece_top_label: The same as ``ece``, the bins split by predicted class (Gupta and Ramdas, 2022, arXiv
            2107.08353).
        rms_debiased: Root of the debiased mean squared gap over bins of equal mass, 0 where the debiased square is
            negative (Kumar et al., 2019, arXiv 1909.10155, section 5).
        ece_if_calibrated: Mean and quantiles of the ``ece`` of labels drawn from the largest probabilities, which are
            then right (consistency resampling, Broecker and Smith, 2007, *Wea. Forecasting* 22).
        num_examples: Number of examples n.
        bins: Number of bins.
        warnings: Reasons not to trust the numbers.
    """

    accuracy: Estimate
    nll: Estimate
    brier: Estimate
    ece: Estimate
    ece_equal_mass: Estimate
    ece_class_wise: Estimate
    ece_top_label: Estimate
    rms_debiased: Estimate
    ece_if_calibrated: Estimate
    num_examples: int
    bins: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class LogitScaling(Brief):
    """Predictions with one number dividing their logits: the baseline to beat.

    Attributes:
        temperature: Divisor of the logits; above 1 the predictions were too sure.
        probabilities: ``(n, classes)`` float64.
    """

    temperature: float
    probabilities: Tensor

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust it; empty if there are none."""
        if self.temperature not in LOGIT_TEMPERATURES:
            return ()
        why = "all right" if self.temperature < 1 else "no better than chance"
        return (f"the temperature is at the end of its range: predictions on validation are {why}",)


def calibration(
    probabilities: Array,
    labels: Array,
    *,
    seed: int,
    bins: int = ECE_BINS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Calibration:
    """All scores of predictions, with bootstrap intervals over examples; bins of equal mass stay those of the data.

    Args:
        probabilities: ``(n, classes)``; rows sum to one. They may be on any device.
        labels: ``(n,)`` integers.
        seed: Seed of the resamples.
        bins: Number of bins.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Raises:
        ValueError: If probabilities or labels are not valid, or there is no bin.
    """
    pair = labelled(probabilities, labels, "calibration")
    check_bins(bins, "calibration")
    resampled = partial(bootstrap, size=len(pair), seed=seed, num_resamples=num_resamples, confidence=confidence)
    found = {name: score.estimate(resampled, pair.warnings) for name, score in _scores(pair, bins).items()}
    return Calibration(
        rms_debiased=_root(found.pop("square_debiased")),
        ece_if_calibrated=_ece_if_calibrated(pair, bins, seed, num_resamples, confidence),
        **found,
        num_examples=len(pair),
        bins=bins,
        warnings=pair.warnings,
    )


def calibration_difference(
    first: Array,
    second: Array,
    labels: Array,
    *,
    seed: int,
    bins: int = ECE_BINS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Scores of the first predictions less those of the second, paired: both are resampled together.

    Args:
        first: ``(n, classes)`` probabilities.
        second: ``(n, classes)`` probabilities for the same examples.
        labels: ``(n,)`` integers.
        seed: Seed of the resamples.
        bins: Number of bins.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Returns:
        The differences by name of the score, as in :class:`Calibration`, and ``square_debiased``, the square of
        ``rms_debiased`` before it is cut at 0. Negative is better in all but the accuracy.

    Raises:
        ValueError: If probabilities or labels are not valid, or there is no bin.

    >>> sure, unsure = torch.tensor([[0.9, 0.1]] * 50), torch.tensor([[0.6, 0.4]] * 50)
    >>> labels = torch.tensor([0, 0, 1, 0, 1] * 10)
    >>> print(calibration_difference(sure, unsure, labels, seed=0)["brier"])
    0.180 [0.012, 0.348]
    """
    pairs = [labelled(each, labels, "calibration_difference") for each in (first, second)]
    check_bins(bins, "calibration_difference")
    resampled = partial(bootstrap, size=len(pairs[0]), seed=seed, num_resamples=num_resamples, confidence=confidence)
    one, two = (_scores(pair, bins) for pair in pairs)
    return {name: one[name].minus(two[name]).estimate(resampled, pairs[0].warnings) for name in one}


def scale_logits(validation: Array, labels: Array, probabilities: Array) -> LogitScaling:
    """Logit temperature scaling, fitted on validation (Guo et al., 2017, arXiv 1706.04599).

    Log probabilities are logits up to a constant, so that those of an ensemble can be scaled too. Probabilities of
    zero count as the smallest positive number.

    Args:
        validation: ``(m, classes)`` probabilities to fit on.
        labels: ``(m,)`` labels of validation.
        probabilities: ``(n, classes)`` to scale.

    Raises:
        ValueError: If probabilities or labels are not valid.

    >>> validation = torch.tensor([[0.99, 0.01]] * 3)
    >>> scale_logits(validation, torch.tensor([0, 1, 0]), validation[:1]).probabilities
    tensor([[0.6667, 0.3333]], dtype=torch.float64)
    """
    fitted_on = labelled(validation, labels, "scale_logits")
    logits = checked_probabilities(probabilities, "scale_logits").clamp_min(torch.finfo(torch.float64).tiny).log()
    own = fitted_on.probabilities.clamp_min(torch.finfo(torch.float64).tiny).log()
    temperature = fit_logit_temperature(own, fitted_on.labels)
    return LogitScaling(temperature, (logits / temperature).softmax(1))


@dataclass(frozen=True, eq=False)
class _Score:
    """A statistic of weighted examples with the kind and the bounds of its interval."""

    of: Statistic
    interval: Interval
    bounds: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def minus(self, other: _Score) -> _Score:
        warnings = tuple(dict.fromkeys(self.warnings + other.warnings))
        return _Score(lambda w: self.of(w) - other.of(w), self.interval, (-math.inf, math.inf), warnings)

    def estimate(self, resampled: Callable[..., Estimate], warnings: tuple[str, ...]) -> Estimate:
        doubts = (*warnings, *self.warnings)
        return resampled(self.of, interval=self.interval, bounds=self.bounds, warnings=doubts)


def _scores(pair: Labelled, bins: int) -> dict[str, _Score]:
    """The scores of ``calibration_difference`` by name."""
    p, labels = pair.probabilities, pair.labels
    confidence, right = top_label(p, labels)
    gap = right - confidence
    one_hot = torch.nn.functional.one_hot(labels, p.shape[1]).double()
    width, mass = equal_width_bins(confidence, bins), equal_mass_bins(confidence, bins)
    extreme = len(right.unique()) == 1
    impossible = bool((p.gather(1, labels.unsqueeze(1)) == 0).any())
    by_label = Binning.of(p.argmax(1) * bins + width, bins * p.shape[1])
    return {
        "accuracy": _mean(right, (0.0, 1.0), ("all right or all wrong: resamples cannot differ",) * extreme),
        "nll": _mean(nll_each(p.log(), labels), (0.0, math.inf), ("a label has probability zero",) * impossible),
        "brier": _mean(brier_each(p, labels), (0.0, 2.0)),
        "ece": _binned(Binning.of(width, bins), gap.unsqueeze(1)),
        "ece_equal_mass": _binned(Binning.of(mass, bins), gap.unsqueeze(1)),
        "ece_class_wise": _binned(Binning.of(equal_width_bins(p, bins), bins), one_hot - p),
        "ece_top_label": _binned(by_label, gap.unsqueeze(1)),
        "square_debiased": _squared(Binning.of(mass, bins), confidence, right),
    }


def _mean(values: Tensor, bounds: tuple[float, float], warnings: tuple[str, ...] = ()) -> _Score:
    return _Score(weighted_mean(values), "percentile", bounds, warnings)


def _binned(binning: Binning, gap: Tensor) -> _Score:
    """``sum_b |sum of gap| / n``, mean over the k values of an example; gap is ``(n, k)``."""
    gap = gap.cpu()
    return _Score(lambda w: binning.sums(gap, w).abs().sum(1) / gap.numel(), "normal", (0.0, 1.0))


def _squared(binning: Binning, confidence: Tensor, right: Tensor) -> _Score:
    """Debiased mean squared gap: the variance of a bin's accuracy is subtracted. Bins of one example are left out."""
    stacked = torch.stack([confidence, right]).cpu().unsqueeze(-1)

    def of(weights: Tensor) -> Tensor:
        count = binning.counts(weights)
        kept = count >= 2
        p, y = (binning.sums(each, weights) / count.clamp_min(1) for each in stacked)
        square = (y - p).square() - y * (1 - y) / (count - 1).clamp_min(1)
        return torch.where(kept, count * square, 0.0).sum(1) / (count * kept).sum(1)

    lonely = int((binning.counts(torch.ones(1, len(right), dtype=torch.float64)) == 1).sum())
    warnings = (f"{lonely} bins with one example left out",) if lonely else ()
    return _Score(of, "normal", (-math.inf, math.inf), warnings)


def _ece_if_calibrated(pair: Labelled, bins: int, seed: int, num_resamples: int, confidence: float) -> Estimate:
    """Distribution of ECE if each example is right with its largest probability."""
    top = pair.probabilities.max(1).values.cpu()
    binning = Binning.of(equal_width_bins(top, bins), bins)
    ones = torch.ones(len(top), 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, BATCH // len(top))
    replicates = []
    for start in range(0, num_resamples, step):
        batch = min(step, num_resamples - start)
        uniform = torch.rand(batch, len(top), generator=generator, dtype=torch.float64)
        gap = (uniform < top).double() - top
        replicates.append(binning.sums(ones, gap).abs().sum(1) / len(top))
    drawn = torch.cat(replicates)
    return estimate_of(float(drawn.mean()), drawn, confidence)


def _root(square: Estimate) -> Estimate:
    """The estimate on the scale of probabilities; its standard error by the slope of the root, where it has one."""
    value, low, high = (math.sqrt(max(each, 0.0)) for each in (square.value, square.low, square.high))
    error = square.error / (2 * value) if value > 0 else math.sqrt(square.error)
    return Estimate(value, low, high, error, square.confidence, square.warnings)
