"""Checks of settings that several methods share; each reads the field ``name`` of a method."""

from __future__ import annotations

import math
from typing import Any, get_args

from poe_models.methods.method import MergingMethod, ModuleBatch


def require_share(method: MergingMethod, name: str, *, one: bool = True) -> None:
    """Refuse a number outside (0, 1], or, unless ``one`` is allowed, outside [0, 1)."""
    value = getattr(method, name)
    if not (0 < value <= 1 if one else 0 <= value < 1):
        percent = f" For {value:g} % write {value / 100:g}." if 1 < value <= 100 else ""
        wanted = "above 0 and at most 1" if one else "at least 0 and below 1"
        raise ValueError(f"{_quoted(method, name)}: must be {wanted}.{percent}")


def require_shares(method: MergingMethod, name: str) -> None:
    """Refuse numbers outside [0, 1] among those of the experts, if there are any."""
    require_numbers(method, name)
    if not all(0 <= value <= 1 for value in getattr(method, name) or ()):
        raise ValueError(f"{_quoted(method, name)}: every number must be at least 0 and at most 1.")


def require_numbers(method: MergingMethod, name: str) -> None:
    """Refuse what is no sequence of finite numbers, one for each expert, if it is given."""
    values = getattr(method, name)
    if values is None:
        return
    if not isinstance(values, tuple | list) or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ValueError(f"{_quoted(method, name)}: give a finite number for each expert, as a tuple.")


def require_choice(method: MergingMethod, name: str, literal: Any) -> None:
    """Refuse a word that is not among those of a ``Literal``."""
    if getattr(method, name) not in get_args(literal):
        raise ValueError(f"{_quoted(method, name)}: choose from {', '.join(map(repr, get_args(literal)))}.")


def require_number(method: MergingMethod, name: str, low: float = -math.inf) -> None:
    """Refuse a number that is not finite or below a bound."""
    value = getattr(method, name)
    if not (math.isfinite(value) and value >= low):
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{_quoted(method, name)}: must be a finite number{least}.")


def require_count(method: MergingMethod, name: str, low: int) -> None:
    """Refuse a number that is not whole or below a bound."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{_quoted(method, name)}: must be a whole number of at least {low}.")


def _quoted(method: MergingMethod, name: str) -> str:
    return f"`{type(method).__name__}({name}={getattr(method, name)!r})`"


def require_seed(method: MergingMethod) -> None:
    """Refuse a seed that is not a whole number."""
    value = getattr(method, "seed")  # noqa: B009  # not every method has one
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_quoted(method, 'seed')}: must be a whole number.")


def for_each_expert(method: MergingMethod, name: str, batch: ModuleBatch) -> tuple[float, ...]:
    """Numbers of the experts, given by the user or found by ``prepare``.

    Args:
        method: A method that is ready.
        name: Name of the field that has them.
        batch: The modules to be merged.

    Returns:
        One number for each expert of the batch.

    Raises:
        ValueError: If there is not one for each.
    """
    values: tuple[float, ...] = getattr(method, name) or ()
    count = batch.updates.shape[1]
    if len(values) != count:
        raise ValueError(
            f"`{method!r}`: {name} are for {len(values)} experts, but the updates are of {count}. Give one for each "
            "expert that is merged, in their order, or prepare the method on these experts."
        )
    return values
