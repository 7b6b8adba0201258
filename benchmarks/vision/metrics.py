"""Scores of class probabilities; arrays in, numbers out.

All take logits (n, classes) and labels (n,), and reduce in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return torch.nn.functional.cross_entropy(logits.double(), labels).item()


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes: 0 to 2."""
    probabilities = logits.double().softmax(1)
    probabilities[torch.arange(len(labels)), labels] -= 1.0
    return probabilities.square().sum(1).mean().item()


def ece(logits: Tensor, labels: Tensor, bins: int = 20) -> float:
    """Expected calibration error of the largest probability, over equal-width bins.

    Reference: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.

    Args:
        logits: (n, classes).
        labels: (n,).
        bins: Number of bins of equal width over [0, 1].

    Returns:
        Σ_b (n_b / n)·|accuracy_b - confidence_b|.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    gap = (predicted == labels).double() - confidence
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gap).abs().sum().item() / len(labels)
