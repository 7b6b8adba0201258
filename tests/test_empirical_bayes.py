"""Marginal likelihood of the regression behind a merge: against dense normals, and on updates drawn from the model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from inference.search import Ridge, empirical_bayes, regression_evidence
from poe_models import Absolute, Activation, Anchor, Gaussian, InputGram, ModuleMoments, ProductOfExperts

NAMES = ["a", "b"]


def regression(
    modules: int, d_out: int, d_in: int, eta: float, beta: float, generator: torch.Generator
) -> tuple[ProductOfExperts, Tensor, list[Tensor], list[Tensor]]:
    """Updates drawn from the model: a product with ``w_i P_i = X_i X_i^T``, the updates, inputs and outputs."""
    inputs = [torch.randn(modules, d_in, d_in, generator=generator, dtype=torch.float64) for _ in NAMES]
    spread = sum(x.square().sum((-2, -1)) for x in inputs) / d_in  # the curvature that eta is relative to, halved twice
    z = torch.randn(modules, d_out, d_in, generator=generator, dtype=torch.float64)
    z = z / (beta * eta * spread * 2).sqrt()[:, None, None]
    outputs = [
        z @ x + torch.randn(modules, d_out, d_in, generator=generator, dtype=torch.float64) / math.sqrt(beta)
        for x in inputs
    ]
    updates = torch.stack([torch.linalg.solve(x, y, left=False) for x, y in zip(inputs, outputs, strict=True)], 1)
    moments = {
        name: {str(m): x[m] @ x[m].mT / d_in for m in range(modules)} for name, x in zip(NAMES, inputs, strict=True)
    }
    activation = Activation(ModuleMoments("activations", moments))
    poe = ProductOfExperts.of(NAMES, activation, Gaussian(), Absolute(math.sqrt(1 / (2 * d_in))), anchor=Anchor())
    return poe.for_modules([str(m) for m in range(modules)]), updates, inputs, outputs


def test_evidence_is_that_of_a_dense_normal(generator: torch.Generator) -> None:
    d_out, d_in, eta, beta = 3, 4, 0.2, 1.7
    poe, updates, inputs, outputs = regression(1, d_out, d_in, eta, beta, generator)
    ridge = Ridge.of(poe, updates)
    assert ridge is not None
    precision = float(eta * ridge.curvature)
    design = torch.cat([x[0] for x in inputs], -1)
    covariance = design.mT @ design / (beta * precision) + torch.eye(2 * d_in, dtype=torch.float64) / beta
    rows = torch.cat([y[0] for y in outputs], -1)
    expected = MultivariateNormal(torch.zeros(2 * d_in, dtype=torch.float64), covariance).log_prob(rows).sum()
    found, same = regression_evidence([ridge], [2 * d_in], eta, beta)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert same == beta
    best, at = regression_evidence([ridge], [2 * d_in], eta)
    assert best >= found
    assert best == pytest.approx(regression_evidence([ridge], [2 * d_in], eta, at)[0], rel=1e-12)


def test_precision_and_noise_of_the_truth_are_recovered(generator: torch.Generator) -> None:
    """Within five standard errors: log(beta) of n numbers has the error sqrt(2 / n), and log(eta) sqrt(2 / |Z|)."""
    modules, d_out, d_in, eta, beta = 4, 12, 10, 0.05, 3.0
    poe, updates, _, _ = regression(modules, d_out, d_in, eta, beta, generator)
    ridge = Ridge.of(poe, updates)
    assert ridge is not None
    found = empirical_bayes([ridge], [2 * d_in])
    assert not found.at_bound
    numbers = modules * d_out * d_in
    assert abs(math.log(found.noise_precision / beta)) < 5 * math.sqrt(2 / numbers)
    assert abs(math.log(found.eta / eta)) < 5 * math.sqrt(4 / numbers)
    for factor in (0.8, 1.25):  # and it is the best one
        assert regression_evidence([ridge], [2 * d_in], found.eta * factor)[0] < found.log_evidence


def test_updates_of_one_mind_leave_the_precision_at_its_bound() -> None:
    same = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    ridge = Ridge.of(ProductOfExperts.of(NAMES, InputGram(), Gaussian()), same)
    assert ridge is not None
    assert empirical_bayes([ridge], [8]).at_bound


def test_bad_input_is_refused() -> None:
    ridge = Ridge.of(ProductOfExperts.of(NAMES, InputGram(), Gaussian()), torch.randn(1, 2, 3, 3))
    assert ridge is not None
    with pytest.raises(ValueError, match="both must be positive"):
        regression_evidence([ridge], [6], 0.0)
    with pytest.raises(ValueError, match="one positive count a batch"):
        regression_evidence([ridge], [0], 0.1)
