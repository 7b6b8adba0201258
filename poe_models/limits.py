"""Range of positive settings: products of settings within it stay in the range of float64, others are refused."""

from __future__ import annotations

from torch import Tensor

Parameter = float | Tensor
"""A setting of an energy: a number, or a tensor that broadcasts against ``q`` (a sampled hyperparameter)."""
SMALLEST, LARGEST = 1e-30, 1e30
"""The least and the most that a scale, an energy's setting, an importance, a precision or a temperature can be."""


def require_positive(call: str, hint: str = "", **values: Parameter | None) -> None:
    """Refuse settings that are not positive, finite and within the range; tensors need only be the first two.

    Args:
        call: The call up to the setting, such as ``Huber(``.
        hint: What may be done in place of zero, a sentence.
        **values: The settings by their names.

    Raises:
        ValueError: If one is not.

    >>> require_positive("Balanced(", gamma=1e-170)
    Traceback (most recent call last):
    ...
    ValueError: `Balanced(gamma=1e-170)`: must be a positive finite number, from 1e-30 to 1e+30.
    """
    for name, value in values.items():
        shown: object = value
        if isinstance(value, Tensor):
            right = (value > 0) & value.isfinite()
            good = bool(right.all())
            shown = value if good else float(value.detach()[~right][0])
        else:
            good = value is None or (isinstance(value, int | float) and SMALLEST <= value <= LARGEST)
        if not good:
            raise ValueError(
                f"`{call}{name}={shown!r:.100})`: must be a positive finite number, from {SMALLEST:g} to {LARGEST:g}."
                f"{hint and ' ' + hint}"
            )


def require_not_negative(call: str, **values: float) -> None:
    """Refuse settings that are neither zero nor within the range; a ``ValueError`` names the first."""
    for name, value in values.items():
        if not isinstance(value, int | float) or (value != 0 and not SMALLEST <= value <= LARGEST):
            raise ValueError(
                f"`{call}{name}={value!r:.100})`: must be a finite number, zero or above: 0, or from {SMALLEST:g} to "
                f"{LARGEST:g}."
            )
