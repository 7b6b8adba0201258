from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference.chains import majoriser_draws, mode_of, overdispersed_starts
from inference.draws import Draws
from inference.gibbs import gibbs
from inference.slice import DEGREES, Reference, init, latents, slice_sample, states, step
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    FactorExpert,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    StudentT,
    Welsch,
    average,
    log_density,
    span_statistics,
)
from poe_models.program import log_constant
from tests.helpers import ENERGIES, MAPS, assert_close, name_of, random_updates
from tests.sampling import DoesNotMix, IsBiased, assert_same_mean, gaussian_means, grid_means
from tests.seeds import seeded

SKEWED = ProductOfExperts.of(
    ["a", "b"],
    InputGram(),
    Cauchy(),
    Relative(0.3),
    [1.0, 2.0],
    Anchor(precision=RelativePrecision(0.05)),
    temperature=0.5,
)
"""Two experts that disagree: skewness 1.5 and kurtosis 6 along one coordinate."""
TIE = FactorExpert(
    "tie", lambda c: 3.0 * (c[..., 0, 0] - c[..., 1, 1] - 1.0).square(), coordinates="span", scope="model"
)


def span_of(poe: ProductOfExperts, updates: Tensor) -> Posterior:
    return poe.bind(span_statistics(poe, updates))


def seen_of(posterior: Posterior) -> list[int]:
    """Coordinates that some expert sees, of a posterior of one module."""
    lengths = torch.stack([expert.update[0, :, 0].abs() for expert in posterior.experts]).sum(0)
    return (lengths > 1e-9).nonzero().flatten().tolist()


def sample(posterior: Posterior, generator: torch.Generator) -> Draws:
    """Draws of many short chains, which cost hardly more than few."""
    return slice_sample(posterior, 300, chains=16, warmup=120, generator=generator)


def agree(posterior: Posterior, draws: Draws | Tensor, truth: Draws | Tensor | dict[str, Tensor]) -> None:
    """The shared comparison, with the R-hat that 16 short chains of one distribution have."""
    assert_same_mean(posterior, draws, truth, max_rhat=1.04)


def by_gibbs(posterior: Posterior, generator: torch.Generator) -> Draws:
    return gibbs(posterior, 300, chains=16, warmup=50, generator=generator)


# The sampler against exact answers


@pytest.mark.parametrize("residual_map", [InputGram(), (OutputGram(), InputGram())], ids=name_of)
def test_gaussian_experts_have_closed_forms(residual_map: object, generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    updates[2] *= 30  # modules of very different size in one batch
    poe = ProductOfExperts.of(["a", "b"], residual_map, Gaussian(), Relative(0.4), temperature=0.7)  # type: ignore[arg-type]
    posterior = span_of(poe, updates)
    draws = sample(posterior, generator)
    agree(posterior, draws, gaussian_means(posterior))
    assert not bool(draws.stats["stuck"].any())


@pytest.mark.parametrize(
    ("energy", "temperature"),
    [
        (StudentT(4.0), 0.3),
        (Cauchy(), 0.5),
        (Cauchy(), 4.0),
        (StudentT(2.0), 0.5),
        (Huber(0.5), 0.3),
        (Welsch(), 4.0),
        (GeneralizedGaussian(1.0), 0.5),
        (GeneralizedGaussian(4.0), 4.0),
    ],
    ids=name_of,
)
def test_a_grid_agrees_on_a_skewed_posterior(energy: Energy, temperature: float, generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), energy, Relative(0.3), [1.0, 2.0], SKEWED.anchor, temperature=temperature
    )
    posterior = span_of(poe, random_updates(generator, 1, 2, 2, 3))
    draws = sample(posterior, generator)
    agree(posterior, draws, grid_means(posterior, seen_of(posterior)))
    if isinstance(energy, Cauchy) and temperature == 0.5:
        centred = draws.values - draws.values.mean((0, 1))
        skewness = (centred**3).mean((0, 1)) / (centred**2).mean((0, 1)) ** 1.5
        assert float(skewness.abs().max()) > 0.5  # or a wrong sign would go unnoticed


def test_gibbs_agrees_on_many_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 4, 5)
    posterior = span_of(ProductOfExperts.of(list("abc"), InputGram(), StudentT(3.0, exponent=4.0)), updates)
    exact = by_gibbs(posterior, generator)
    draws = sample(posterior, generator)
    agree(posterior, draws, exact)
    hotter = dataclasses.replace(posterior, temperature=1.2)
    with pytest.raises(IsBiased):
        agree(posterior, sample(hotter, generator), exact)


def test_full_coordinates(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    poe = ProductOfExperts.of(["a", "b"], (OutputGram(), InputGram()), Gaussian(), Relative(0.5), temperature=0.4)
    posterior = poe.bind(updates)
    agree(posterior, sample(posterior, generator), gaussian_means(posterior))
    heavy = ProductOfExperts.of(["a", "b"], InputGram(), StudentT(3.0), temperature=0.4).bind(updates)
    exact = by_gibbs(heavy, generator)
    agree(heavy, sample(heavy, generator), exact)


def test_no_anchor_where_the_experts_hold_every_direction(generator: torch.Generator) -> None:
    anchor = Anchor(precision=AbsolutePrecision(0.0))
    updates = random_updates(generator, 1, 2, 1, 2)
    light = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), anchor=anchor).bind(updates)
    agree(light, sample(light, generator), gaussian_means(light))
    heavy = ProductOfExperts.of(["a", "b"], Identity(), Cauchy(4.0), anchor=anchor).bind(updates)
    exact = by_gibbs(heavy, generator)
    agree(heavy, sample(heavy, generator), exact)


def test_a_batch_of_modules_is_its_modules_alone(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    updates[1] *= 0.05
    draws = sample(span_of(SKEWED, updates), generator)
    for module in range(2):
        alone = span_of(SKEWED, updates[module : module + 1])
        other = sample(alone, generator)
        agree(alone, draws.values[:, :, module : module + 1], other)


def test_an_expert_without_an_update_says_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 3)
    updates[:, 1] = 0
    with_silent = ProductOfExperts.of(list("abc"), InputGram(), Cauchy(), Absolute(1.0), anchor=Anchor(average))
    posterior = span_of(with_silent, updates)
    assert not bool(posterior.experts[1].active.any())
    exact = by_gibbs(posterior, generator)
    speaking = dataclasses.replace(posterior, experts=(posterior.experts[0], posterior.experts[2]))
    agree(speaking, sample(posterior, generator), exact)


def test_a_factor_expert_that_couples_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.5), temperature=0.5)
    ridge = FactorExpert("ridge", lambda c: c.square().sum(-1), coordinates="span")
    posterior = span_of(poe * TIE * ridge, updates)
    truth, untied = gaussian_means(posterior), gaussian_means(span_of(poe * ridge, updates))
    assert float((truth["x"] - untied["x"]).abs().max()) > 0.1
    draws = sample(posterior, generator)
    agree(posterior, draws, truth)
    with pytest.raises(IsBiased):
        agree(posterior, draws, untied)
    # One ellipse: both modules have the same statistics, those of the joint density.
    assert_close(draws.stats["lp"], -posterior.joint_energy(draws.values).unsqueeze(-1) / 0.5, 1e-12)
    assert bool((draws.stats["evaluations"][..., 0] == draws.stats["evaluations"][..., 1]).all())
    assert states(posterior, draws.values).shape == (16, 300, 1, 6)
    assert torch.equal(latents(posterior, states(posterior, draws.values)), draws.values)


def test_the_fit_reaches_a_posterior_that_is_nothing_like_its_mode(generator: torch.Generator) -> None:
    """On a kink the MAP's curvature is without bound, and the majoriser's Gaussian far too narrow."""
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), GeneralizedGaussian(1.0), Relative(0.3), [1.0, 2.0], SKEWED.anchor, temperature=0.5
    )
    posterior = span_of(poe, random_updates(generator, 1, 2, 2, 3))
    reference = Reference.majoriser(posterior, mode_of(posterior))
    unfitted = chain(posterior, reference, generator, num_samples=300)
    with pytest.raises(DoesNotMix):
        agree(posterior, unfitted, grid_means(posterior, seen_of(posterior)))
    agree(posterior, sample(posterior, generator), grid_means(posterior, seen_of(posterior)))


# Samplers that are wrong on purpose


def chain(posterior: Posterior, reference: Reference, generator: torch.Generator, num_samples: int = 500) -> Tensor:
    """Draws of 16 chains of single steps with a reference that stays as it is."""
    state = init(torch.randn(16, 1, 3, generator=generator, dtype=torch.float64), posterior)
    positions = []
    for _ in range(num_samples + 100):
        state, _ = step(state, posterior, reference, generator)
        positions.append(state.position)
    return latents(posterior, torch.stack(positions[100:], 1))


@pytest.fixture
def skewed(generator: torch.Generator) -> Posterior:
    """One module, in units in which its standard deviations are between 1 and 3."""
    anchor = Anchor(precision=AbsolutePrecision(0.05))
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), Absolute(1.0), anchor=anchor)
    return span_of(poe, 0.7 * random_updates(generator, 1, 2, 2, 3))


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
    draws = chain(skewed, wrong(plain.center, plain.root), generator)
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


# The parts


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


# The interface


def test_statistics_shapes_and_single_precision(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    posterior = span_of(SKEWED, updates)
    draws = slice_sample(posterior, 30, chains=5, warmup=60, thin=2, generator=generator)
    assert draws.values.shape == (5, 30, 2, 3, 1)
    assert draws.values.dtype == torch.float64
    assert set(draws.stats) == {"lp", "evaluations", "stuck"}
    assert all(value.shape == (5, 30, 2) for value in draws.stats.values())
    assert_close(draws.stats["lp"], -posterior.energy(draws.values) / posterior.temperature, 1e-12)
    assert int(draws.stats["evaluations"].min()) >= 1
    assert draws.stats["stuck"].dtype == torch.bool
    poe = ProductOfExperts.of(["a", "b"], OutputGram(), Gaussian(), Relative(0.5))
    exact, rough = (poe.bind(each) for each in (updates, updates.float()))
    single = slice_sample(rough, 10, generator=generator)
    assert single.values.dtype == torch.float64
    assert_close(single.stats["lp"], -exact.energy(single.values), 1e-4)


def test_the_generator_decides_everything(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED, random_updates(generator, 2, 2, 3, 4))
    before = torch.random.get_rng_state()
    first, same, other = (slice_sample(posterior, 20, warmup=60, generator=seeded(seed)).values for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_reports_progress_and_can_be_interrupted(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED, random_updates(generator, 1, 2, 3, 4))
    seen: list[tuple[int, int]] = []
    slice_sample(posterior, 5, thin=3, warmup=40, generator=generator, progress=lambda *count: seen.append(count))
    assert seen == [(i, 55) for i in range(1, 56)]

    def stop(count: int, total: int) -> None:
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slice_sample(posterior, 5, generator=generator, progress=stop)
    assert slice_sample(posterior, 5, warmup=0, generator=generator).num_draws == 5


def test_starts_lie_around_the_map_and_every_task_vector(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.4), temperature=0.3)
    posterior = span_of(poe, updates)
    starts = overdispersed_starts(posterior, mode_of(posterior), 1500, generator)
    truth = gaussian_means(posterior)
    spread = (truth["x^2"] - truth["x"].square()).sqrt().view(2, 3, 1)
    centers = [truth["x"].view(2, 3, 1), *(expert.update for expert in posterior.experts)]
    for i, center in enumerate(centers):
        points = starts[i::3]
        assert bool(((points.mean(0) - center).abs() < 5 * 2 * spread / 500**0.5).all())
        assert bool(((points.std(0) / (2 * spread) - 1).abs() < 0.2).all())


def test_bad_settings_are_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    posterior = span_of(SKEWED, updates)
    for settings in ({"chains": 0}, {"warmup": -1}, {"thin": 0}):
        name, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=f"slice_sample.*{name}={value}.*one chain"):
            slice_sample(posterior, 10, generator=generator, **settings)
    nowhere = FactorExpert("nowhere", lambda c: c.sum(-1) / 0.0, coordinates="span")
    with pytest.raises(ValueError, match="group 0 .* not finite where chain 0 starts"):
        init(torch.ones(1, 2, 3, dtype=torch.float64), span_of(SKEWED * nowhere, updates))
    improper = ProductOfExperts.of(["a", "b"], energy=Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="improper"):
        slice_sample(improper.bind(updates), 10, generator=generator)
    wide = ProductOfExperts.of(["a", "b"]).bind(random_updates(generator, 1, 2, 45, 50))
    with pytest.raises(ValueError, match="2250 coordinates .* Span"):
        slice_sample(wide, 10, generator=generator)
