r"""Designs ranked by two scores: their Pareto front and its hypervolume, and the rank correlation of the scores."""

from __future__ import annotations

import math

import torch
from scipy.stats import rankdata
from torch import Tensor

from diagnostics.estimates import Estimate, z_of
from diagnostics.predictions.inputs import Array

FEWEST_DESIGNS = 10
"""Below so many designs the interval of a rank correlation is not to be trusted (Bonett and Wright, 2000)."""


def pareto_front(higher_better: Tensor, lower_better: Tensor) -> Tensor:
    """Mask of the designs that no other one dominates: as good in both scores and better in one.

    Args:
        higher_better: ``(..., M)``, for instance accuracy.
        lower_better: ``(..., M)``, for instance the calibration error.

    Returns:
        ``(..., M)`` bool. Equal designs are both on the front.

    Raises:
        ValueError: If shapes differ or there is NaN.

    >>> pareto_front(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.10, 0.05, 0.06])).tolist()
    [True, True, False]
    """
    if higher_better.shape != lower_better.shape or bool((higher_better.isnan() | lower_better.isnan()).any()):
        raise ValueError(
            f"`pareto_front(...)`: scores {tuple(higher_better.shape)} and {tuple(lower_better.shape)}, or NaN among "
            "them. Give both for the same designs and leave out undefined ones."
        )
    high, low = higher_better.unsqueeze(-1), lower_better.unsqueeze(-1)  # the design judged, against others in the last
    others_high, others_low = higher_better.unsqueeze(-2), lower_better.unsqueeze(-2)
    as_good = (others_high >= high) & (others_low <= low)
    better = (others_high > high) | (others_low < low)
    return ~(as_good & better).any(-1)


def hypervolume(higher_better: Tensor, lower_better: Tensor, reference: tuple[float, float]) -> Tensor:
    """Area that designs dominate, above the one and below the other score of a reference: one number for a front.

    Args:
        higher_better: ``(..., M)``, for instance accuracy.
        lower_better: ``(..., M)``, for instance the calibration error.
        reference: Worst score of either kind that counts; what is worse than either adds nothing.

    Returns:
        ``(...,)``, in the product of the scores' units; designs that are dominated do not change it.

    Raises:
        ValueError: If shapes differ or there is NaN.

    >>> accuracy, ece = torch.tensor([0.9, 0.8]), torch.tensor([0.10, 0.05])
    >>> round(float(hypervolume(accuracy, ece, (0.5, 0.2))), 6)  # 0.1 * 0.1 + 0.3 * 0.15
    0.055
    """
    if higher_better.shape != lower_better.shape or bool((higher_better.isnan() | lower_better.isnan()).any()):
        raise ValueError(
            f"`hypervolume(...)`: scores {tuple(higher_better.shape)} and {tuple(lower_better.shape)}, or NaN among "
            "them. Give both for the same designs and leave out undefined ones."
        )
    high, order = higher_better.double().clamp(min=reference[0]).sort(-1, descending=True)
    least = lower_better.double().gather(-1, order).cummin(-1).values.clamp(max=reference[1])
    steps = -high.diff(append=torch.full_like(high[..., :1], reference[0]))
    return (steps * (reference[1] - least)).sum(-1)


def rank_agreement(first: Array, second: Array, *, confidence: float = 0.95) -> Estimate:
    r"""Spearman's rank correlation with its interval, for instance of evidence with held-out accuracy.

    The interval is normal in ``z = atanh(r)`` with variance ``(1 + r^2 / 2) / (M - 3)`` (Bonett and Wright, 2000,
    *Psychometrika* 65). Perfect agreement has no such interval: its near end is the perfect one, and the far end is
    that of the next lower agreement, ``1 - 12 / (M (M^2 - 1))``, where two neighbours are swapped.

    Args:
        first: ``(M,)`` one number for each design.
        second: ``(M,)`` for the same designs.
        confidence: Level of the interval.

    Returns:
        The correlation, between -1 and 1; NaN if all numbers of one side are equal.

    Raises:
        ValueError: If the two differ in length, have NaN, or are fewer than three.

    >>> print(rank_agreement(torch.arange(12.0), torch.arange(12.0).square()))
    1.0000 [0.9660, 1.0000]
    """
    one, two = (torch.as_tensor(each).detach().double().cpu() for each in (first, second))
    if one.ndim != 1 or one.shape != two.shape or len(one) < 3 or bool((one.isnan() | two.isnan()).any()):
        raise ValueError(
            f"`rank_agreement(...)`: {tuple(one.shape)} and {tuple(two.shape)} numbers, or NaN among them. Give both "
            "for the same designs, three at least."
        )
    count = len(one)
    warnings = (f"only {count} designs",) if count < FEWEST_DESIGNS else ()
    if len(one.unique()) == 1 or len(two.unique()) == 1:
        return Estimate(math.nan, math.nan, math.nan, math.nan, confidence, (*warnings, "all equal: no ranking"))
    ranks = torch.stack([torch.from_numpy(rankdata(each.numpy())) for each in (one, two)])
    value = max(-1.0, min(1.0, float(torch.corrcoef(ranks)[0, 1])))
    if count == 3:
        return Estimate(value, -1.0, 1.0, math.inf, confidence, (*warnings, "three designs have no interval"))
    largest = 1 - 12 / (count * (count**2 - 1))
    inner = max(-largest, min(largest, value))
    error = math.sqrt((1 + inner**2 / 2) / (count - 3))
    reach = z_of(confidence) * error
    low, high = math.tanh(math.atanh(inner) - reach), math.tanh(math.atanh(inner) + reach)
    if abs(value) > largest:
        low, high = (low, 1.0) if value > 0 else (-1.0, high)
    return Estimate(value, low, high, (1 - inner**2) * error, confidence, warnings)
