"""Evidence of functional experts against quadrature: exact where all is Gaussian, near it for class probabilities."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.functional import (
    KullbackLeibler,
    Residual,
    SpanModel,
    Targets,
    fit,
    functional,
    functional_evidence,
)
from inference.functional.evidence import _warn
from inference.minimize import minimize
from poe_models import Cauchy, Energy, Gaussian, Identity, ProductOfExperts, TaskVectors
from poe_models.posterior import Posterior
from tests.seeds import seeded


def called(net: Any, x: Any) -> Tensor:
    found: Tensor = net(x)
    return found


def model_of(experts: int, energy: Energy) -> SpanModel:
    """A linear layer without bias whose span has as many dimensions as there are experts: the merge is their mean."""
    generator = seeded(4)
    base = {"weight": torch.randn(3, 4, generator=generator, dtype=torch.float64)}
    tuned = {
        f"e{i}": {"weight": base["weight"] + 0.5 * torch.randn(3, 4, generator=generator, dtype=torch.float64)}
        for i in range(experts)
    }
    vectors = TaskVectors(base, tuned, dtype=torch.float64)
    network = nn.Linear(4, 3, bias=False).double()
    return SpanModel(network, vectors, ProductOfExperts.of(vectors.names, Identity(), energy))


def posterior_of(model: SpanModel, divergence: Any, count: int = 30) -> Posterior:
    inputs = [torch.randn(count, 4, generator=seeded(20 + i), dtype=torch.float64) for i in range(len(model.names))]
    return model.posterior(
        *(functional(n, model, x, called, divergence) for n, x in zip(model.names, inputs, strict=True))
    )


def by_quadrature(posterior: Posterior, mode: Tensor, width: float = 6.0, points: int = 61) -> float:
    """Log of the mean of ``exp(-D)`` over the weight-space posterior, on a grid of the one or two known latents."""
    assert posterior.span is not None
    places = posterior.span.known.flatten().nonzero().flatten().tolist()
    axes = [torch.linspace(-width, width, points, dtype=torch.float64) + float(mode.flatten()[p]) for p in places]
    grid = torch.cartesian_prod(*axes).reshape(-1, len(places))
    flat = mode.flatten().expand(len(grid), -1).clone()
    flat[:, places] = grid
    x = flat.view(-1, *mode.shape)
    alone, whole = posterior.energy(x).sum(-1), posterior.joint_energy(x)
    return float(torch.logsumexp(-whole, 0) - torch.logsumexp(-alone, 0))


@pytest.mark.parametrize("experts", [1, 2])
def test_it_is_exact_where_everything_is_gaussian(experts: int) -> None:
    model = model_of(experts, Gaussian())
    posterior = posterior_of(model, Residual(scale=1.0), count=4)
    mode = minimize(posterior, model.start()).value
    exact = by_quadrature(posterior, mode, points=1281 if experts == 1 else 241, width=12.0)
    assert functional_evidence(posterior, mode) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("moved", "far"), [(0.0, False), (0.01, False), (2.0, True)])
def test_a_point_beside_the_mode_has_the_evidence_of_its_quadratic_model(
    moved: float, far: bool, temperature: float
) -> None:
    """Which is the mode's, exactly, where everything is Gaussian; Newton's decrement is what the energy falls."""
    model = model_of(2, Gaussian())
    posterior = replace(posterior_of(model, Residual(scale=1.0), count=4), temperature=temperature)
    mode = minimize(posterior, model.start()).value.double()
    point = mode + moved * torch.randn(mode.shape, generator=seeded(3), dtype=torch.float64)
    at_mode = functional_evidence(posterior, mode)
    falls = float(posterior.joint_energy(point) - posterior.joint_energy(mode)) / temperature
    assert (falls > 3) == far
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert functional_evidence(posterior, point) == pytest.approx(at_mode, abs=1e-6)
    assert [f"the point is {falls:.3g} nats above" in str(each.message) for each in said] == [True] * far


def test_an_evidence_above_zero_is_said_to_be_none() -> None:
    with pytest.warns(UserWarning, match="2.5 nats, and no evidence of divergences is above 0"):
        _warn(2.5, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn(-2.5, 2.9)


@pytest.mark.parametrize("experts", [1, 2])
def test_it_is_near_the_integral_for_class_probabilities(experts: int) -> None:
    model = model_of(experts, Cauchy())
    posterior = posterior_of(model, KullbackLeibler())
    mode = minimize(posterior, model.start()).value
    exact = by_quadrature(posterior, mode, width=8.0, points=161 if experts == 1 else 49)
    assert functional_evidence(posterior, mode) == pytest.approx(exact, abs=0.35)


def test_predictions_that_the_design_makes_are_likelier() -> None:
    model = model_of(2, Gaussian())
    x = torch.randn(30, 4, generator=seeded(1), dtype=torch.float64)
    merged = model.call(model.coefficients({"merge": 1.0}), called, x)
    far = model.call(model.coefficients({"e0": -3.0}), called, x)
    found = []
    for outputs in (merged, far):
        posterior = model.posterior(functional("e0", model, x, called, targets=Targets(outputs)))
        solution = fit(posterior, model.start(), generator=seeded(0), steps=200, batch_size=30)
        found.append(functional_evidence(posterior, minimize(posterior, solution.value).value))
    assert found[0] > found[1] + 1
    assert math.isfinite(found[1])


def test_it_wants_sums_over_examples() -> None:
    model = model_of(1, Gaussian())
    with pytest.raises(ValueError, match="every factor expert must be a sum over examples"):
        functional_evidence(model.posterior(), model.start())
