"""Residuals that are summed up from one Gram matrix, against a product for each expert."""

from __future__ import annotations

import pytest
import torch

from inference.summed_residuals import SummedResiduals
from poe_models import (
    Anchor,
    Cauchy,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
)
from poe_models.least_squares import quadratic_of
from tests.helpers import assert_close, random_updates

MAPS: list[ResidualMap | tuple[ResidualMap, ...]] = [
    InputGram(),
    OutputGram(),
    (OutputGram(), InputGram()),
    (Identity(), InputGram()),  # of which one is not summed up
]


@pytest.mark.parametrize("maps", MAPS, ids=repr)
@pytest.mark.parametrize("centred", [False, True])
def test_they_are_those_of_each_expert(
    maps: ResidualMap | tuple[ResidualMap, ...], centred: bool, generator: torch.Generator
) -> None:
    """Also around a centre, and where the terms cancel: at an expert's own update."""
    updates, centers = random_updates(generator, 2, 3, 7, 6), random_updates(generator, 2, 1, 7, 6)[:, 0]
    anchor = Anchor(centers if centred else None, RelativePrecision(0.1))
    posterior = ProductOfExperts.of(["a", "b", "c"], maps, Cauchy(), anchor=anchor).bind(updates)
    quadratic = quadratic_of(posterior)
    found = SummedResiduals(posterior, quadratic, quadratic.pulls())
    assert found.sides
    x = torch.randn(quadratic.targets[0].shape, generator=generator, dtype=torch.float64)
    assert_close(found.at(x), quadratic.residuals(x), 1e-11)
    at_zero = quadratic.residuals(torch.zeros_like(x))
    assert_close(found.at_zero, at_zero, 1e-11)
    for place, target in enumerate(quadratic.targets):
        near = found.at(target)
        assert bool((near[:, place] <= 1e-25 * at_zero[:, place]).all())
        assert_close(near, quadratic.residuals(target), 1e-11)
