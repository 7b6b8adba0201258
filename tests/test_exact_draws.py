"""Draws as functions of their noise: with unit vectors for noise, mean and covariance come out exactly.

A draw ``z(noise)`` is affine. Its value at zero noise is the mean, and the outer products of its changes along all unit
vectors add up to the covariance. Nothing here is a matter of chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from inference.gibbs import GibbsKernel, anchor_spread, draw_weights, gibbs, seeded_noise
from inference.laplace import Laplace, laplace
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    Welsch,
    average,
)
from poe_models.posterior import Posterior
from tests.helpers import assert_close, name_of, random_updates
from tests.sampling import values_of
from tests.seeds import seeded

NAMES = ["a", "b"]
DESIGNS = [Identity(), Directional(), OutputGram(), InputGram(), (OutputGram(), InputGram())]
SHAPES = [(3, 4), (6, 2), (1, 7)]


@pytest.fixture
def unit_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed ``j`` is the unit vector ``j``; seed -1 is no noise at all."""

    def noise(seed: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        flat = like.new_zeros(math.prod(shape))
        if seed >= 0:
            flat[seed] = 1.0
        return flat.view(shape)

    for module in ("inference.gibbs", "inference.laplace"):
        monkeypatch.setattr(import_module(module), "seeded_noise", noise)


def moments(draw: Callable[[int], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of a draw as a function of its seed."""
    mean = draw(-1).flatten()
    columns = torch.stack([draw(seed).flatten() - mean for seed in range(size)], -1)
    return mean, columns @ columns.mT


def posterior_of(
    design: object, shape: tuple[int, int], energy: Energy, temperature: float, generator: torch.Generator
) -> Posterior:
    anchor = Anchor(average, AbsolutePrecision(0.4))
    poe = ProductOfExperts.of(NAMES, design, energy, Relative(0.8), [1.0, 2.0], anchor, temperature)  # type: ignore[arg-type]
    return poe.bind(random_updates(generator, 1, 2, *shape))


def dense(posterior: Posterior, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``H`` and ``b`` of Gibbs' conditional on the whole update: DESIGN's fact 3."""
    shape = posterior.event_shape
    units = torch.eye(math.prod(shape), dtype=torch.float64).unflatten(1, shape).unsqueeze(1)
    shift = float(posterior.anchor_precision) / posterior.temperature
    assert posterior.center is not None
    matrix = shift * torch.eye(math.prod(shape), dtype=torch.float64)
    right = shift * posterior.center.flatten()
    for weight, expert in zip(weights, posterior.experts, strict=True):
        term = weight * expert.operator.apply(units).flatten(1)
        matrix, right = matrix + term, right + term @ expert.update.flatten()
    return matrix, right


@pytest.mark.parametrize("temperature", [0.3, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("design", DESIGNS, ids=name_of)
@pytest.mark.usefixtures("unit_noise")
def test_gibbs_draws_the_conditional_normal(
    design: object, shape: tuple[int, int], temperature: float, generator: torch.Generator
) -> None:
    posterior = posterior_of(design, shape, Cauchy(), temperature, generator)
    kernel = GibbsKernel(posterior)
    weights = 0.2 + torch.rand(len(posterior.experts), generator=generator, dtype=torch.float64)
    mean, covariance = moments(lambda seed: kernel.regenerate(weights, seed), math.prod(shape))
    matrix, right = dense(posterior, weights)
    assert_close(mean, torch.linalg.solve(matrix, right), 1e-9)
    assert_close(covariance, torch.linalg.inv(2 * matrix), 1e-9)


@pytest.mark.parametrize("temperature", [0.3, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("design", DESIGNS, ids=name_of)
@pytest.mark.usefixtures("unit_noise")
def test_laplace_draws_have_the_inverse_hessian_times_the_temperature(
    design: object, shape: tuple[int, int], temperature: float, generator: torch.Generator
) -> None:
    anchor = Anchor(average, AbsolutePrecision(0.4))
    poe = ProductOfExperts.of(NAMES, design, StudentT(5.0), Relative(0.8), anchor=anchor, temperature=temperature)  # type: ignore[arg-type]
    updates = random_updates(generator, 1, 2, *shape)
    solution = fixed_point(poe.bind(updates))
    approximation = laplace(poe.bind(updates), solution)
    mean, covariance = moments(approximation.draw, math.prod(shape))
    assert_close(mean, solution.value.flatten())
    posterior = poe.bind(updates)
    hessian = torch.func.hessian(lambda z: posterior.energy(z.view(1, *shape)).sum())(solution.value.flatten())
    assert_close(covariance, temperature * torch.linalg.inv(hessian), 1e-8)
    # The same draws through the sampler, each module by itself, whatever the batch.
    draws = approximation.sample(3, generator)
    assert draws.seeds.shape == (1, 3, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("design", DESIGNS, ids=name_of)
def test_conditional_moments_are_those_of_the_conditional_normal(
    design: object, shape: tuple[int, int], generator: torch.Generator
) -> None:
    posterior = posterior_of(design, shape, Cauchy(), 0.7, generator)
    kernel = GibbsKernel(posterior)
    weights = 0.2 + torch.rand(3, 1, len(posterior.experts), generator=generator, dtype=torch.float64)
    direction = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    means, variances = kernel.conditional_mean(weights), kernel.conditional_variance(weights, direction)
    for chain in range(3):
        matrix, right = dense(posterior, weights[chain, 0])
        assert_close(means[chain].flatten(), torch.linalg.solve(matrix, right), 1e-9)
        along = direction.flatten()
        assert_close(variances[chain], (along @ torch.linalg.solve(2 * matrix, along)).unsqueeze(0), 1e-9)


def test_laplace_draws_of_a_batch_are_those_of_its_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.8), temperature=0.5)
    posterior, mode = poe.bind(updates), fixed_point(poe.bind(updates)).value
    draws = Laplace(posterior, mode).sample(2, seeded(3))
    assert len(draws.seeds.unique()) == 6
    for m in range(3):
        alone = Laplace(posterior.module(m), mode[m : m + 1])
        for s in range(2):
            assert torch.equal(draws.latents(0, s)[m], alone.draw(int(draws.seeds[0, s, m])))
    seeds = Laplace(posterior, mode).sample(2000, seeded(3)).seeds.double()
    # Seeds are uniform up to 2^62: of 6000, the largest is beyond half of that but for a chance of 2^-6000.
    assert 2**61 < float(seeds.max()) < 2**62


@pytest.mark.parametrize(
    "energy", [Gaussian(3.0), Cauchy(2.0), StudentT(3.0), StudentT(4.0, "multivariate")], ids=name_of
)
@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_mixture_weights_are_on_average_those_of_reweighting(
    energy: Energy, temperature: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``E tau_i / (unit s^2) = w_i / T``: Gibbs' mean is the solver's step. A Gamma's mean is its shape."""
    posterior = posterior_of(InputGram(), (3, 4), energy, temperature, generator)
    q = 5 * torch.rand(6, 1, 2, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(torch, "_standard_gamma", lambda shape, generator: shape)
    found = draw_weights(posterior, q, torch.tensor([1 / temperature], dtype=torch.float64), generator)
    assert_close(found, posterior.weights(q) / temperature)


def test_mixture_weights_vary_as_a_gamma(generator: torch.Generator) -> None:
    """Of shape ``kappa / T``: the variance is the mean squared over the shape."""
    posterior = posterior_of(InputGram(), (3, 4), StudentT(3.0), 0.5, generator)
    size = 200_000
    draws = draw_weights(posterior, torch.ones(size, 1, 2).double(), torch.tensor([2.0]).double(), generator)[:, 0]
    shape = torch.tensor([2.0, 4.0], dtype=torch.float64) * 2.0  # importance (df + 1) / 2 over T
    ratio = draws.var(0) * shape / draws.mean(0).square()
    # The variance of a squared coefficient of variation of Gammas: about (2 + 10 / shape) / n, relative.
    assert bool(((ratio - 1).abs() < 5 * ((2 + 10 / shape) / size).sqrt()).all())


def test_an_expert_that_dropped_out_weighs_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    updates[:, 1] = 0.0
    posterior = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(1.0)).bind(updates)
    found = draw_weights(posterior, torch.ones(5, 1, 2).double(), torch.ones(1).double(), generator)
    assert bool((found[..., 0] > 0).all())
    assert bool((found[..., 1] == 0).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("design", DESIGNS, ids=name_of)
def test_a_state_knows_its_own_energy(design: object, shape: tuple[int, int], generator: torch.Generator) -> None:
    """Residuals are those of the latent; the energy in compressed coordinates replaces a random part by noise.

    Where nothing is compressed it is the latent's energy; the noise outside costs what its latent's anchor costs.
    """
    posterior = posterior_of(design, shape, Cauchy(), 0.7, generator)
    kernel = GibbsKernel(posterior)
    state = kernel.init(3, generator)
    for _ in range(2):
        state, info = kernel.step(state, generator)
        made = [kernel.regenerate(info.weights[c, 0], int(info.seeds[c, 0])) for c in range(3)]
        z = torch.stack(made).unsqueeze(1)
        assert z.shape == (3, 1, *shape)
        assert_close(state.residuals, posterior.residuals(z), 1e-9)
        assert_close(info.energy, posterior.energy(z), 1e-9)


@pytest.mark.parametrize("modules", [1, 2])
def test_draws_are_made_again_from_weights_and_seeds_with_their_energies(
    modules: int, generator: torch.Generator
) -> None:
    updates = random_updates(generator, modules, 2, 3, 4)
    poe = ProductOfExperts.of(NAMES, OutputGram(), Cauchy(), Relative(0.8), temperature=0.5)
    posterior = poe.bind(updates)
    draws = gibbs(posterior, 4, chains=3, warmup=2, generator=generator)
    assert (draws.num_chains, draws.num_draws) == (3, 4)
    assert draws.seeds.shape == (3, 4, modules)
    z = values_of(draws)
    assert z.shape == (3, 4, modules, 3, 4)
    assert_close(draws.stats["lp"], -posterior.energy(z) / 0.5, 1e-9)
    span = poe.bind(updates, coordinates="span")
    kept = gibbs(span, 4, chains=3, warmup=2, generator=generator)
    assert_close(kept.stats["lp"], -span.energy(kept.values) / 0.5, 1e-9)
    for kernel, seeds, latents in ((GibbsKernel(posterior), 2 * modules, 0), (GibbsKernel(span), 0, 2 * modules * 3)):
        _, info = kernel.step(kernel.init(2, generator), generator)
        assert (info.seeds.numel(), info.z.numel()) == (seeds, latents)


def test_steps_are_warmed_up_thinned_and_counted(generator: torch.Generator) -> None:
    posterior = posterior_of(InputGram(), (3, 4), Cauchy(), 1.0, generator)

    def run(num_samples: int, **options: int) -> tuple[Tensor, list[tuple[int, int]]]:
        ticks: list[tuple[int, int]] = []
        draws = gibbs(
            posterior, num_samples, generator=seeded(5), chains=2, progress=lambda i, n: ticks.append((i, n)), **options
        )
        return values_of(draws), ticks

    every, ticks = run(9, warmup=0)
    assert ticks == [(i, 9) for i in range(1, 10)]
    assert every.shape == (2, 9, 1, 3, 4)
    late, ticks = run(2, warmup=3, thin=3)
    assert ticks == [(i, 9) for i in range(1, 10)]
    assert torch.equal(late, every[:, [5, 8]])
    for options in ({"warmup": -1}, {"thin": 0}):
        with pytest.raises(ValueError, match="at least one draw"):
            run(1, **options)
    with pytest.raises(ValueError, match="at least one draw"):
        run(0)
    with pytest.raises(ValueError, match="at least one draw"):
        gibbs(posterior, 1, generator=generator, chains=0)
    draws = gibbs(posterior, 1, generator=generator, chains=1, warmup=0)
    assert (draws.num_chains, draws.num_draws) == (1, 1)


def test_the_anchors_spread_by_hand() -> None:
    shift = torch.tensor([0.0, 0.5, 8.0], dtype=torch.float64)
    assert_close(anchor_spread(shift), torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))


def test_noise_is_standard_normal_and_the_seeds_own() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    noise = seeded_noise(7, (300, 400), like)
    assert torch.equal(noise, seeded_noise(7, (300, 400), like))
    assert not torch.equal(noise, seeded_noise(8, (300, 400), like))
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert seeded_noise(7, (2, 2), like.float()).dtype == torch.float32


def test_gibbs_refuses_what_it_cannot_draw(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="no known Gaussian scale mixture"):
        GibbsKernel(posterior_of(Identity(), (2, 2), Welsch(), 1.0, generator))
    loose = posterior_of(Identity(), (2, 2), Cauchy(), 2.0, generator)
    with pytest.raises(ValueError, match="improper"):
        GibbsKernel(replace(loose, anchor_precision=torch.zeros(1, dtype=torch.float64)))
