r"""Scores against several raters, who disagree: the votes are a distribution and not one label.

>>> votes = torch.tensor([[3, 1], [0, 4]] * 20)
>>> found = soft_label_scores(votes / 4, votes, seed=0)
>>> found.divergence.value, found.total_variation.value
(0.0, 0.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diagnostics.estimates import Estimate, Scores, bootstrap, weighted_mean
from diagnostics.predictions.binning import Binning, check_bins
from diagnostics.predictions.inputs import Array, checked_probabilities
from inference.scores import ECE_BINS, equal_width_bins


@dataclass(frozen=True)
class SoftLabelScores(Scores):
    """Distances of probabilities ``p`` from the raters' shares ``v``.

    Attributes:
        cross_entropy: ``-sum_c v_c log p_c``, nats per example (Peterson et al., 2019, arXiv 1908.07086).
        divergence: ``KL(v || p)``, nats: the cross-entropy less the raters' own entropy.
        squared_distance: ``|p - v|^2`` less the bias of a finite number m of raters, ``sum_c v_c (1 - v_c) / (m - 1)``:
            unbiased for the distance from infinitely many raters. Examples with one rater are left out.
        total_variation: ``|p - v|_1 / 2`` (Baan et al., 2022, arXiv 2210.16133).
        ece: Expected calibration error, where an example is right to the share of raters that agree.
        entropy_gap: Entropy of the prediction less that of the raters' shares, nats; below 0 it is surer than they are.
        num_examples: Number of examples n.
        fewest_raters: Smallest number of raters of an example.
    """

    cross_entropy: Estimate
    divergence: Estimate
    squared_distance: Estimate
    total_variation: Estimate
    ece: Estimate
    entropy_gap: Estimate
    num_examples: int
    fewest_raters: int


def soft_label_scores(
    probabilities: Array,
    votes: Array,
    *,
    seed: int,
    bins: int = ECE_BINS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> SoftLabelScores:
    """Scores against counts of votes, with bootstrap intervals over examples.

    Args:
        probabilities: ``(n, classes)``.
        votes: ``(n, classes)`` numbers of raters who chose each class, at least one rater for each example.
        seed: Seed of the resamples.
        bins: Number of bins of the calibration error.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Raises:
        ValueError: If probabilities are not valid, or votes are no counts of this shape.
    """
    p = checked_probabilities(probabilities, "soft_label_scores").cpu()
    counts = _checked_votes(votes, p)
    check_bins(bins, "soft_label_scores")
    raters = counts.sum(1)
    v = counts / raters.unsqueeze(1)
    cross, own = -torch.xlogy(v, p).sum(1), torch.special.entr(v).sum(1)
    resampled = partial(bootstrap, size=len(p), seed=seed, num_resamples=num_resamples, confidence=confidence)
    impossible = ("a rater's class has probability zero",) * bool(cross.isinf().any())
    return SoftLabelScores(
        cross_entropy=resampled(weighted_mean(cross), warnings=impossible),
        divergence=resampled(weighted_mean(cross - own), warnings=impossible),
        squared_distance=_squared_distance(p, v, raters, resampled),
        total_variation=resampled(weighted_mean((p - v).abs().sum(1) / 2)),
        ece=_calibration_error(p, v, bins, resampled),
        entropy_gap=resampled(weighted_mean(torch.special.entr(p).sum(1) - own)),
        num_examples=len(p),
        fewest_raters=int(raters.min()),
    )


def _squared_distance(p: Tensor, v: Tensor, raters: Tensor, resampled: partial[Estimate]) -> Estimate:
    """Unbiased squared distance over the examples with several raters."""
    several = (raters > 1).double()
    distance = several * ((p - v).square() - v * (1 - v) / (raters - 1).clamp_min(1).unsqueeze(1)).sum(1)
    alone = int((raters == 1).sum())
    warnings = (f"{alone} examples with one rater left out",) if alone else ()
    return resampled(lambda w: w @ distance / (w @ several), warnings=warnings)


def _calibration_error(p: Tensor, v: Tensor, bins: int, resampled: partial[Estimate]) -> Estimate:
    """Gap between the largest probability and the share of raters that agree with its class, in bins of equal width."""
    top, guess = p.max(1)
    gap = (v.gather(1, guess.unsqueeze(1)).squeeze(1) - top).unsqueeze(1)
    binning = Binning.of(equal_width_bins(top, bins), bins)
    return resampled(lambda w: binning.sums(gap, w).abs().sum(1) / len(p), interval="normal", bounds=(0.0, math.inf))


def _checked_votes(votes: Array, probabilities: Tensor) -> Tensor:
    counts = torch.as_tensor(votes).detach().double().cpu()
    whole = counts.shape == probabilities.shape and bool(((counts >= 0) & (counts == counts.round())).all())
    if not whole or not bool((counts.sum(1) >= 1).all()):
        raise ValueError(
            f"`soft_label_scores(votes=...)`: expected whole numbers {tuple(probabilities.shape)} with at least one "
            f"vote in each row, got {tuple(counts.shape)}. Give counts of raters, not shares; leave out examples that "
            "nobody rated."
        )
    return counts
