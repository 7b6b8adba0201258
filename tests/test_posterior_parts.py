"""What a posterior says of itself: its text, labels, temperature, coordinates and the modules nobody changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    FactorExpert,
    Gaussian,
    InputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    RelativePrecision,
)
from poe_models.posterior import BoundFactor
from tests.helpers import assert_close, random_updates

NAMES = ["a", "b"]


def of(updates: Tensor, modules: tuple[str, ...] = (), coordinates: str = "full") -> Posterior:
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.7), temperature=0.25)
    bound = poe.bind(updates, coordinates=coordinates)  # type: ignore[arg-type]
    return replace(bound, modules=modules)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (("x",), "1 module: x; "),
        (("x", "y", "z"), "3 modules: x, y, z; "),
        (("x", "y", "z", "w"), "4 modules: x, y, z, ...; "),
    ],
)
def test_three_modules_are_named(modules: tuple[str, ...], said: str, generator: torch.Generator) -> None:
    text = repr(of(random_updates(generator, len(modules), 2, 2, 3), modules))
    assert text == f"Posterior({said}full, latents (2, 3), torch.float64; experts a, b; T = 0.25)"


def test_factor_experts_are_named_behind_the_others(generator: torch.Generator) -> None:
    posterior = of(random_updates(generator, 1, 2, 2, 3), ("x",))
    both = replace(posterior, factors=(BoundFactor("loss", lambda z: z.sum((-2, -1)), False),))
    assert "experts a, b, loss;" in repr(both)
    assert not both.joint
    assert replace(both, factors=(*both.factors, BoundFactor("tie", lambda z: z.sum((-3, -2, -1)), True))).joint


def test_a_temperature_that_a_model_draws_is_no_number(generator: torch.Generator) -> None:
    posterior = of(random_updates(generator, 1, 2, 2, 3))
    assert posterior.fixed_temperature == 0.25
    drawn = replace(posterior, temperature=torch.tensor(0.5))
    with pytest.raises(ValueError, match="a tensor is for a Pyro model"):
        _ = drawn.fixed_temperature
    with pytest.raises(ValueError, match="All modules share one temperature"):
        replace(posterior, temperature=torch.tensor([0.5]))


def test_names_are_one_for_each_module(generator: torch.Generator) -> None:
    posterior = of(random_updates(generator, 2, 2, 2, 3))
    with pytest.raises(ValueError, match="1 names for 2 modules"):
        replace(posterior, modules=("x",))
    assert replace(posterior, modules=("x", "y")).label(1) == "'y'"
    assert posterior.label(1) == "module 1 of the batch"


def test_only_a_span_has_coefficients(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    full, span = of(updates), of(updates, coordinates="span")
    assert (full.coordinates, span.coordinates) == ("full", "span")
    z = torch.randn(4, 2, 2, 3, generator=generator, dtype=torch.float64)
    assert full.update(z) is z
    with pytest.raises(ValueError, match="Full coordinates have none"):
        full.coefficients(z)
    assert span.span is not None
    c = torch.tensor([[[0.3, -0.2, 0.0], [1.5, 0.5, 0.0]]], dtype=torch.float64)
    x = span.span.latents(c)
    assert_close(span.coefficients(x), c)
    merged = torch.einsum("smj,mjab->smab", c[..., :2], updates)
    assert_close(span.update(x), merged)
    assert_close(span.energy(x), replace(full, anchor_precision=span.anchor_precision).energy(merged))


def test_a_module_that_nobody_changed_is_undetermined_without_an_anchor(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 2, 3)
    updates[0] = 0.0
    updates[1, 0] = 0.0
    kinds = ((RelativePrecision(0.1), True), (AbsolutePrecision(0.0), True), (AbsolutePrecision(0.1), False))
    for precision, told in kinds:
        poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0), anchor=Anchor(precision=precision))
        assert poe.bind(updates).undetermined.tolist() == [told, False, False]


def test_parts_keep_their_names_and_experts(generator: torch.Generator) -> None:
    updates = random_updates(generator, 4, 2, 2, 3)
    posterior = of(updates, ("w", "x", "y", "z"))
    middle, last = posterior.part(slice(1, 3)), posterior.module(3)
    assert (middle.modules, last.modules) == (("x", "y"), ("z",))
    assert_close(middle.experts[1].update, updates[1:3, 1])
    assert_close(last.anchor_precision, posterior.anchor_precision[3:])
    span = of(updates, ("w", "x", "y", "z"), "span").part(slice(2, 4))
    assert span.modules == ("y", "z")
    z = torch.randn(2, *span.event_shape, generator=generator, dtype=torch.float64)
    whole = torch.zeros(4, *span.event_shape, dtype=torch.float64)
    whole[2:] = z
    assert_close(span.energy(z), of(updates, coordinates="span").energy(whole)[2:])


def test_energies_of_groups_are_of_modules_or_of_all(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    tie = FactorExpert("tie", lambda c: c.sum((-2, -1)), "span", "model")
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.7))
    alone, joint = poe.bind(updates, coordinates="span"), (poe * tie).bind(updates, coordinates="span")
    z = torch.randn(5, 2, *alone.event_shape, generator=generator, dtype=torch.float64)
    assert torch.equal(alone.component_energy(z), alone.energy(z))
    together = joint.component_energy(z)
    assert together.shape == (5, 1)
    assert joint.span is not None
    coefficients = joint.span.coefficients(z).sum((-2, -1))
    assert_close(together[:, 0], alone.energy(z).sum(-1) + coefficients)


def test_latents_are_like_the_first_experts_update(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 1, 2, 3).float()
    posterior = ProductOfExperts.of(["a"], InputGram(), Cauchy()).bind(updates)
    assert posterior.like is posterior.experts[0].update
    assert posterior.dtype == torch.float32
