"""Designs are scale-equivariant: updates in other units are merged into the same answer in those units."""

from __future__ import annotations

import pytest
import torch

from inference import fixed_point
from poe_merge import merge
from poe_models import (
    Anchor,
    Balanced,
    Cauchy,
    Directional,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    StudentT,
    TaskVectors,
)

SIZES = (1e-150, 1e-45, 1.0, 1e150)


@pytest.mark.filterwarnings("ignore:.*of its squared residual left")  # what random updates may come to
@pytest.mark.parametrize("residual_map", [Directional(), InputGram(), OutputGram()], ids=repr)
@pytest.mark.parametrize("energy", [Cauchy(), StudentT(4.0)], ids=repr)
@pytest.mark.parametrize("scale", [Balanced(1.0), Relative(1.0)], ids=repr)
def test_merges_in_all_units_are_one_merge(
    residual_map: object, energy: object, scale: object, generator: torch.Generator
) -> None:
    updates = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    found = {}
    for size in SIZES:
        experts = {name: {"fc.weight": size * update} for name, update in zip("abc", updates, strict=True)}
        vectors = TaskVectors({"fc.weight": torch.zeros(5, 4, dtype=torch.float64)}, experts, dtype=torch.float64)
        poe = ProductOfExperts.of(
            vectors.names,
            residual_map=residual_map,  # type: ignore[arg-type]
            energy=energy,  # type: ignore[arg-type]
            scale=scale,  # type: ignore[arg-type]
            anchor=Anchor(precision=RelativePrecision(0.1)),
        )
        found[size] = merge(vectors, poe)["fc.weight"] / size
        bound = fixed_point(poe.bind(next(iter(vectors)))).value[0] / size
        torch.testing.assert_close(bound, found[size], rtol=1e-6, atol=1e-8)
    for size in SIZES:
        torch.testing.assert_close(found[size], found[1.0], rtol=1e-6, atol=1e-8)
    assert found[1.0].norm() > 0.1
