"""What the generic MAP says of a point, and where it begins, against closed forms of Gaussian experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inference.minimize import minimize
from inference.solution import Status
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Expert,
    FactorExpert,
    Gaussian,
    Identity,
    ProductOfExperts,
    Relative,
    average,
)
from tests.helpers import assert_close, random_updates

ETA, GAMMA, IMPORTANCE = 0.3, 0.8, (1.0, 2.5, 0.5)


def product_of(temperature: float = 1.0, center: Any = None) -> ProductOfExperts:
    experts = [
        Expert(name, Identity(), Gaussian(), Absolute(GAMMA), importance)
        for name, importance in zip("abc", IMPORTANCE, strict=True)
    ]
    anchor = Anchor(center, AbsolutePrecision(ETA))
    return ProductOfExperts(tuple(experts), anchor=anchor, temperature=temperature)


def parts_at(z: Tensor, updates: Tensor, center: Tensor | float) -> list[Tensor]:
    """Gradients ``a_i (Z - U_i) / s^2`` of the experts and ``2 eta (Z - Z_0)`` of the anchor, ``(M, a, b)`` each."""
    each = [a * (z - u) / GAMMA**2 for a, u in zip(IMPORTANCE, updates.unbind(1), strict=True)]
    return [*each, 2 * ETA * (z - center)]


def lengths(values: Tensor) -> Tensor:
    return values.square().sum((-2, -1)).sqrt()


@pytest.mark.parametrize("unit", [1.0, 1e-4])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("center", [None, average])
def test_the_gradient_is_relative_to_the_sum_of_its_parts(
    temperature: float, center: Any, unit: float, generator: torch.Generator
) -> None:
    updates = unit * random_updates(generator, 2, 3, 4, 5)
    posterior = product_of(temperature, center).bind(updates)
    start = unit * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    found = minimize(posterior, start, tolerance=1e9)  # content with any point
    assert torch.equal(found.value, start)
    parts = parts_at(start, updates, 0.0 if center is None else average(updates))
    expected = lengths(torch.stack(parts).sum(0)) / torch.stack([lengths(part) for part in parts]).sum(0)
    assert_close(found.info.gradient_norm, expected, 1e-12)
    assert (found.status, found.info.steps) == ((Status.CONVERGED, Status.CONVERGED), 1)
    energy = posterior.energy(start)
    assert_close(found.info.energy, energy, 1e-12)
    assert_close(found.info.joint_energy, energy.sum(), 1e-12)
    assert found.record(1) == {"status": "converged"} | found.info.record(1)
    norm = pytest.approx(float(expected[1]))
    assert found.info.record(1) == {"steps": 1, "energy": float(energy[1]), "gradient_norm": norm}


def test_factors_of_modules_and_of_the_model_are_parts_of_their_own(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    each = FactorExpert("each", lambda c: 3 * c.square().sum(-1), "span")
    all_of_them = FactorExpert("all", lambda c: c.sum((-2, -1)).square(), "span", "model")
    plain = product_of(center=average)
    posterior = (plain * each * all_of_them).bind(updates, coordinates="span")
    assert posterior.span is not None
    transform = posterior.span.transform
    start = posterior.span.latents(torch.randn(2, 4, generator=generator, dtype=torch.float64))
    found = minimize(posterior, start, tolerance=1e9)
    c = transform @ start  # (M, K, 1)
    units = torch.eye(4, dtype=torch.float64)[:, :, None]
    metric = posterior.span.statistics.gram
    parts = [a * transform.mT @ metric @ (c - units[i]) / GAMMA**2 for i, a in enumerate(IMPORTANCE)]
    parts.append(2 * ETA * transform.mT @ metric @ (c - units[3]))
    parts.append(6 * transform.mT @ c)
    parts.append(2 * c.sum() * transform.mT @ torch.ones(2, 4, 1, dtype=torch.float64))
    expected = lengths(torch.stack(parts).sum(0)) / torch.stack([lengths(part) for part in parts]).sum(0)
    assert_close(found.info.gradient_norm, expected, 1e-10)


def test_it_starts_at_the_average_of_the_updates() -> None:
    seen: list[Tensor] = []

    def watched(c: Tensor) -> Tensor:
        seen.append(c.detach().clone())
        return c.square().sum(-1)

    poe = ProductOfExperts.of(["a", "b", "c", "d"]) * FactorExpert("watched", watched, "span")
    minimize(poe.bind(torch.eye(4, dtype=torch.float64).unsqueeze(1), coordinates="span"), max_steps=1)
    assert_close(seen[0], torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]], dtype=torch.float64), 1e-12)


def test_the_minimum_of_gaussian_experts_is_their_weighted_mean(generator: torch.Generator) -> None:
    """The second module is a thousand times as long, so that its gradients are a thousandth of the first's."""
    updates = random_updates(generator, 2, 3, 4, 5) * torch.tensor([1.0, 1e3], dtype=torch.float64)[:, None, None, None]
    scale = Relative(1.0)
    poe = ProductOfExperts.of(["a", "b", "c"], Identity(), Gaussian(), scale, anchor=Anchor(None, AbsolutePrecision(0)))
    found = minimize(poe.bind(updates))
    weights = 1 / updates.square().sum((-2, -1), keepdim=True)
    assert found.converged
    assert bool((found.info.gradient_norm <= 1e-6).all())
    expected = (weights * updates).sum(1) / weights.sum(1)
    for m in range(2):
        assert_close(found.value[m], expected[m], 1e-5)
    assert found.info.steps < 1000


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-6])
def test_the_search_goes_on_until_the_tolerance_is_met(tolerance: float, generator: torch.Generator) -> None:
    """That of all entries together, not of the largest; and it does not write to its start."""
    updates = random_updates(generator, 2, 3, 10, 12)
    start = torch.randn(2, 10, 12, generator=generator, dtype=torch.float64)
    before = start.clone()
    found = minimize(product_of().bind(updates), start, tolerance=tolerance)
    assert found.converged
    assert bool((found.info.gradient_norm <= tolerance).all())
    assert torch.equal(start, before)
    assert not start.requires_grad
    assert not torch.equal(found.value, start)


def test_evaluations_are_counted_and_bounded(generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(["a", "b", "c"]).bind(random_updates(generator, 2, 3, 4, 5))
    short = minimize(posterior, max_steps=2, tolerance=0.0)
    assert 1 < short.info.steps <= 3  # the last line search may take one more
    assert short.status == (Status.MAX_STEPS,) * 2
    assert not short.converged


def test_a_module_that_nothing_pulls_is_where_it_should_be() -> None:
    """Parts of no length are no division by zero, and a tolerance of 0 is met by a gradient of 0."""
    updates = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    updates[1, 0, 0, 0], updates[1, 1, 0, 0] = 1.0, -1.0
    anchor = Anchor(None, AbsolutePrecision(ETA))
    posterior = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=anchor).bind(updates)
    found = minimize(posterior, torch.zeros(2, 2, 3), tolerance=0.0)
    assert found.info.gradient_norm.tolist() == [0.0, 0.0]
    assert found.converged


def test_an_energy_that_is_infinite_in_one_module_is_refused() -> None:
    def broken(c: Tensor) -> Tensor:
        return c.square().sum(-1) + torch.tensor([0.0, torch.inf])

    poe = ProductOfExperts.of(["a", "b"]) * FactorExpert("broken", broken, "span")
    updates = torch.eye(2, dtype=torch.float64).unsqueeze(1).expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="factor expert 'broken' is not finite at the start"):
        minimize(poe.bind(updates, coordinates="span"))
