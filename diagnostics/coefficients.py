"""How much of each task is in the merge, module by module: intervals of Span coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inference.model_draws import SpanDraws

__all__ = ["CoefficientIntervals", "coefficient_intervals"]


@dataclass(frozen=True, eq=False)
class CoefficientIntervals:
    """Posterior quantiles of ``K`` coefficients in ``M`` modules; float64 ``(M, K)`` arrays.

    Attributes:
        modules: names.
        updates: names of the updates, then of the anchor's centre where it has one, then of a merge that the span goes
            through; a draw at that merge has a one there, and zeros at the updates.
        median: of all chains together.
        low: lower end of the central interval.
        high: upper end.
        confidence: its level.
    """

    modules: tuple[str, ...]
    updates: tuple[str, ...]
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float


def coefficient_intervals(draws: SpanDraws, confidence: float = 0.9) -> CoefficientIntervals:
    """Central intervals of each module's coefficients.

    Args:
        draws: in Span coordinates; judge their chains first.
        confidence: level of the intervals.

    Returns:
        The intervals.

    Raises:
        ValueError: the level is not between 0 and 1, or the draws are not in Span coordinates.

    >>> import torch
    >>> coefficients = torch.linspace(0, 1, 101, dtype=torch.float64).reshape(1, 101, 1, 1).expand(1, 101, 1, 2)
    >>> found = coefficient_intervals(SpanDraws(("m",), torch.tensor([[1.0, 0.0]]), "", ("a",), coefficients), 0.8)
    >>> found.updates, found.low.round(2), found.high.round(2)
    (('a',), array([[0.1]]), array([[0.9]]))
    """
    if not isinstance(draws, SpanDraws) or not 0 < confidence < 1:
        raise ValueError(
            f"`coefficient_intervals({type(draws).__name__}, confidence={confidence})`: give Span draws, which have "
            "coefficients, and a level between 0 and 1."
        )
    names = tuple(draws.basis[place] for place in draws.varying)
    values = draws.coefficients[..., draws.varying].detach().cpu().double().numpy()
    low, median, high = np.quantile(values, [(1 - confidence) / 2, 0.5, (1 + confidence) / 2], axis=(0, 1))
    return CoefficientIntervals(draws.modules, names, median, low, high, confidence)
