r"""Scores of class probabilities: log probabilities and labels in, one number for each example or in all out.

Everything is float64 and stays on the device of its input. Intervals, other bins and checks of the input are in
`diagnostics.calibration`, which builds on these.

>>> log_probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double().log()
>>> labels = torch.tensor([0, 0])
>>> round(nll(log_probabilities, labels), 4), round(brier(log_probabilities, labels), 4)
(0.5108, 0.37)
>>> accuracy(log_probabilities, labels), round(ece(log_probabilities, labels), 4)
(0.5, 0.35)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ECE_BINS",
    "accuracy",
    "binned_gap",
    "brier",
    "brier_each",
    "ece",
    "equal_width_bins",
    "nll",
    "nll_each",
    "top_label",
]

ECE_BINS = 20
"""As in [BMM] Eq. 34 (Li et al., arXiv 2605.12843)."""


def nll_each(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, ``(n,)`` in nats, of ``(n, classes)`` and ``(n,)``."""
    return -log_probabilities.double().gather(1, labels.long().unsqueeze(1)).squeeze(1)


def brier_each(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each row of probabilities from its one-hot label, ``(n,)``, summed over classes: 0 to 2."""
    difference = log_probabilities.double().exp()
    difference[torch.arange(len(labels), device=labels.device), labels.long()] -= 1.0
    return difference.square().sum(1)


def top_label(log_probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability of each example, ``(n,)``, and whether its class is the label, ``(n,)`` of 0.0 and 1.0."""
    confidence, predicted = log_probabilities.double().exp().max(1)
    return confidence, (predicted == labels).double()


def equal_width_bins(probabilities: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Index of each probability's bin among `bins` of equal width over [0, 1], closed on the left."""
    return (probabilities * bins).long().clamp(0, bins - 1)


def binned_gap(gap: Tensor, bin_of: Tensor, bins: int) -> Tensor:
    """``|sum of gap|`` in each bin, ``(bins,)``; its sum over n is a calibration error."""
    return gap.new_zeros(bins).index_add_(0, bin_of, gap).abs()


def accuracy(log_probabilities: Tensor, labels: Tensor) -> float:
    """Share of examples ``(n, classes)`` whose largest probability is that of the label ``(n,)``."""
    return float(top_label(log_probabilities, labels)[1].mean())


def nll(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels in nats."""
    return float(nll_each(log_probabilities, labels).mean())


def brier(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean Brier score, summed over classes: 0 to 2 (Brier, 1950)."""
    return float(brier_each(log_probabilities, labels).mean())


def ece(log_probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the largest probability: ``sum_b (n_b / n) |accuracy_b - confidence_b|``.

    Reference: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.

    Args:
        log_probabilities: ``(n, classes)``.
        labels: ``(n,)``.
        bins: Number of bins of equal width.

    Returns:
        The error, 0 to 1.
    """
    confidence, right = top_label(log_probabilities, labels)
    return float(binned_gap(right - confidence, equal_width_bins(confidence, bins), bins).sum()) / len(labels)
