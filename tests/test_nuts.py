from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from inference.gibbs import gibbs
from inference.nuts import nuts
from inference.slice import slice_sample
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    FactorExpert,
    Gaussian,
    Identity,
    InputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    Welsch,
    span_statistics,
)
from tests.helpers import assert_close, random_updates
from tests.sampling import IsBiased, assert_same_mean, gaussian_means, grid_means
from tests.seeds import seeded

GAUSSIAN = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.5), temperature=0.5)


def span_of(poe: ProductOfExperts, updates: Tensor) -> Posterior:
    return poe.bind(span_statistics(poe, updates))


def test_nuts_gibbs_slice_sampling_and_a_grid_agree_on_a_skewed_posterior(generator: torch.Generator) -> None:
    anchor = Anchor(precision=RelativePrecision(0.1))
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), Relative(0.6), [1.0, 2.0], anchor)
    posterior = poe.bind(span_statistics(poe, random_updates(generator, 1, 2, 2, 3)))
    coordinates = posterior.span
    by_nuts = nuts(posterior, 250, chains=2, warmup=100, generator=generator)
    active = coordinates.transform[0].abs().sum(0).nonzero().flatten().tolist()
    assert_same_mean(posterior, by_nuts, grid_means(posterior, active), min_ess=80, max_rhat=1.05)
    by_slices = slice_sample(posterior, 1000, generator=generator)
    assert_same_mean(posterior, by_nuts, by_slices, min_ess=80, max_rhat=1.05)
    by_gibbs = gibbs(posterior, 1000, generator=generator)
    assert_same_mean(posterior, by_nuts, by_gibbs, min_ess=80, max_rhat=1.05)
    assert_same_mean(posterior, by_slices, by_gibbs)
    colder = gibbs(dataclasses.replace(posterior, temperature=0.7), 1000, generator=generator)
    with pytest.raises(IsBiased):
        assert_same_mean(posterior, by_slices, colder)


def test_nuts_draws_merged_updates_of_float32_themselves(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 2, 2).float()
    draws = nuts(GAUSSIAN.bind(updates), 250, chains=2, warmup=100, generator=generator)
    exact = GAUSSIAN.bind(updates.double())
    assert_same_mean(exact, draws, gaussian_means(exact), min_ess=80, max_rhat=1.05)


def test_nuts_on_modules_that_a_factor_expert_couples(generator: torch.Generator) -> None:
    tie = FactorExpert(
        "tie", lambda c: 3.0 * (c[..., 0, 0] - c[..., 1, 1] - 1.0).square(), coordinates="span", scope="model"
    )
    ridge = FactorExpert("ridge", lambda c: c.square().sum(-1), coordinates="span")
    posterior = span_of(GAUSSIAN * tie * ridge, random_updates(generator, 2, 2, 3, 4))
    draws = nuts(posterior, 300, chains=2, warmup=120, generator=generator)
    assert_same_mean(posterior, draws, gaussian_means(posterior), min_ess=120, max_rhat=1.05)
    assert_close(draws.stats["lp"], -posterior.joint_energy(draws.values).unsqueeze(-1) / 0.5, 1e-12)


def test_nuts_without_an_anchor(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(
        ["a", "b"], Identity(), Gaussian(), Relative(1.0), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    posterior = poe.bind(random_updates(generator, 1, 2, 1, 2))
    draws = nuts(posterior, 250, chains=2, warmup=80, generator=generator)
    assert_same_mean(posterior, draws, gaussian_means(posterior), min_ess=80, max_rhat=1.05)
    assert_same_mean(posterior, slice_sample(posterior, 500, generator=generator), gaussian_means(posterior))
    improper = ProductOfExperts.of(["a", "b"], Identity(), Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="improper"):
        nuts(improper.bind(random_updates(generator, 1, 2, 1, 2)), 10, generator=generator)


def test_statistics_seeds_progress_and_the_global_generator(generator: torch.Generator) -> None:
    posterior = span_of(GAUSSIAN, random_updates(generator, 2, 2, 3, 4))
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    seen: list[tuple[int, int]] = []
    first = nuts(
        posterior, 8, chains=2, warmup=12, generator=seeded(1),
        progress=lambda *count: seen.append(count),
    )  # fmt: skip
    assert seen == [(i, 40) for i in range(1, 41)]
    same, other = (nuts(posterior, 8, chains=2, warmup=12, generator=seeded(seed)) for seed in (1, 2))
    assert torch.equal(first.values, same.values)
    assert not torch.equal(first.values, other.values)
    assert not torch.equal(first.values[0], first.values[1])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert first.values.shape == (2, 8, 2, 3, 1)
    assert first.values.dtype == torch.float64
    assert set(first.stats) == {"lp", "step_size", "n_steps", "diverging", "reached_max_treedepth"}
    assert all(value.shape == (2, 8, 2) for value in first.stats.values())
    assert_close(first.stats["lp"], -posterior.energy(first.values) / 0.5, 1e-12)
    # A trajectory doubles until it turns: full trees have 2^k - 1 steps, and sampling does not change the step size.
    assert bool((first.stats["n_steps"] >= 1).all())
    assert bool((first.stats["step_size"] == first.stats["step_size"][:, :1]).all())
    assert bool((first.stats["step_size"][0] != first.stats["step_size"][1]).any())


def test_short_trees_are_reported(generator: torch.Generator) -> None:
    posterior = span_of(GAUSSIAN, random_updates(generator, 1, 2, 3, 4))
    draws = nuts(posterior, 20, chains=1, warmup=20, max_tree_depth=1, generator=generator)
    assert bool((draws.stats["n_steps"] == 1).all())
    assert bool(draws.stats["reached_max_treedepth"].all())


def test_divergences_are_collected(generator: torch.Generator) -> None:
    # Neal's funnel: where the first coordinate is low the others have almost no room.
    funnel = FactorExpert(
        "funnel",
        lambda c: c[..., 1:].square().sum(-1) * torch.exp(-3 * c[..., 0]) + 3 * c[..., 0] + c[..., 0].square() / 4,
        coordinates="span",
    )
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(50.0)) * funnel
    posterior = span_of(poe, random_updates(generator, 1, 2, 3, 4))
    draws = nuts(
        posterior, 40, chains=1, warmup=30, generator=generator, max_tree_depth=6, target_acceptance=0.5,
        start=torch.zeros(1, 1, 3, 1, dtype=torch.float64),
    )  # fmt: skip
    assert draws.stats["diverging"].shape == (1, 40, 1)
    assert bool(draws.stats["diverging"].any())


def test_an_interruption_puts_the_global_generator_back_and_bad_settings_are_clear_errors(
    generator: torch.Generator,
) -> None:
    posterior = span_of(GAUSSIAN, random_updates(generator, 1, 2, 3, 4))
    before = torch.random.get_rng_state()

    def stop(count: int, total: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nuts(posterior, 5, warmup=5, generator=generator, progress=stop)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 1\), but 4 chains"):
        nuts(posterior, 5, generator=generator, start=torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="finite where chain 0 starts"):
        nuts(posterior, 5, generator=generator, start=torch.full((4, 1, 3, 1), torch.nan))
    with pytest.raises(ValueError, match="warmup=0"):
        nuts(posterior, 5, warmup=0, generator=generator)
