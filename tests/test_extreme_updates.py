"""Updates whose fourth power leaves their dtype's range: merged in units of their own, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from poe_merge import merge
from poe_models import Absolute, Anchor, Balanced, ProductOfExperts, RelativePrecision, TaskVectors

CASES = [(torch.float32, 1e-15), (torch.float32, 1e15), (torch.float64, 1e-150), (torch.float64, 1e150)]


def scaled(size: float, dtype: torch.dtype, generator: torch.Generator) -> tuple[TaskVectors, Tensor]:
    updates = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    experts = {name: {"fc.weight": update * size} for name, update in zip("ab", updates, strict=True)}
    return TaskVectors({"fc.weight": torch.zeros(4, 4, dtype=dtype)}, experts, dtype=dtype), updates


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_a_merge_and_a_bound_posterior_do_them(dtype: torch.dtype, size: float, generator: torch.Generator) -> None:
    vectors, updates = scaled(size, dtype, generator)
    poe = ProductOfExperts.of(vectors.names, scale=Balanced(1.0))
    wanted = fixed_point(poe.bind(updates.unsqueeze(0))).value[0]
    for found in (merge(vectors, poe)["fc.weight"], fixed_point(poe.bind(next(iter(vectors)))).value[0]):
        torch.testing.assert_close(found / size, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_a_design_of_absolute_sizes_refuses_them_and_the_remedies_help(
    dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    vectors, updates = scaled(size, dtype, generator)
    module = next(iter(vectors))
    with pytest.raises(
        ValueError,
        match=r"expert 'a' in 'fc.weight'.* fourth power .* cannot hold.* `Balanced\(\)`.* divide all updates",
    ):
        fixed_point(ProductOfExperts.of(vectors.names, scale=Absolute(1.0)).bind(module))
    relative = ProductOfExperts.of(vectors.names, scale=Balanced(), anchor=Anchor(precision=RelativePrecision()))
    assert fixed_point(relative.bind(module)).converged  # the one remedy
    divided = ProductOfExperts.of(vectors.names, scale=Absolute(1.0)).bind(module.updates / size)
    wanted = fixed_point(ProductOfExperts.of(vectors.names, scale=Absolute(1.0)).bind(updates)).value
    torch.testing.assert_close(fixed_point(divided).value, wanted, rtol=1e-4, atol=1e-5)  # and the other


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_statistics_of_single_precision_are_those_of_double(size: float, generator: torch.Generator) -> None:
    """They are kept in float64, which holds what float32 does not."""
    updates = size * torch.randn(1, 2, 4, 4, generator=generator)
    poe = ProductOfExperts.of(["a", "b"])
    found, wanted = (fixed_point(poe.bind(each, "span")) for each in (updates, updates.double()))
    assert found.converged
    torch.testing.assert_close(found.value / size, wanted.value / size, rtol=1e-5, atol=1e-6)
