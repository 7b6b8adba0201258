"""Laws of every sampler in the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inference.map import fixed_point
from inference.samplers import SAMPLERS
from poe_models import Gaussian, Posterior, ProductOfExperts, StudentT, Welsch, span_statistics
from tests.helpers import random_updates
from tests.sampling import assert_same_mean, gaussian_means, values_of
from tests.seeds import seeded


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Span coordinates of one module of two Gaussian experts."""
    poe = ProductOfExperts.of(["a", "b"], energy=Gaussian())
    return poe.bind(span_statistics(poe, random_updates(seeded(0), 1, 2, 5, 4), ["m"]))


def settings(name: str, posterior: Posterior, **given: Any) -> dict[str, Any]:
    known = {"mode": fixed_point(posterior).value, "warmup": 50, "chains": 4, **given}
    return {key: value for key, value in known.items() if key in SAMPLERS[name].settings}


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_of_a_gaussian_are_of_its_law(name: str, posterior: Posterior) -> None:
    sampler = SAMPLERS[name]
    count = {"laplace": 2000, "nuts": 150}.get(name, 1000)
    draws = sampler.draw(posterior, count, generator=seeded(1), **settings(name, posterior))
    assert (draws.sampler, draws.temperature, draws.num_draws) == (name, 1.0, count)
    assert draws.num_chains == (1 if sampler.independent else 4)
    values = values_of(draws)
    if sampler.independent:
        values = values.reshape(4, count // 4, *values.shape[2:])
    assert_same_mean(posterior, values, gaussian_means(posterior), min_ess=200.0, max_rhat=1.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_depend_on_the_generator_alone(name: str, posterior: Posterior) -> None:
    one, same, other = (
        values_of(SAMPLERS[name].draw(posterior, 3, generator=seeded(seed), **settings(name, posterior, chains=1)))
        for seed in (2, 2, 3)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_names_its_settings_and_describes_itself(name: str) -> None:
    sampler = SAMPLERS[name]
    assert "generator" in sampler.settings
    assert sampler.independent == ("warmup" not in sampler.settings)
    assert "span" in sampler.coordinates
    assert sampler.about
    assert "\n" not in sampler.about


def test_only_gibbs_needs_a_scale_mixture() -> None:
    refusing = {name for name, sampler in SAMPLERS.items() if sampler.refusal(Welsch()) is not None}
    assert refusing == {"gibbs"}
    assert SAMPLERS["gibbs"].refusal(Welsch()) == "has no known Gaussian scale mixture"
    assert SAMPLERS["gibbs"].refusal(StudentT(4.0)) is None
