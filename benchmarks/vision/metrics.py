"""Scores of logits (n, classes) for labels (n,), by `inference.scores`."""

from __future__ import annotations

from torch import Tensor

from inference import scores


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's."""
    return scores.accuracy(_log_probabilities(logits), labels)


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return scores.nll(_log_probabilities(logits), labels)


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes: 0 to 2."""
    return scores.brier(_log_probabilities(logits), labels)


def ece(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the largest probability, over 20 equal-width bins."""
    return scores.ece(_log_probabilities(logits), labels)
