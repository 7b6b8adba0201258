"""Laplace and evidence of functional experts on two modules at a temperature, where all of it is Gaussian."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.functional import KullbackLeibler, Residual, SpanModel, fit, functional, functional_evidence
from inference.functional import functional_laplace as laplace_of
from inference.minimize import minimize
from poe_models import FactorExpert, Gaussian, Identity, ProductOfExperts, TaskVectors
from poe_models.posterior import Posterior
from tests.helpers import assert_close
from tests.seeds import seeded

TEMPERATURE = 0.7


class Beside(nn.Module):
    """Two matrices side by side, so that outputs are linear in the coefficients of both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(x) + self.two(x.flip(-1))
        return found


def called(net: Any, x: Any) -> Tensor:
    found: Tensor = net(x)
    return found


def model_of(temperature: float = TEMPERATURE) -> SpanModel:
    g = seeded(8)

    def drawn() -> dict[str, Tensor]:
        return {f"{n}.weight": torch.randn(3, 4, generator=g, dtype=torch.float64) for n in ("one", "two")}

    vectors = TaskVectors(drawn(), {name: drawn() for name in "ab"}, dtype=torch.float64)
    poe = ProductOfExperts.of(vectors.names, Identity(), Gaussian(), temperature=temperature)
    return SpanModel(Beside().double(), vectors, poe)


def experts_of(model: SpanModel, divergence: Any, **how: Any) -> list[FactorExpert]:
    inputs = torch.randn(7, 4, generator=seeded(9), dtype=torch.float64)
    return [functional(name, model, inputs, called, divergence, **how) for name in model.names]


def quadratic_integral(posterior: Posterior) -> tuple[Tensor, float]:
    """Minimum and log of the integral of ``exp(-E / T)`` of a quadratic energy over all latents, by its Hessian."""
    shape = (posterior.num_modules, *posterior.event_shape)
    zero = torch.zeros(shape, dtype=torch.float64).flatten()

    def energy(x: Tensor) -> Tensor:
        return posterior.joint_energy(x.view(shape))

    gradient, hessian = torch.func.grad(energy)(zero), torch.func.hessian(energy)(zero)
    mode = -torch.linalg.solve(hessian, gradient)
    volume = len(zero) / 2 * math.log(2 * math.pi * TEMPERATURE) - 0.5 * torch.logdet(hessian)
    return mode.view(shape), float(volume - energy(mode) / TEMPERATURE)


@pytest.mark.parametrize("scale", [1.3, 0.6])
def test_evidence_of_gaussians_is_the_difference_of_two_integrals(scale: float) -> None:
    model = model_of()
    posterior = model.posterior(*experts_of(model, Residual(scale=scale), batch_size=3))
    mode, both = quadratic_integral(posterior)
    alone = quadratic_integral(model.posterior())[1]
    assert functional_evidence(posterior, mode) == pytest.approx(both - alone, rel=1e-8)
    assert float(laplace_of(posterior, mode).log_integral()) == pytest.approx(both, rel=1e-8)


@pytest.mark.parametrize(("batch_size", "batches"), [(None, 1), (7, 1), (3, 3), (1, 7)])
def test_batches_are_told_one_after_another_and_change_nothing(batch_size: int | None, batches: int) -> None:
    model = model_of()
    mode = model.start()
    whole = laplace_of(model.posterior(*experts_of(model, KullbackLeibler())), mode)
    told: list[tuple[int, int]] = []
    posterior = model.posterior(*experts_of(model, KullbackLeibler(), batch_size=batch_size))
    found = laplace_of(posterior, mode, lambda done, of: told.append((done, of)))
    assert told == [(i + 1, 2 * batches) for i in range(2 * batches)]  # of two experts
    assert_close(found.standard_deviations(), whole.standard_deviations(), 1e-9)
    evidence: list[tuple[int, int]] = []
    functional_evidence(posterior, mode, lambda done, of: evidence.append((done, of)))
    assert evidence == told


def test_a_map_that_had_not_converged_is_warned_about() -> None:
    model = model_of(1.0)
    posterior = model.posterior(*experts_of(model, Residual()))
    early = fit(posterior, model.start(), generator=seeded(0), steps=1, batch_size=7)
    solution = minimize(posterior, model.start())
    assert solution.converged
    assert not early.converged
    with pytest.warns(UserWarning, match="the MAP had not converged .* centred beside the mode"):
        found = laplace_of(posterior, early)
    assert torch.equal(found.mode, early.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace_of(posterior, solution)  # type: ignore[arg-type]
        laplace_of(posterior, solution.value)


def test_other_factors_have_their_own_hessian_but_no_evidence() -> None:
    model = model_of()
    other = FactorExpert("size", lambda c: 0.5 * c.square().sum((-2, -1)), "span", "model")
    posterior = model.posterior(*experts_of(model, Residual(scale=1.3)), other)
    mode, both = quadratic_integral(posterior)
    assert float(laplace_of(posterior, mode).log_integral()) == pytest.approx(both, rel=1e-8)
    for factors in ((), (other,), (*experts_of(model, Residual()), other)):
        with pytest.raises(ValueError, match="every factor expert must be a sum over examples"):
            functional_evidence(model.posterior(*factors), mode)
