"""Labels of Span statistics: names of the coefficients, kind of the anchor's centre, design of a merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass

from torch import Tensor

from poe_models.experts import CenterRule, ProductOfExperts

CENTER, MERGE = "center", "merge"
"""Names of the coefficients that belong to no task vector: of the anchor's centre, of a merge in the span."""


def stored_center(updates: Tensor) -> Tensor:
    """The anchor's centre that statistics carry as a tensor, for instance a checkpoint's, whatever its values.

    ``Anchor(stored_center)`` makes of the design that such statistics were made with one for Span coordinates, where
    the values themselves are not needed again.

    Raises:
        ValueError: If always: the updates do not tell it.
    """
    raise ValueError(
        "`Anchor(stored_center)` stands for the centre that Span statistics carry, and the updates "
        f"{tuple(updates.shape)} do not tell its values. Give the centre itself, as a tensor or a `Design.center`."
    )


def merge_label(poe: ProductOfExperts) -> str:
    """Text of what decides a design's merge besides residual maps, centre and solver: experts and anchor precision."""
    experts = (
        f"{each.name} {_plain(each.energy)} {_plain(each.scale)} importance {each.importance:g}" for each in poe.experts
    )
    return f"{', '.join(experts)}; anchor {_plain(poe.anchor.precision)}"


def _plain(setting: object) -> str:
    """A setting as text that does not change from run to run."""
    text = repr(setting) if is_dataclass(setting) else f"{type(setting).__qualname__}()"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def basis_names(updates: Sequence[str], through: bool) -> tuple[str, ...]:
    """Names of the coefficients: those of the updates, of the centre, and of the merge if the span goes through it."""
    return (*updates, CENTER, *((MERGE,) if through else ()))


def center_label(center: Tensor | CenterRule | None) -> str:
    """Kind of a centre without its values, as ``SpanStatistics.center`` has it."""
    if center is None:
        return "zero"
    if isinstance(center, Tensor) or center is stored_center:
        return "tensor"
    return repr(center) if is_dataclass(center) else getattr(center, "__qualname__", type(center).__qualname__)
