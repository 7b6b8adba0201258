"""Records of tensors: sliced, joined and mixed field by field; and names of modules in messages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from inference.propriety import require_proper
from poe_models import Cauchy, Operator, ProductOfExperts
from poe_models.records import choose, joined, with_tensors
from poe_models.updates import batch_of
from poe_models.weights.task_vectors import ModuleUpdates


@dataclass(frozen=True, eq=False)
class Sizes:
    name: str
    one: Tensor
    rows: Tensor
    scalar: Tensor


def sizes(name: str, value: float) -> Sizes:
    return Sizes(name, torch.full((2,), value), torch.full((2, 3), 10 * value), torch.tensor(value))


def test_records_are_sliced_joined_and_mixed_field_by_field() -> None:
    one, other = sizes("one", 1.0), sizes("other", 2.0)
    some = with_tensors(lambda value: value[:1], one)
    assert (some.name, some.one.shape, some.rows.shape, float(some.scalar)) == ("one", (1,), (1, 3), 1.0)
    both = joined(one, other)
    assert (both.name, both.one.tolist(), both.rows.shape) == ("one", [1.0, 1.0, 2.0, 2.0], (4, 3))
    mixed = choose(torch.tensor([True, False]), one, other)
    assert mixed.one.tolist() == [1.0, 2.0]
    assert mixed.rows.tolist() == [[10.0] * 3, [20.0] * 3]


def test_a_record_without_tensors_is_itself() -> None:
    energy = Cauchy(2.0)
    assert with_tensors(lambda value: value[:1], energy) is energy


def test_an_operator_that_is_no_dataclass_is_not_left_whole() -> None:
    with pytest.raises(TypeError, match="dataclass"):
        Operator.module(object(), slice(0, 1))  # type: ignore[arg-type]


def test_messages_name_modules_that_have_names(generator: torch.Generator) -> None:
    updates = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    posterior = ProductOfExperts.of(["a", "b"]).bind(updates)
    assert [posterior.label(i) for i in range(2)] == ["module 0 of the batch", "module 1 of the batch"]
    named = replace(posterior, modules=("q", "k"), anchor_precision=torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert named.label(1) == "'k'"
    with pytest.raises(ValueError, match="the posterior of 'k' has no anchor"):
        require_proper(named)
    assert replace(posterior, modules=()).label(1) == "module 1 of the batch"


def test_updates_that_are_not_finite_are_named(generator: torch.Generator) -> None:
    updates = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    good, bad = (ModuleUpdates(name, name, ("a", "b"), torch.zeros(3, 4), updates.clone()) for name in ("q", "k"))
    bad.updates[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"of 'b' \('k'\) has NaN"):
        batch_of(ProductOfExperts.of(["a", "b"]), [good, bad])
