"""The anchor's precision in the unit of [BMM]: the merge is the regression that the paper prints."""

from __future__ import annotations

import pytest
import torch

from inference import fixed_point
from poe_models import Absolute, Anchor, Gaussian, InputGram, ProductOfExperts, RidgePrecision, TaskArithmetic
from tests.helpers import random_updates


@pytest.mark.parametrize("ridge", [0.03, 4.0])
@pytest.mark.parametrize("center", [None, TaskArithmetic(0.5)])
def test_the_merge_is_the_papers_regression(
    ridge: float, center: TaskArithmetic | None, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    anchor = Anchor(center, RidgePrecision(ridge))
    poe = ProductOfExperts.of(("a", "b", "c"), InputGram(), Gaussian(), Absolute(1.0), anchor=anchor)
    z_0 = torch.zeros(2, 6, 5, dtype=updates.dtype) if center is None else 0.5 * updates.sum(1)
    grams = updates.mT @ updates
    pull = (updates @ grams).sum(1) + ridge * z_0
    expected = torch.linalg.solve(grams.sum(1) + ridge * torch.eye(5, dtype=updates.dtype), pull, left=False)
    torch.testing.assert_close(fixed_point(poe.bind(updates)).value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_ridges_that_are_none(ridge: float) -> None:
    with pytest.raises(ValueError, match="RidgePrecision"):
        RidgePrecision(ridge)
