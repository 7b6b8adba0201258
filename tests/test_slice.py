"""The slice sampler against closed forms, grids and Gibbs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inference.chains import mode_of, overdispersed_starts
from inference.draws import Draws
from inference.gibbs import gibbs
from inference.slice import Reference, init, latents, slice_sample, states
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
    StudentT,
    Welsch,
    average,
)
from tests.helpers import assert_close, name_of, random_updates
from tests.sampling import DoesNotMix, IsBiased, gaussian_means, grid_means
from tests.seeds import seeded
from tests.slice_targets import SKEWED, TIE, agree, chain, span_of


def seen_of(posterior: Posterior) -> list[int]:
    """Coordinates that some expert sees, of a posterior of one module."""
    lengths = torch.stack([expert.update[0, :, 0].abs() for expert in posterior.experts]).sum(0)
    return (lengths > 1e-9).nonzero().flatten().tolist()


def sample(posterior: Posterior, generator: torch.Generator) -> Draws:
    """Draws of many short chains, which cost hardly more than few."""
    return slice_sample(posterior, 300, chains=16, warmup=120, generator=generator)


def by_gibbs(posterior: Posterior, generator: torch.Generator) -> Draws:
    return gibbs(posterior, 300, chains=16, warmup=50, generator=generator)


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
    with pytest.raises(ValueError, match="component 0 .* not finite where chain 0 starts"):
        init(torch.ones(1, 2, 3, dtype=torch.float64), span_of(SKEWED * nowhere, updates))
    improper = ProductOfExperts.of(["a", "b"], energy=Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="improper"):
        slice_sample(improper.bind(updates), 10, generator=generator)
    wide = ProductOfExperts.of(["a", "b"]).bind(random_updates(generator, 1, 2, 45, 50))
    with pytest.raises(ValueError, match="2250 coordinates .* Span"):
        slice_sample(wide, 10, generator=generator)
