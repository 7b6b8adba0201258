"""A whole model in batches: equal shapes together, a limited number at a time, and what says nothing left out."""

from __future__ import annotations

import pytest
import torch

from inference.evidence import module_batches as batches
from inference.evidence.module_batches import module_batches
from poe_models import AbsolutePrecision, Anchor, ProductOfExperts, RelativePrecision, TaskVectors
from tests.seeds import seeded

RELATIVE = ProductOfExperts.of(["a", "b"], anchor=Anchor(precision=RelativePrecision(0.1)))
ABSOLUTE = ProductOfExperts.of(["a", "b"], anchor=Anchor(precision=AbsolutePrecision(0.1)))
SHAPES = {"m0": (2, 3), "n0": (3, 2), "m1": (2, 3), "silent": (2, 3), "m2": (2, 3)}


@pytest.fixture
def model() -> TaskVectors:
    generator = seeded(0)
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    moved = {name: 0.0 if "silent" in name else 1.0 for name in base}
    experts = {e: {n: moved[n] * torch.randn(v.shape, generator=generator) for n, v in base.items()} for e in "ab"}
    return TaskVectors(base, experts)


def names(model: TaskVectors, *designs: ProductOfExperts) -> list[tuple[str, ...]]:
    return [tuple(name.removesuffix(".weight") for name in each.names) for each in module_batches(model, designs)]


def test_a_tensor_is_a_batch_whose_modules_are_numbered() -> None:
    for shape, count in (((2, 3, 4), 1), ((5, 2, 3, 4), 5)):
        updates = torch.randn(shape, generator=seeded(0))
        (found,) = module_batches(updates, [RELATIVE])
        assert found.names == tuple(map(str, range(count)))
        assert isinstance(found.updates, torch.Tensor)
        assert torch.equal(found.updates, updates.reshape(count, 2, 3, 4))


def test_modules_of_a_shape_are_together_and_every_one_is_in_one_batch(model: TaskVectors) -> None:
    assert names(model, ABSOLUTE) == [("m0", "m1", "silent", "m2"), ("n0",)]


def test_no_more_numbers_are_held_than_a_limit(model: TaskVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches.MOST_NUMBERS == 2**24
    for limit, found in (
        (24, [("m0", "m1"), ("silent", "m2"), ("n0",)]),
        (25, [("m0", "m1", "silent"), ("n0",), ("m2",)]),
    ):
        monkeypatch.setattr(batches, "MOST_NUMBERS", limit)  # of 12 a module
        assert sorted(names(model, ABSOLUTE)) == sorted(found)


def test_what_one_design_says_nothing_about_is_left_out_with_a_warning(model: TaskVectors) -> None:
    with pytest.warns(UserWarning, match=r"silent\.weight"):
        assert names(model, ABSOLUTE, RELATIVE) == [("m0", "m1", "m2"), ("n0",)]


def test_one_module_alone_is_never_left_out(model: TaskVectors) -> None:
    silent = next(module for module in model if module.name == "silent.weight")
    (found,) = module_batches(silent, [RELATIVE])
    assert found.names == ("silent.weight",)
