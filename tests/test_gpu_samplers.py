"""Every sampler on a GPU against the CPU: moments within Monte Carlo error; the same seed there gives the same draws.

The same seed gives other numbers on another device. What `POE_TEST_DEVICE` does is in conftest.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagnostics import chain_convergence, to_inference_data
from inference import SpanDraws, fixed_point, gibbs, laplace
from inference.samplers import SAMPLERS
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    Identity,
    InputGram,
    OutputGram,
    Posterior,
    ProductOfExperts,
    StudentT,
    average,
    span_statistics,
)
from tests.devices import both, on, small
from tests.helpers import assert_close, name_of, random_updates
from tests.levels import Z
from tests.sampling import assert_same_mean, values_of
from tests.seeds import seeded

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("residual_map", [Identity(), InputGram(), (OutputGram(), InputGram())], ids=name_of)
def test_laplace_agrees_in_full_coordinates(
    residual_map: Any, device: torch.device, generator: torch.Generator
) -> None:
    poe = ProductOfExperts.of(["a", "b", "c"], residual_map, Cauchy(), anchor=Anchor(average), temperature=0.3)
    here, there = both(poe, small(generator, 2, 3, 6, 5), device)
    one, other = laplace(here), laplace(there)
    assert_close(other.standard_deviations().cpu(), one.standard_deviations(), 1e-5)
    assert_close(other.log_integral().cpu(), one.log_integral(), 1e-8)
    z = small(generator, 2, 1, 6, 5)[:, 0]
    assert_close(other.log_density(z.to(device)).cpu(), one.log_density(z), 1e-5)
    count = 400
    values = other.sample(count, on(device, 2)).values[0]
    assert values.device.type == device.type
    spread = other.standard_deviations()
    assert float(((values.mean(0) - other.mode) / (spread / count**0.5)).abs().max()) < Z
    # The variance of a squared normal is twice the square of its own.
    assert float(((values.var(0) / spread.square() - 1) / (2 / count) ** 0.5).abs().max()) < Z + 2


def span_posteriors(device: torch.device, energy: Energy) -> tuple[Posterior, Posterior]:
    """One module of two experts in Span coordinates, from statistics; the span has all three of them."""
    updates = random_updates(seeded(0), 1, 3, 5, 4)
    updates, center = updates[:, :2], 0.5 * updates[:, 2]
    poe = ProductOfExperts.of(["a", "b"], InputGram(), energy, anchor=Anchor(center))
    one, other = (span_statistics(poe, each, ["m"]) for each in (updates, updates.to(device)))
    for name in ("gram", "forms", "mean_curvature", "dimension"):
        assert getattr(other, name).device.type == device.type
        assert_close(getattr(other, name).cpu(), getattr(one, name), 1e-10)
    return poe.bind(one), poe.bind(other)


def draw(name: str, posterior: Posterior, generator: torch.Generator, count: int, **given: Any) -> Any:
    known = {"mode": fixed_point(posterior).value, "warmup": 50, "chains": 4, **given}
    settings = {key: value for key, value in known.items() if key in SAMPLERS[name].settings}
    return SAMPLERS[name].draw(posterior, count, generator=generator, **settings)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_from_the_same_law(name: str, device: torch.device) -> None:
    here, there = span_posteriors(device, StudentT(4.0))
    count = {"laplace": 2000, "nuts": 120}.get(name, 1500)
    # Eigenvectors have any sign, so that coordinates may be mirrored: coefficients are compared.
    tables = []
    for posterior, generator in ((here, seeded(1)), (there, on(device, 2))):
        draws = draw(name, posterior, generator, count)
        values = values_of(draws)
        assert values.device.type == posterior.like.device.type
        coefficients = posterior.coefficients(values).cpu().unsqueeze(-1)
        if SAMPLERS[name].independent:
            coefficients = coefficients.reshape(4, count // 4, *coefficients.shape[2:])
        assert here.span is not None
        tables.append(here.span.inverse @ coefficients)
    assert_same_mean(here, tables[1], tables[0], min_ess=40.0 if name == "nuts" else 100.0, max_rhat=1.08)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_the_same_draws_on_the_device(name: str, device: torch.device) -> None:
    _, there = span_posteriors(device, StudentT(4.0))
    one, same, other = (values_of(draw(name, there, on(device, seed), 4, chains=2)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_global_generators_are_left_alone(device: torch.device) -> None:
    _, there = span_posteriors(device, StudentT(4.0))
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    draw("nuts", there, on(device, 0), 3, chains=1)
    assert torch.equal(torch.rand(3, device=device), expected)


def test_gibbs_in_full_coordinates_is_the_same_law(device: torch.device, generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["a", "b"], InputGram(), StudentT(4.0), anchor=Anchor(average, AbsolutePrecision(0.5)))
    here, there = both(poe, small(generator, 1, 2, 3, 2), device)
    drawn = gibbs(there, 500, generator=on(device, 1), warmup=50)
    values = values_of(drawn)
    assert torch.equal(values[1, 7], drawn.latents(1, 7))  # made again, bit for bit
    assert_same_mean(here, values.cpu(), values_of(gibbs(here, 500, generator=seeded(2), warmup=50)), 200.0, 1.05)


def test_chains_on_the_device_are_judged_and_named(device: torch.device) -> None:
    _, there = span_posteriors(device, StudentT(4.0))
    drawn = gibbs(there, 200, generator=on(device, 0), warmup=20)
    named = SpanDraws.of(drawn, there)
    assert chain_convergence(named).values.shape == (4, 200, 1, 3)
    data = to_inference_data(drawn, there)
    assert data.posterior.sizes["draw"] == 200
    assert len(named.thinned(5).digest()) == 64
