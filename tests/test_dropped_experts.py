"""An expert whose update is rounding beside the others' drops out of Full and of Span coordinates alike."""

from __future__ import annotations

import pytest
import torch

from poe_models import Balanced, Cauchy, InputGram, OutputGram, ProductOfExperts, Relative, Scale, span_statistics
from tests.helpers import assert_close, random_updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "active"), [(2.0, True), (0.5, False)])
@pytest.mark.parametrize("scale", [Relative(1.0), Balanced(1.0)], ids=repr)
def test_rounding_is_that_of_the_updates_in_both_coordinates(
    dtype: torch.dtype, size: float, active: bool, scale: Scale, generator: torch.Generator
) -> None:
    """Sizes in epsilons of the updates' dtype; Span coordinates are in float64 whatever that is."""
    updates = random_updates(generator, 1, 2, 3, 4).to(dtype)
    updates = updates / updates.norm(dim=(-2, -1), keepdim=True)
    updates[:, 1] *= size * torch.finfo(dtype).eps
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), scale)
    full, span = poe.bind(updates), poe.bind(updates, coordinates="span")
    given = poe.bind(span_statistics(poe, updates))
    for posterior in (full, span, given):
        assert posterior.active.tolist() == [[True, active]]
        assert_close(posterior.anchor_precision, full.anchor_precision, 1e-5)
    coefficients = torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64)
    assert span.span is not None
    wanted = full.energy((0.5 * updates[:, 0]).to(dtype))
    assert_close(span.energy(span.span.latents(coefficients)), wanted, 1e-5)


def test_rounding_is_beside_experts_of_the_same_map(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4).float()
    updates[:, 1] *= 1e-9
    poe = ProductOfExperts.of(["a", "b"], (InputGram(), OutputGram()), Cauchy())
    names = [expert.name for expert in poe.experts]
    for posterior in (poe.bind(updates), poe.bind(updates, coordinates="span")):
        told = dict(zip(names, posterior.active[0].tolist(), strict=True))
        assert told == {name: name.startswith("a") for name in names}
