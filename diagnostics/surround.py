"""Do draws surround the merge that they stand beside?"""

from __future__ import annotations

import math

from diagnostics.verdicts import Level, Verdict
from inference.model_draws import PosteriorDraws

__all__ = ["surround_verdict"]

ABOUT = "centre of the draws"


def surround_verdict(draws: PosteriorDraws) -> Verdict:
    """Judge how far the centre of draws is from the merge, in standard deviations of the draws.

    Args:
        draws: of a whole model, or of some of its modules.

    Returns:
        A verdict that says what the draws are: sampler, coordinates, temperature and distance.

    >>> import torch
    >>> from inference.merge_distance import MergeDistance
    >>> from inference.model_draws import SpanDraws
    >>> coefficients = torch.zeros(1, 20, 1, 2, dtype=torch.float64)
    >>> shapes = torch.tensor([[1.0, 0.0]])
    >>> draws = SpanDraws(("m",), shapes, "", ("a",), coefficients, made_by="slice", temperature=0.1)
    >>> surround_verdict(draws).level.name
    'UNKNOWN'
    """
    if draws.from_merge is None:
        text = (
            f"{draws.about}: how far their centre is from the merge is not known; `distance_from_merge` finds it out."
        )
        return Verdict(ABOUT, Level.UNKNOWN, text)
    if draws.far_from_merge is not None:
        return Verdict(ABOUT, Level.CAUTION, draws.far_from_merge)
    level = Level.UNKNOWN if math.isnan(draws.from_merge.typical) else Level.GOOD
    return Verdict(ABOUT, level, f"{draws.about}: {draws.from_merge}.")
