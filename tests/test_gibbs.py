from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inference.gibbs import gibbs
from inference.laplace import Laplace
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Activation,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    FactorExpert,
    Gaussian,
    Huber,
    Identity,
    InputGram,
    ModuleMoments,
    OutputGram,
    ProductOfExperts,
    Relative,
    ResidualMap,
    StudentT,
    average,
    span_statistics,
)
from poe_models.posterior import Posterior
from tests.helpers import assert_close, name_of, random_updates
from tests.levels import chi_squared_bound
from tests.sampling import made_again, values_of
from tests.seeds import seed_of, seeded

NAMES = ["a", "b", "c"]


def grid_moments(posterior: Posterior, half_width: float, points: int = 1201) -> tuple[Tensor, Tensor]:
    """Mean and second moments of a two-dimensional posterior of one module by brute force on a grid."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    z = torch.stack([first.flatten(), second.flatten()], -1).view(-1, 1, *posterior.event_shape)
    log_density = -posterior.energy(z).squeeze(-1) / posterior.temperature
    weights = torch.softmax(log_density, 0)
    flat = z.flatten(1)
    edge = weights[(flat.abs() > 0.98 * half_width).any(-1)].sum()
    assert float(edge) < 1e-6, "the grid cuts the posterior off"
    return weights @ flat, flat.mT @ (weights.unsqueeze(-1) * flat)


def standard_error(chain_values: Tensor) -> Tensor:
    """Standard error of the mean of `(C, S, ...)` values from the spread of batch means (20 per chain)."""
    chains, draws = chain_values.shape[:2]
    batches = chain_values.view(chains * 20, draws // 20, *chain_values.shape[2:]).mean(1)
    return batches.std(0) / math.sqrt(chains * 20)


@pytest.mark.parametrize(
    ("energy", "temperature"),
    [(Cauchy(), 1.0), (Cauchy(2.5), 0.5), (StudentT(2.0), 1.0), (StudentT(5.0, 3.0), 2.0), (Gaussian(2.0), 0.7)],
    ids=name_of,
)
def test_agrees_with_a_grid_in_two_dimensions(energy: object, temperature: float, generator: torch.Generator) -> None:
    # A skewed target: three experts of different importance, off the centre.
    updates = torch.tensor([[[[1.0, 0.2]], [[2.0, -1.5]], [[-0.5, 2.5]]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        NAMES, Identity(), energy, Absolute(0.6), [1.0, 0.6, 2.0],
        Anchor(precision=AbsolutePrecision(0.05)), temperature,
    )  # type: ignore[arg-type]  # fmt: skip
    posterior = poe.bind(updates)
    mean, second = grid_moments(posterior, 40.0)
    draws = gibbs(posterior, 5000, generator=generator, chains=8, warmup=200)
    values = made_again(posterior, draws).flatten(2)
    products = values.unsqueeze(-1) * values.unsqueeze(-2)
    assert bool(((values.mean((0, 1)) - mean).abs() < 5 * standard_error(values)).all())
    assert bool(((products.mean((0, 1)) - second).abs() < 5 * standard_error(products)).all())


def test_a_wrong_temperature_would_be_noticed(generator: torch.Generator) -> None:
    updates = torch.tensor([[[[1.0, 0.2]], [[2.0, -1.5]]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        NAMES[:2], Identity(), Cauchy(), Absolute(0.6), anchor=Anchor(precision=AbsolutePrecision(0.05))
    )
    _, second = grid_moments(poe.bind(updates), 40.0)
    warm = ProductOfExperts(poe.experts, poe.anchor, 1.1).bind(updates)
    values = made_again(warm, gibbs(warm, 5000, generator=generator, chains=8)).flatten(2)
    products = values.square()
    gap = (products.mean((0, 1)) - second.diagonal()).abs()
    assert bool((gap > 5 * standard_error(products)).any())


@pytest.mark.parametrize(
    "residual_map", [Identity(), Directional(), OutputGram(), InputGram(), (OutputGram(), InputGram())], ids=name_of
)
@pytest.mark.parametrize("shape", [(2, 3), (1, 8), (8, 1)])
def test_gaussian_draws_are_the_exact_normal(
    residual_map: object, shape: tuple[int, int], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, *shape)
    poe = ProductOfExperts.of(
        NAMES, residual_map, Gaussian(), Relative(1.0), [1.0, 0.5, 2.0], Anchor(average, AbsolutePrecision(0.3)), 0.5
    )  # type: ignore[arg-type]
    posterior = poe.bind(updates)
    draws = gibbs(poe.bind(updates), 1500, generator=generator, chains=2, warmup=0)
    latents = torch.stack([draws.latents(c, s).flatten(1) for c in range(2) for s in range(1500)], 1)
    for module, z in enumerate(latents):

        def energy(flat: Tensor, module: int = module) -> Tensor:
            whole = torch.zeros(2, *shape, dtype=torch.float64)
            return posterior.energy(torch.stack([flat.view(shape) if m == module else whole[m] for m in range(2)]))[
                module
            ]

        origin = torch.zeros(math.prod(shape), dtype=torch.float64)
        hessian = torch.func.hessian(energy)(origin)
        mean = -torch.linalg.solve(hessian, torch.func.grad(energy)(origin))
        white = torch.linalg.cholesky(hessian / 0.5).mT @ (z - mean).mT
        assert float(white.mean(1).abs().max()) < 5 / math.sqrt(3000)
        assert float((white @ white.mT / 3000 - torch.eye(len(white))).abs().max()) < 5 * math.sqrt(2 / 3000)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_compression_and_span_do_not_change_the_distribution(temperature: float, generator: torch.Generator) -> None:
    # One row: InputGram compresses 12 inputs to 3 directions; the energy along the way must have the same law.
    updates = random_updates(generator, 1, 3, 1, 12)
    poe = ProductOfExperts.of(
        NAMES, InputGram(), StudentT(3.0), Relative(1.0), [1.0, 0.5, 2.0], Anchor(precision=AbsolutePrecision(1.0)),
        temperature,
    )  # fmt: skip
    posterior = poe.bind(updates)
    draws = gibbs(poe.bind(updates), 4000, generator=generator, chains=4)
    z = torch.stack([torch.stack([draws.latents(c, s) for s in range(0, 4000, 4)]) for c in range(4)])
    recomputed = -posterior.energy(z) / temperature
    assert_close(recomputed, draws.stats["lp"][:, ::4], 1e-8)
    # Outside the span of the updates the posterior is the anchor's: variance T / (2 eta).
    basis = torch.linalg.svd(updates[0, :, 0], full_matrices=True).Vh[3:]
    outside = (z.flatten(2) @ basis.mT).flatten()
    truth = float(temperature / (2 * posterior.anchor_precision))
    assert abs(float(outside.square().mean()) / truth - 1) < 5 * math.sqrt(2 / outside.numel())


@pytest.mark.parametrize("moments", [None, [[2.0, 0.9], [0.9, 0.5]]], ids=["Identity", "Activation"])
def test_simulation_based_calibration(moments: list[list[float]] | None, generator: torch.Generator) -> None:
    """Talts et al. (2018), arXiv 1804.06788: with U_i ~ p(U_i | Z), ranks of the true Z among draws are uniform.

    Experts with the multivariate exponent are Student-t densities of U_i given Z; P does not depend on U_i.
    """
    simulations, kept, eta, df, scale = 300, 15, 0.5, 3.0, 0.8
    truth = torch.randn(simulations, 2, 2, generator=generator, dtype=torch.float64) / math.sqrt(2 * eta)
    gamma = torch.distributions.Gamma(df / 2, 0.5)
    torch.manual_seed(seed_of(7))
    mixing = gamma.sample((simulations, 3)).double()[..., None, None]
    noise = torch.randn(simulations, 3, 2, 2, generator=generator, dtype=torch.float64)
    residual_map: ResidualMap = Identity()
    modules = [str(i) for i in range(simulations)]
    if moments is not None:
        matrix = torch.tensor(moments, dtype=torch.float64)
        noise = noise @ torch.linalg.inv(torch.linalg.cholesky(matrix))  # rows of covariance matrix^-1
        given = {name: dict.fromkeys(modules, matrix) for name in NAMES}
        residual_map = Activation(ModuleMoments("activations", given))
    updates = truth.unsqueeze(1) + scale * noise * (df / mixing).sqrt()
    poe = ProductOfExperts.of(
        NAMES,
        residual_map,
        StudentT(df, "multivariate"),
        Absolute(scale),
        anchor=Anchor(precision=AbsolutePrecision(eta)),
    )
    posterior = poe.for_modules(modules).bind(updates)
    draws = gibbs(posterior, kept, generator=generator, chains=1, warmup=200, thin=20)
    values = made_again(posterior, draws)[0]

    def chi_squared(shift: float) -> Tensor:
        """Of each entry on its own, `(4,)`: those of one simulation are dependent."""
        ranks = (values + shift < truth).sum(0).flatten(1)
        counts = torch.stack([torch.bincount(entry, minlength=kept + 1) for entry in ranks.mT])
        expected = simulations / (kept + 1)
        return (counts - expected).square().sum(-1) / expected

    bound = chi_squared_bound(kept, tests=4)
    assert float(chi_squared(0.0).max()) < bound
    assert float(chi_squared(0.5).min()) > bound


def test_seeds_decide_everything_and_draws_regenerate_bit_for_bit(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 4)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    runs = [gibbs(poe.bind(updates), 5, generator=seeded(3), chains=2, warmup=3) for _ in range(2)]
    assert torch.equal(runs[0].seeds, runs[1].seeds)
    assert torch.equal(runs[0].latents(1, 4), runs[1].latents(1, 4))
    assert torch.equal(runs[0].latents(1, 4), runs[0].latents(1, 4))
    # A draw has the energy that the chain had, though it is made again module by module.
    z = runs[0].latents(1, 4)
    assert_close(-poe.bind(updates).energy(z), runs[0].stats["lp"][1, 4], 1e-10)
    assert not torch.equal(runs[0].latents(1, 4), runs[0].latents(1, 3))


def test_modules_of_a_batch_are_independent_of_each_other(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 3)
    poe = ProductOfExperts.of(["a", "b"], OutputGram(), Cauchy(), Relative(0.5))
    posterior = poe.bind(span_statistics(poe, updates))
    alone = poe.bind(span_statistics(poe, updates[1:2]))
    together = gibbs(posterior, 6000, generator=generator).values[:, :, 1].flatten(2)
    single = gibbs(alone, 6000, generator=generator).values[:, :, 0].flatten(2)
    error = (standard_error(together).square() + standard_error(single).square()).sqrt().clamp(min=1e-12)
    difference = together.mean((0, 1)) - single.mean((0, 1))
    assert float((difference / error).abs().max()) < 5


@pytest.mark.parametrize("energy", [Gaussian(), Cauchy()], ids=name_of)
def test_an_update_that_is_rounding_beside_the_others_drops_out_as_one_that_is_zero(
    energy: Energy, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), energy, anchor=Anchor(precision=AbsolutePrecision(0.3)))
    values = []
    for size in (1e-17, 0.0):
        updates[0, 2] *= size
        posterior = poe.bind(updates)
        assert posterior.active.tolist() == [[True, True, False], [True, True, True]]
        values.append(values_of(gibbs(posterior, 5, generator=seeded(0))))
    assert_close(values[0], values[1], 1e-12)


def test_directional_experts_that_span_everything_need_no_anchor(generator: torch.Generator) -> None:
    # Two entries and two experts: along each update an independent Student-t of five degrees of freedom.
    updates = random_updates(generator, 1, 2, 1, 2)
    poe = ProductOfExperts.of(
        NAMES[:2], Directional(), Cauchy(3.0), Absolute(0.7), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    posterior = poe.bind(updates)
    vectors = updates[0].flatten(1)
    draws = gibbs(poe.bind(updates), 1200, generator=generator)
    z = torch.stack([torch.stack([draws.latents(c, s).flatten() for s in range(1200)]) for c in range(4)])
    along = z @ vectors.mT - vectors.square().sum(-1)
    assert bool((along.mean((0, 1)).abs() < 5 * standard_error(along)).all())
    assert bool(((along.square().mean((0, 1)) - 0.49 / 3).abs() < 5 * standard_error(along.square())).all())
    approximation = Laplace(posterior, torch.linalg.solve(vectors, vectors.square().sum(-1)).view(1, 1, 2))
    covariance = 0.49 / 6 * torch.linalg.inv(vectors.mT @ vectors)
    assert_close(approximation.standard_deviations().flatten(), covariance.diagonal().sqrt(), 1e-9)
    sampled = approximation.sample(4000, generator)
    values = torch.stack([sampled.latents(0, s).flatten() for s in range(4000)])
    assert float((values.std(0) / covariance.diagonal().sqrt() - 1).abs().max()) < 5 / math.sqrt(8000)


def test_progress_is_reported(generator: torch.Generator) -> None:
    seen: list[tuple[int, int]] = []
    poe = ProductOfExperts.of(NAMES)
    gibbs(
        poe.bind(random_updates(generator, 1, 3, 2, 2)),
        3,
        generator=generator,
        warmup=2,
        thin=2,
        progress=lambda i, n: seen.append((i, n)),
    )
    assert seen == [(i, 8) for i in range(1, 9)]


def test_energies_without_a_mixture_name_the_way_out(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 2)
    with pytest.raises(ValueError, match="Huber.*`slice_sample` or `nuts`"):
        gibbs(ProductOfExperts.of(NAMES, InputGram(), Huber(1.0)).bind(updates), 1, generator=generator)
    poe = ProductOfExperts.of(NAMES) * FactorExpert("f", lambda c: c.sum(-1), "span")
    posterior = poe.bind(span_statistics(poe, updates))
    with pytest.raises(ValueError, match="FactorExpert"):
        gibbs(posterior, 1, generator=generator)
    improper = ProductOfExperts.of(NAMES, InputGram(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="improper"):
        gibbs(improper.bind(random_updates(generator, 1, 3, 4, 4)), 1, generator=generator)
