"""Checks of the hierarchical model's settings, one by one at their edges."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch

from inference.hierarchical.requirements import check_anchor, check_energies, check_mixtures, check_scales, shared_prior
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
    Cauchy,
    Energy,
    Expert,
    Gaussian,
    Identity,
    NormScaled,
    ProductOfExperts,
    Relative,
    Scale,
    StudentT,
    Welsch,
)
from tests.helpers import random_updates

STUDENT = StudentT(3.0, exponent="multivariate")


def product(energies: list[Energy], scales: list[Scale], importance: float = 1.0, temperature: float = 1.0) -> Any:
    pairs = zip("abc", energies, scales, strict=False)
    experts = tuple(Expert(name, Identity(), energy, scale, importance) for name, energy, scale in pairs)
    return ProductOfExperts(experts, temperature=temperature)


@pytest.mark.parametrize("size", [(), (3,), (2, 4)])
def test_a_scalar_prior_is_expanded_to_one_event(size: tuple[int, ...]) -> None:
    found = shared_prior("gamma", dist.LogNormal(torch.tensor(0.0), torch.tensor(2.0)), size)
    assert (tuple(found.batch_shape), tuple(found.event_shape)) == ((), size)
    one = dist.LogNormal(0.0, 2.0).log_prob(torch.tensor(1.7))
    torch.testing.assert_close(found.log_prob(torch.full(size, 1.7)), one * max(1, torch.Size(size).numel()))


def test_priors_of_other_shapes_or_on_negative_numbers_are_refused() -> None:
    for prior in (dist.LogNormal(torch.zeros(2), 1.0), dist.LogNormal(torch.zeros(2), 1.0).to_event(1)):
        with pytest.raises(ValueError, match="Give a scalar distribution"):
            shared_prior("nu", prior, ())
    for prior in (dist.Normal(0.0, 1.0), dist.Uniform(-1.2, 5.0)):
        with pytest.raises(ValueError, match="allows negative values"):
            shared_prior("nu", prior, ())
    shared_prior("nu", dist.Uniform(0.5, 5.0), ())


def test_degrees_of_freedom_are_of_all_experts_or_of_none() -> None:
    one = [Absolute(1.0)] * 3
    assert check_energies(product([STUDENT] * 3, one)) is True
    assert check_energies(product([Gaussian()] * 3, one)) is False
    assert check_energies(product([Cauchy()] * 3, one)) is False
    with pytest.raises(ValueError, match="'a' has degrees of freedom and 'b' .* has none"):
        check_energies(product([STUDENT, Gaussian(), STUDENT], one))
    with pytest.raises(ValueError, match="'c' has degrees of freedom and 'a' .* has none"):
        check_energies(product([Cauchy(), Gaussian(), STUDENT], one))
    with pytest.raises(ValueError, match=r"Set exponent='multivariate'"):
        check_energies(product([StudentT(3.0)], one))


@pytest.mark.parametrize(
    ("importance", "temperature", "fine"), [(1, 1, True), (2, 2, True), (3, 2, True), (1, 2, False)]
)
def test_a_power_below_one_is_refused(importance: float, temperature: float, fine: bool) -> None:
    poe = product([STUDENT], [Absolute(1.0)], importance, temperature)
    if fine:
        assert check_energies(poe)
        return
    with pytest.raises(ValueError, match="importance 1 at temperature 2"):
        check_energies(poe)


def test_mixtures_are_what_can_be_integrated_out() -> None:
    check_mixtures(product([STUDENT, Gaussian()], [Absolute(1.0)] * 2))
    with pytest.raises(ValueError, match="'b' has the energy Welsch"):
        check_mixtures(product([STUDENT, Welsch()], [Absolute(1.0)] * 2))


@pytest.mark.parametrize(
    ("scale", "power"), [(Absolute(0.5), 2), (Balanced(0.5), 2), (Relative(0.5), 2), (NormScaled(0.5), 1)]
)
def test_powers_of_gamma(scale: Scale, power: int) -> None:
    assert check_scales(product([Gaussian()] * 2, [scale] * 2), "model") == (power, [0.5, 0.5])


def test_scales_of_one_kind_are_wanted() -> None:
    different = product([Gaussian()] * 2, [Relative(0.5), Relative(0.7)])
    assert check_scales(different, "expert") == (2, [0.5, 0.7])
    for shared in ("model", "module"):
        with pytest.raises(ValueError, match=r"which differ \(0.5, 0.7\)"):
            check_scales(different, shared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have scales Absolute, Relative"):
        check_scales(product([Gaussian()] * 2, [Relative(0.5), Absolute(0.5)]), "expert")

    class Own(Absolute):
        pass

    with pytest.raises(ValueError, match="have scales Own"):
        check_scales(product([Gaussian()], [Own(0.5)]), "expert")
    with pytest.raises(ValueError, match=r"shared='layer'"):
        check_scales(different, "layer")  # type: ignore[arg-type]


def test_modules_without_an_anchor_are_named(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 1, 3, 4)
    one, none = (
        ProductOfExperts.of(["a"], anchor=Anchor(None, AbsolutePrecision(eta))).bind(updates) for eta in (1.0, 0.0)
    )
    check_anchor([one, one], ["k", "l", "m", "n"])
    with pytest.raises(ValueError, match="modules m, n have no anchor"):
        check_anchor([one, none], ["k", "l", "m", "n"])
    with pytest.raises(ValueError, match="there are no modules"):
        check_anchor([], [])
