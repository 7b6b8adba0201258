"""Any reference of the slice sampler is exact, and wrong ones are caught."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference.chains import majoriser_draws, mode_of
from inference.slice import DEGREES, Reference, init, latents, states, step
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    FactorExpert,
    Gaussian,
    InputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    average,
    log_density,
    span_statistics,
)
from poe_models.program import log_constant
from tests.helpers import ENERGIES, MAPS, assert_close, name_of, random_updates
from tests.sampling import DoesNotMix, IsBiased, grid_means
from tests.slice_targets import SKEWED, TIE, agree, chain, span_of


@pytest.fixture
def skewed() -> Posterior:
    """One module, in units in which its standard deviations are between 1 and 3; the same one at every seed."""
    anchor = Anchor(precision=AbsolutePrecision(0.05))
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), Absolute(1.0), anchor=anchor)
    return span_of(poe, 0.7 * random_updates(torch.Generator().manual_seed(20261122), 1, 2, 2, 3))


@pytest.fixture
def plain() -> Reference:
    """About the origin, twice as wide as a standard normal: not the posterior's own."""
    return Reference(torch.zeros(1, 3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64).unsqueeze(0))


class WithoutCorrection(Reference):
    """The reference is counted as if it were part of the posterior."""

    def log_density(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y[..., 0])


class OneDimensionTooMany(Reference):
    """The ellipses are those of a t, the correction that of a t in one more dimension."""

    def log_density(self, y: Tensor) -> Tensor:
        return Reference.log_density(self, y) - 0.5 * torch.log1p(y.square().sum(-1) / DEGREES)


class ForgetfulScale(Reference):
    """The scale is drawn without regard to the position."""

    def scale(self, y: Tensor, generator: torch.Generator) -> Tensor:
        return Reference.scale(self, torch.zeros_like(y), generator)


def a_level_without_its_uniform(log_ratio: Tensor, generator: torch.Generator) -> Tensor:
    return log_ratio - 0.2


def a_level_that_is_too_low(log_ratio: Tensor, generator: torch.Generator) -> Tensor:
    return log_ratio + 2 * torch.rand(log_ratio.shape, generator=generator, dtype=torch.float64).log()


def test_any_reference_is_exact(skewed: Posterior, plain: Reference, generator: torch.Generator) -> None:
    truth = grid_means(skewed, [1, 2])
    agree(skewed, chain(skewed, plain, generator), truth)
    odd = Reference(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), 2 * plain.root)
    agree(skewed, chain(skewed, odd, generator, num_samples=900), truth)


@pytest.mark.parametrize("wrong", [WithoutCorrection, OneDimensionTooMany, ForgetfulScale])
def test_the_helper_catches_a_wrong_reference(
    wrong: type[Reference], skewed: Posterior, plain: Reference, generator: torch.Generator
) -> None:
    draws = chain(skewed, wrong(plain.center, plain.root), generator, chains=48)
    with pytest.raises((IsBiased, DoesNotMix)):  # some wrong chains stick before their bias shows
        agree(skewed, draws, grid_means(skewed, [1, 2]))


@pytest.mark.parametrize("wrong", [a_level_without_its_uniform, a_level_that_is_too_low])
def test_the_helper_catches_a_wrong_level(
    wrong: Callable[[Tensor, torch.Generator], Tensor],
    skewed: Posterior,
    plain: Reference,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["inference.slice"], "height", wrong)
    draws = chain(skewed, plain, generator)
    with pytest.raises((IsBiased, DoesNotMix)):  # a chain that only climbs stays where it is
        agree(skewed, draws, grid_means(skewed, [1, 2]))


def test_the_helper_catches_another_target(skewed: Posterior, plain: Reference, generator: torch.Generator) -> None:
    truth = grid_means(skewed, [1, 2])
    with pytest.raises(IsBiased):
        agree(skewed, chain(dataclasses.replace(skewed, temperature=1.2), plain, generator), truth)
    draws = chain(skewed, plain, generator)
    with pytest.raises(IsBiased):
        agree(skewed, 2 * draws.mean((0, 1)) - draws, truth)  # mirrored at the mean
    with pytest.raises(DoesNotMix):
        agree(skewed, draws[:, :20], truth)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_the_density_is_the_programs(residual_map: object, energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 3, 4)
    poe = ProductOfExperts.of(list("abc"), residual_map, energy, Relative(0.8), anchor=Anchor(average), temperature=0.7)  # type: ignore[arg-type]
    for posterior in (poe.bind(updates), span_of(poe, updates)):
        z = torch.randn(5, 2, *posterior.event_shape, generator=generator, dtype=torch.float64)
        value = init(states(posterior, z), posterior).log_density
        assert_close(value + log_constant(posterior), log_density(posterior)(z), 1e-12)


def test_the_density_of_coupled_modules_is_the_programs(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED * TIE, random_updates(generator, 2, 2, 3, 4))
    z = torch.randn(5, 2, 3, 1, generator=generator, dtype=torch.float64)
    value = init(states(posterior, z), posterior).log_density
    assert value.shape == (5, 1)
    assert_close(value.squeeze(-1) + log_constant(posterior).sum(), log_density(posterior, joint=True)(z), 1e-12)


def test_the_first_reference_is_the_majorisers_gaussian(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    for poe in (SKEWED, SKEWED * TIE):
        posterior = span_of(poe, updates)
        mode = mode_of(posterior)
        weights = posterior.weights(posterior.residuals(mode))
        grams = torch.stack([expert.operator.gram for expert in posterior.experts], 1)  # type: ignore[attr-defined]
        precision = (weights[..., None, None] * grams).sum(1)
        precision = precision + posterior.anchor_precision[:, None, None] * torch.eye(3, dtype=torch.float64)
        covariance = posterior.temperature / 2 * torch.linalg.inv(precision)
        expected = torch.block_diag(*covariance).unsqueeze(0) if posterior.joint else covariance
        reference = Reference.majoriser(posterior, mode)
        assert_close(reference.root @ reference.root.mT, expected, 1e-10)
        assert torch.equal(reference.root, reference.root.tril())
        assert_close(reference.center, states(posterior, mode), 1e-12)
    full = SKEWED.bind(updates)  # directions that only the anchor holds are left out of the factorisation
    root = Reference.majoriser(full, mode_of(full)).root
    noise = torch.randn(20000, 2, 2, 3, generator=generator, dtype=torch.float64)
    draws = majoriser_draws(full, mode_of(full), noise).flatten(2)
    variance = (root @ root.mT).diagonal(dim1=-2, dim2=-1)
    assert bool(((draws.square().mean(0) / variance - 1).abs() < 5 * (2 / 20000) ** 0.5).all())


def test_scale_and_density_of_the_reference_belong_together(generator: torch.Generator) -> None:
    """A standard normal times the root of a scale given nothing is a t, and its given scale leaves it one."""
    size = 2
    reference = Reference(torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64).unsqueeze(0))
    normal = torch.randn(200_000, 1, size, generator=generator, dtype=torch.float64)
    chi_squared = 2 * torch._standard_gamma(torch.full((200_000, 1, 1), DEGREES / 2).double(), generator=generator)
    y = normal * (DEGREES / chi_squared).sqrt()
    again = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    again = again * reference.scale(y, generator).sqrt().unsqueeze(-1)
    # In two dimensions the t with df degrees has P(|y|^2 > r) = (1 + r / df)^(-df / 2).
    for draws in (y, again):
        share = (draws.square().sum(-1) > 3.0).double().mean()
        expected = (1 + 3.0 / DEGREES) ** (-DEGREES / 2)
        assert abs(float(share) - expected) < 5 * math.sqrt(expected * (1 - expected) / 200_000)
    radius = torch.linspace(0, 400, 400_001, dtype=torch.float64)
    points = torch.stack([radius, torch.zeros_like(radius)], -1).unsqueeze(-2)
    density = reference.log_density(points).squeeze(-1).exp()
    assert float(torch.trapezoid(density * radius, radius)) == pytest.approx(1.0, rel=1e-4)  # df / df: its constant


def test_a_fit_is_the_mean_and_covariance_with_pseudo_draws(generator: torch.Generator) -> None:
    root = torch.tensor([[[1e-3, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 2.0, 40.0]]], dtype=torch.float64)
    reference = Reference(torch.ones(1, 3, dtype=torch.float64), root)
    draws = 5.0 + torch.randn(50, 1, 3, generator=generator, dtype=torch.float64)
    fitted = reference.fitted(draws)
    mean = draws.mean(0)
    scatter = torch.einsum("ngi,ngj->gij", draws - mean, draws - mean)
    assert_close(fitted.center, mean, 1e-10)
    assert_close(fitted.root @ fitted.root.mT, (scatter + 3 * root @ root.mT) / 53, 1e-9)
    few = reference.fitted(draws[:1])  # fewer draws than dimensions
    assert bool(few.root.isfinite().all())


def test_a_bracket_that_shrinks_to_nothing_leaves_the_chain_where_it_is(
    skewed: Posterior, plain: Reference, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = init(torch.randn(4, 1, 3, generator=generator, dtype=torch.float64), skewed)
    monkeypatch.setattr(sys.modules["inference.slice"], "height", lambda ratio, _: torch.full_like(ratio, math.inf))
    after, info = step(state, skewed, plain, generator)
    assert torch.equal(after.position, state.position)
    assert torch.equal(after.log_density, state.log_density)
    assert bool(info.stuck.all())
    assert bool((info.evaluations == 100).all())


def test_energies_that_are_not_a_number_are_never_taken(generator: torch.Generator) -> None:
    wall = FactorExpert("wall", lambda c: torch.where(c[..., 0] > 0.2, torch.nan, 0.0), coordinates="span")
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Absolute(1.0))
    updates = 0.1 * random_updates(generator, 1, 2, 2, 3)
    statistics = span_statistics(poe, updates)
    posterior = (poe * wall).bind(statistics)
    coordinates = posterior.span
    plain = Reference(torch.zeros(1, 3).double(), 0.3 * torch.eye(3).double().unsqueeze(0))
    state = init(torch.zeros(8, 1, 3, dtype=torch.float64), posterior)
    refused = 0
    for _ in range(200):
        state, info = step(state, posterior, plain, generator)
        refused += int((info.evaluations > 1).sum())
        assert bool((coordinates.coefficients(latents(posterior, state.position))[..., 0] <= 0.2).all())
    assert refused > 0
