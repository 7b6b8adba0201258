r"""Scores of class probabilities: probabilities and labels in, one number for each example or for all of them out.

The negative log-likelihood takes log probabilities, which do not underflow. Everything is float64 and stays on the
device of its input. Intervals, other bins and checks of the input are in
``diagnostics.predictions.calibration``, which builds on these.

>>> import torch
>>> probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
>>> labels = torch.tensor([0, 0])
>>> round(nll(probabilities.log(), labels), 4), round(brier(probabilities, labels), 4)
(0.5108, 0.37)
>>> accuracy(probabilities, labels), round(ece(probabilities, labels), 4)
(0.5, 0.35)
"""

from __future__ import annotations

from torch import Tensor

from poe_models.weights.batches import require_classes

ECE_BINS = 20
"""As in [BMM] Eq. 34 (Li et al., arXiv 2605.12843)."""


def nll_each(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, ``(n,)`` in nats, of ``(n, classes)`` and ``(n,)``.

    Raises:
        ValueError: If a label names no class.
    """
    require_classes(labels, log_probabilities.shape[1], "`nll_each(labels=...)`")
    return -log_probabilities.double().gather(1, labels.long().unsqueeze(1)).squeeze(1)


def label_log_likelihood(log_probabilities: Tensor, labels: Tensor | None) -> Tensor:
    """Log-likelihood of each label, ``(n,)`` in nats, of ``(n, classes)`` and ``(n,)``.

    Raises:
        ValueError: If there are no labels, or one names no class.
    """
    if labels is None:
        raise ValueError(
            "`label_log_likelihood(...)`: the batches have no integer labels, one for each row of logits. Give them as "
            "`labels` of a mapping, or the second of a pair; or give `reduce=` a function of the probabilities alone."
        )
    return -nll_each(log_probabilities, labels)


def brier_each(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each row of probabilities from its one-hot label, ``(n,)``, summed over classes: 0 to 2.

    Raises:
        ValueError: If a label names no class.
    """
    require_classes(labels, probabilities.shape[1], "`brier_each(labels=...)`")
    values = probabilities.double()
    own = values.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    return values.square().sum(1) - 2 * own + 1


def top_label(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability of each example, ``(n,)``, and whether its class is the label, ``(n,)`` of 0.0 and 1.0.

    Raises:
        ValueError: If a label names no class.
    """
    require_classes(labels, probabilities.shape[1], "`top_label(labels=...)`")
    confidence, predicted = probabilities.double().max(1)
    return confidence, (predicted == labels).double()


def equal_width_bins(probabilities: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Index of each probability's bin among ``bins`` of equal width over [0, 1], closed on the left."""
    return (probabilities * bins).long().clamp(0, bins - 1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of examples ``(n, classes)`` whose largest probability is that of the label ``(n,)``."""
    return float(top_label(probabilities, labels)[1].mean())


def nll(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels in nats."""
    return float(nll_each(log_probabilities, labels).mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Mean Brier score, summed over classes: 0 to 2 (Brier, 1950)."""
    return float(brier_each(probabilities, labels).mean())


def ece(probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the largest probability: ``sum_b (n_b / n) |accuracy_b - confidence_b|``, 0 to 1.

    Reference: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.
    """
    confidence, right = top_label(probabilities, labels)
    gap = confidence.new_zeros(bins).index_add_(0, equal_width_bins(confidence, bins), right - confidence)
    return float(gap.abs().sum()) / len(labels)
