"""Scores of logits (n, classes) for labels (n,), by `inference.scores`."""

from __future__ import annotations

from torch import Tensor

from inference import scores


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's."""
    return scores.accuracy(logits.double().softmax(1), labels)


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return scores.nll(logits.double().log_softmax(1), labels)


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes: 0 to 2."""
    return scores.brier(logits.double().softmax(1), labels)


def ece(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the largest probability, over 20 equal-width bins."""
    return scores.ece(logits.double().softmax(1), labels)
