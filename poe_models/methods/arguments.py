"""Checks of settings that several methods share."""

from __future__ import annotations

import math
from typing import Any, get_args

from poe_models.methods.method import MergingMethod, ModuleBatch


def require_share(method: str, name: str, value: float, *, one: bool = True) -> None:
    """Refuse a number that is no share.

    Args:
        method: Name of the method.
        name: Name of the setting.
        value: What was given.
        one: Whether 1 is allowed (and 0 is not), or the other way round.

    Raises:
        ValueError: If it is outside (0, 1], or [0, 1).
    """
    if not (0 < value <= 1 if one else 0 <= value < 1):
        percent = f" For {value:g} % write {value / 100:g}." if 1 < value <= 100 else ""
        wanted = "above 0 and at most 1" if one else "at least 0 and below 1"
        raise ValueError(f"`{method}({name}={value!r})`: must be {wanted}.{percent}")


def require_choice(method: str, name: str, value: str, literal: Any) -> None:
    """Refuse a word that is not among a ``Literal``'s.

    Args:
        method: Name of the method.
        name: Name of the setting.
        value: What was given.
        literal: The type.

    Raises:
        ValueError: If it is another word.
    """
    if value not in get_args(literal):
        raise ValueError(f"`{method}({name}={value!r})`: choose from {', '.join(map(repr, get_args(literal)))}.")


def require_number(method: str, name: str, value: float, low: float = -math.inf) -> None:
    """Refuse a number that is not finite or below a bound.

    Args:
        method: Name of the method.
        name: Name of the setting.
        value: What was given.
        low: Smallest number allowed.

    Raises:
        ValueError: If it is not finite, or smaller.
    """
    if not (math.isfinite(value) and value >= low):
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"`{method}({name}={value!r})`: must be a finite number{least}.")


def require_count(method: str, name: str, value: int, low: int) -> None:
    """Refuse a number that is not whole or below a bound.

    Args:
        method: Name of the method.
        name: Name of the setting.
        value: What was given.
        low: Smallest number allowed.

    Raises:
        ValueError: If it is not whole, or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{method}({name}={value!r})`: must be a whole number of at least {low}.")


def for_each_expert(
    method: MergingMethod, name: str, values: tuple[float, ...] | None, batch: ModuleBatch
) -> tuple[float, ...]:
    """Numbers that ``prepare`` found for the experts, if there is one for each.

    Args:
        method: Whose they are.
        name: Name of the field.
        values: The numbers.
        batch: What is to be merged.

    Returns:
        The values.

    Raises:
        ValueError: If there is not one for each expert.
    """
    count = batch.updates.shape[1]
    if values is None or len(values) != count:
        raise ValueError(
            f"`{method!r}`: {name} are for {len(values or ())} experts, but the updates are of {count}. Prepare the "
            "method on the experts it merges, in the same order."
        )
    return values
