"""The Pyro program at temperatures that a model of one's own draws: values, proposals outside the support, NUTS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor

from inference import minimize
from inference.gibbs import gibbs
from inference.laplace import DenseLaplace, Laplace
from inference.nuts import nuts
from inference.slice import slice_sample
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Gaussian,
    Identity,
    InputGram,
    Posterior,
    ProductOfExperts,
    average,
)
from poe_models.program import log_constant, log_density, program
from tests.helpers import assert_close, random_updates

ANCHORED = Anchor(precision=AbsolutePrecision(0.5))
PRIOR = (math.log(0.8), 0.4)
"""Median and log standard deviation of the temperature in the tests that sample it."""


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def posterior_of(generator: torch.Generator, energy: object = None, eta: float = 0.5) -> Posterior:
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), energy or Cauchy(), Absolute(1.5), [1.0, 2.0],  # type: ignore[arg-type]
        Anchor(average, AbsolutePrecision(eta)),
    )  # fmt: skip
    return poe.bind(random_updates(generator, 2, 2, 2, 3))


@pytest.mark.parametrize("eta", [0.5, 0.0])
def test_a_tensor_is_the_number(eta: float, generator: torch.Generator) -> None:
    posterior = posterior_of(generator, eta=eta)
    z = torch.randn(4, 2, 2, 3, generator=generator, dtype=torch.float64)
    for value in (1e-3, 0.3, 1.0, 4.0, 1e6):
        number = log_density(replace(posterior, temperature=value))(z)
        assert_close(log_density(replace(posterior, temperature=scalar(value)))(z), number, 1e-13)
        expected = log_constant(replace(posterior, temperature=value)) - posterior.energy(z) / value
        assert_close(number, expected, 1e-12)


def test_the_gradient_in_the_temperature(generator: torch.Generator) -> None:
    """``d/dT`` of ``-E / T - D/2 log T`` is ``E / T^2 - D / 2T``; vmap sees many temperatures at once."""
    posterior = posterior_of(generator)
    z = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)

    def value(temperature: Tensor) -> Tensor:
        return log_density(replace(posterior, temperature=temperature), joint=True)(z)

    energy, size = posterior.energy(z).sum(), 2 * 6
    temperatures = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(value))(temperatures)
    assert_close(slopes, energy / temperatures**2 - size / (2 * temperatures), 1e-12)


@pytest.mark.parametrize("outside", [math.inf, -math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("eta", [0.5, 0.0])
def test_outside_the_support_the_log_density_is_minus_infinity(
    outside: float, eta: float, generator: torch.Generator
) -> None:
    posterior = posterior_of(generator, eta=eta)
    z = posterior.experts[0].update
    temperature = scalar(outside).requires_grad_()
    found = log_density(replace(posterior, temperature=temperature), joint=True)(z)
    assert float(found.detach()) == -math.inf
    (slope,) = torch.autograd.grad(found, temperature)
    assert float(slope) == 0.0
    with pyro.validation_enabled(True):  # as Pyro's algorithms run it
        model = poutine.condition(program(replace(posterior, temperature=temperature)), data={"update": z})
        assert float(poutine.trace(model).get_trace().log_prob_sum().detach()) == -math.inf


@pytest.mark.parametrize("temperature", [1e-300, 1e-80, 1e80, 1e300])
def test_a_spread_beyond_the_latents_precision_is_outside_too(temperature: float, generator: torch.Generator) -> None:
    """In single precision the anchor's spread has no number there; in double precision the density is as it stands."""
    updates = random_updates(generator, 1, 2, 2, 3)
    poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=ANCHORED)
    for dtype in (torch.float32, torch.float64):
        posterior = poe.bind(updates.to(dtype))
        tempered = replace(posterior, temperature=scalar(temperature))
        z = posterior.experts[0].update
        with pyro.validation_enabled(True):
            model = poutine.condition(program(tempered), data={"update": z})
            found = float(poutine.trace(model).get_trace().log_prob_sum())
        if dtype is torch.float32:
            assert found == -math.inf
        else:
            expected = log_constant(tempered) - posterior.energy(z) / temperature
            assert found == pytest.approx(float(expected.sum()), rel=1e-12)


def inferring(posterior: Posterior, prior: dist.Distribution, seen: list[float]) -> Callable[[], None]:
    """A model of one's own with a prior on the temperature; notes which temperatures it was evaluated at."""

    def model() -> None:
        temperature = pyro.sample("temperature", prior)
        seen.append(float(temperature.detach()))
        program(replace(posterior, temperature=temperature))()

    return model


def run_nuts(model: Callable[[], None], start: dict[str, Tensor], draws: int, **settings: object) -> dict[str, Tensor]:
    kernel = NUTS(
        model,
        init_strategy=pyro.infer.autoguide.initialization.init_to_value(values=start),
        max_plate_nesting=1,
        **settings,
    )
    mcmc = MCMC(kernel, draws, warmup_steps=draws // 2, disable_progbar=True)
    mcmc.run()
    found: dict[str, Tensor] = mcmc.get_samples()
    return found


def test_nuts_infers_a_temperature() -> None:
    """With Gaussian energies Z integrates out: ``p(u) N(.) exp(-E_min e^-u)`` in the log temperature, by quadrature."""
    updates = torch.tensor([[[[1.5, -0.5]], [[-1.0, 2.0]]]], dtype=torch.float64)
    posterior = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(2.0), Absolute(1.0), anchor=ANCHORED).bind(updates)
    lowest = float(posterior.energy(fixed_point_of(posterior)).sum())
    grid = torch.linspace(-4.0, 5.0, 4001, dtype=torch.float64)
    log_weight = -((grid - PRIOR[0]) ** 2) / (2 * PRIOR[1] ** 2) - lowest * (-grid).exp()
    weight = log_weight.softmax(0)
    mean = float(weight @ grid)
    spread = float((weight @ (grid - mean).square()).sqrt())
    draws = run_nuts(
        inferring(posterior, dist.LogNormal(scalar(PRIOR[0]), scalar(PRIOR[1])), []),
        {"temperature": scalar(1.0), "update": fixed_point_of(posterior)},
        300,
    )["temperature"].log()
    batches = draws.view(20, -1).mean(1)  # 15 draws each, longer than the chain remembers
    error = float(batches.std()) / math.sqrt(20)
    assert abs(mean - PRIOR[0]) > 0.3, "the data must move the temperature"
    assert abs(float(draws.mean()) - mean) < 7.1 * error  # t with 19 degrees of freedom: 1e-6
    assert error < 0.3 * spread, "the chain must mix"


def fixed_point_of(posterior: Posterior) -> Tensor:
    """The minimum of Gaussian energies by one linear solve, ``(1, 1, 2)``."""
    start = torch.zeros(2, dtype=torch.float64)

    def energy(z: Tensor) -> Tensor:
        return posterior.energy(z.view(1, 1, 2)).sum()

    hessian, slope = torch.func.hessian(energy)(start), torch.func.grad(energy)(start)
    return -torch.linalg.solve(hessian, slope).view(1, 1, 2)


@pytest.mark.parametrize("step_size", [1e3, 1e-3])
def test_nuts_survives_the_temperatures_that_it_proposes(step_size: float, generator: torch.Generator) -> None:
    """Steps of a thousand in the log temperature propose infinity and zero; no such state is kept."""
    posterior = posterior_of(generator)
    seen: list[float] = []
    draws = run_nuts(
        inferring(posterior, dist.LogNormal(scalar(0.0), scalar(1.0)), seen),
        {"temperature": scalar(1.0), "update": posterior.experts[0].update},
        20,
        step_size=step_size,
        adapt_step_size=step_size < 1,
        max_tree_depth=4,
    )["temperature"]
    assert bool((draws.isfinite() & (draws > 0)).all())
    extremes = {value for value in seen if not 0 < value < math.inf}
    assert bool(extremes) == (step_size > 1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_number_that_is_no_temperature_is_refused(temperature: float, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="must be a positive finite number"):
        replace(posterior_of(generator), temperature=temperature)
    with pytest.raises(ValueError, match=r"tensor of shape \(2,\).*scalar tensor"):
        replace(posterior_of(generator), temperature=torch.full((2,), temperature))


@pytest.mark.parametrize("temperature", [0.5, math.inf])
def test_samplers_take_numbers(temperature: float, generator: torch.Generator) -> None:
    posterior = replace(posterior_of(generator), temperature=scalar(temperature))
    mode = posterior.experts[0].update
    calls: list[Callable[[], object]] = [
        lambda: gibbs(posterior, 1, generator=generator),
        lambda: slice_sample(posterior, 1, generator=generator),
        lambda: nuts(posterior, 1, generator=generator),
        lambda: Laplace(posterior, mode),
        lambda: DenseLaplace(posterior, mode),
        lambda: minimize(posterior),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"a tensor is for a Pyro model.*give `float\(\.\.\.\)`"):
            call()
