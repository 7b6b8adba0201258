"""Factor experts that cannot serve: one error where they are made, or where they are first called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import minimize
from poe_models import FactorExpert, ProductOfExperts


def norm(update: Tensor) -> Tensor:
    return update.square().sum((-2, -1))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": 3}, "give a name"),
        ({"function": 3}, "a function that returns energies"),
        ({"coordinates": "weights"}, "coordinates are 'update' or 'span'"),
        ({"scope": "batch"}, "scope is 'module', 'model' or 'examples'"),
        ({"scope": "examples"}, "needs their number"),
        ({"scope": "examples", "examples": 1.5}, "needs their number"),
        ({"examples": 3}, "needs their number"),
        ({"scope": "examples", "examples": 3, "batch_size": 0}, "a whole number between 1 and"),
        ({"scope": "examples", "examples": 3, "subsample_size": 1.5}, "a whole number between 1 and"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"`FactorExpert.*{says}"):
        FactorExpert(**{"name": "small", "function": norm, **arguments})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda update: None, "returned NoneType, expected a tensor"),
        (lambda update: norm(update).item(), "returned float, expected a tensor"),
        (lambda update: update, r"returned shape \(3, 3\)"),
        (lambda update: norm(update) * math.nan, "is not finite at the start"),
        (lambda update: norm(update.detach()), "carries no gradient"),
    ],
)
def test_energies_are_checked(function: Callable[[Tensor], Any], says: str, generator: torch.Generator) -> None:
    updates = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    poe = ProductOfExperts.of(["a", "b"]) * FactorExpert("small", function)
    with pytest.raises(ValueError, match=f"factor expert 'small' {says}"):
        minimize(poe.bind(updates, coordinates="span"))
