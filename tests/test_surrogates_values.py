"""What surrogates are told and refused, and the centre of an anchor beside a base that is not zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diagnostics.tails import Surrogates, fit_sizes, surrogate_residuals
from inference.map import fixed_point
from inference.models.design import Design
from poe_models import (
    Average,
    Cauchy,
    InputGram,
    ModuleUpdates,
    ProductOfExperts,
    Relative,
    TaskVectors,
    Ties,
)
from poe_models.methods import AdaMerging
from tests.seeds import seeded

NAMES = ("a", "b", "c")
SHAPES = {"one.weight": (5, 4), "two.weight": (3, 6), "three.weight": (4, 4)}


def vectors_of(moved: bool = True) -> TaskVectors:
    g = seeded(2)

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}

    base = {**drawn(), "bias": torch.zeros(3, dtype=torch.float64)}
    experts = {
        name: {**(drawn() if moved else base), "bias": torch.full((3,), 1.0 + i)} for i, name in enumerate(NAMES)
    }
    return TaskVectors(base, experts, dtype=torch.float64)


def seen(surrogates: Surrogates) -> list[list[float]]:
    return [each.values("raw").tolist() for each in surrogates.residuals]


def test_a_checkpoint_as_the_centre_is_taken_from_the_base() -> None:
    given = vectors_of()
    center = given.experts["b"]
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(1.0))
    found = surrogate_residuals(given, Design(poe, center=center), num_surrogates=1)

    def by_hand(module: ModuleUpdates) -> Tensor:
        z0 = center.read(module.tensor) - given.base.read(module.tensor)
        around = replace(poe, anchor=replace(poe.anchor, center=z0.unsqueeze(0)))
        return fixed_point(around.bind(module)).value[0]

    expected = surrogate_residuals(given, by_hand, poe, num_surrogates=1)
    np.testing.assert_allclose(seen(found), seen(expected), rtol=1e-9)


@pytest.mark.parametrize("prepared", [False, True])
def test_what_a_method_knows_is_said(prepared: bool) -> None:
    method = Ties().prepare(vectors_of()) if prepared else AdaMerging()
    said = r"\(it has seen it\)" if prepared else r"\(it learns from data\)"
    with pytest.raises(ValueError, match=said):
        surrogate_residuals(vectors_of(), method, InputGram(), num_surrogates=1)


def test_the_spread_of_rows_is_the_median_of_experts_and_modules() -> None:
    given = vectors_of()
    spreads = torch.cat([fit_sizes(module.updates).row_spread for module in given])
    assert len(spreads) == 9
    found = surrogate_residuals(given, Average(), InputGram(), num_surrogates=1)
    assert found.row_spread == pytest.approx(float(spreads.median()))
    assert (found.sizes, found.notes) == ("own", ())
    nothing = surrogate_residuals(vectors_of(moved=False), Average(), InputGram(), num_surrogates=2)
    assert (nothing.row_spread, len(nothing.residuals)) == (0.0, 2)


class Told:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.advances: list[tuple[int, int]] = []

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self.stages.append((stage, modules, nbytes))

    def advance(self, modules: int, nbytes: int) -> None:
        self.advances.append((modules, nbytes))


def test_progress_counts_tensors_and_bytes() -> None:
    told, sizes = Told(), [8 * a * b for a, b in SHAPES.values()]
    surrogate_residuals(vectors_of(), Ties(), InputGram(), num_surrogates=2, progress=told)
    assert told.stages[-1] == ("2 Gaussian surrogates", 3, sum(sizes))
    assert told.stages[:-1] == [("surrogate 1 as a whole", 3, 0), ("surrogate 2 as a whole", 3, 0)]
    assert sorted(told.advances) == sorted((1, size) for size in sizes)


def test_seed_and_number_are_what_was_asked_for() -> None:
    given = vectors_of()
    one, two = (surrogate_residuals(given, Average(), InputGram(), num_surrogates=n) for n in (1, 2))
    assert seen(two)[0] == seen(one)[0]
    assert seen(surrogate_residuals(given, Average(), InputGram(), num_surrogates=1, seed=0)) == seen(one)
    assert seen(surrogate_residuals(given, Average(), InputGram(), num_surrogates=1, seed=1)) != seen(one)
