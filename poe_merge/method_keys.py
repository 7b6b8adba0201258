"""Parameters that a merging method, or a product of experts, has a use for."""

from __future__ import annotations

from collections.abc import Sequence

from poe_merge.settings import POE, Place
from poe_merge.specs import is_weighted

_WEIGHTED = ("density", "base_weight")


def allowed(key: str, method: str) -> bool:
    """Whether a canonical method, or ``poe``, has a use for a parameter.

    >>> allowed("eta", "poe"), allowed("eta", "Average()"), allowed("density", "Weighted()")
    (True, False, True)
    """
    if method == POE:
        return key not in _WEIGHTED
    return key == "scaling" or (key in ("weight", *_WEIGHTED) and is_weighted(method))


def misplaced(places: Sequence[Place], method: str) -> str:
    """Error about settings that a method has no use for, with the way out."""
    words = list(dict.fromkeys(f"`{place[-1] if place else 'preset'}`" for place in places))
    belong = f"{', '.join(words)} {'belongs' if len(words) == 1 else 'belong'}"
    if method == POE:
        return (
            f"{belong} to a weighted method, and `merge_method` is {POE}. Leave it out, or write "
            "`merge_method: Weighted`"
        )
    return (
        f"{belong} to a product of experts, and `merge_method` is {method.partition('(')[0]}. Leave it out, or write "
        f"`merge_method: {POE}`. The method's own settings are {method}; `scaling` is of any merge"
    )
