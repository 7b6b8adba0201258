"""Draws of the hierarchical model: scales and tails recovered, coverage, seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import arviz as az
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from diagnostics.arviz_adapter import chain_summary, to_inference_data
from inference.evidence.estimate import log_evidence, log_normalizers
from inference.hierarchical.sampler import HierarchicalDraws, HierarchicalModel, gather, hierarchical
from poe_models import (
    Absolute,
    Balanced,
    Energy,
    Gaussian,
    InputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    TaskVectors,
)
from tests.evidences import Fixed
from tests.helpers import random_updates
from tests.hierarchies import ETA, design
from tests.seeds import seed_of, seeded

NAMES = ["a", "b", "c", "d"]


def simulate(
    gamma: Tensor, nu: Tensor, shape: tuple[int, int], size: int, generator: torch.Generator, root: Tensor | None = None
) -> Tensor:
    """Updates `(M, N, 1, D)` from the model itself, under Identity or the fixed covariance `root root^T`.

    `gamma` and `nu` broadcast to `shape = (M, N)`; infinite `nu` is normal.
    """
    z = torch.randn(shape[0], 1, 1, size, generator=generator, dtype=torch.float64) / math.sqrt(2 * ETA)
    noise = torch.randn(*shape, 1, size, generator=generator, dtype=torch.float64)
    noise = noise if root is None else noise @ root.mT
    nu = nu.expand(shape)
    half = torch.where(nu.isinf(), 1.0, nu) / 2
    mixing = torch._standard_gamma(half.contiguous(), generator=generator) / half
    mixing = torch.where(nu.isinf(), 1.0, mixing)
    return z + (gamma / mixing.sqrt()).expand(shape)[..., None, None] * noise


@cache
def recovered(size: int, nu: float) -> HierarchicalDraws:
    """A chain on one model of 30 modules and 4 experts with `gamma = 1`, from a start at other values."""
    generator = seeded(size)
    gamma, df = torch.tensor(1.0, dtype=torch.float64), torch.tensor(nu, dtype=torch.float64)
    updates = simulate(gamma, df, (30, 4), size, generator)
    poe = design(NAMES, StudentT(10.0, "multivariate"), Absolute(2.0))
    return hierarchical(poe, updates, 60, seed=1, chains=1, warmup=60, max_tree_depth=4)


@pytest.mark.parametrize("nu", [3.0, 10.0, math.inf])
@pytest.mark.parametrize("size", [4, 64, 1024])
def test_scale_and_tail_are_recovered_whatever_the_size(size: int, nu: float) -> None:
    draws = recovered(size, nu)
    assert draws.nu is not None
    # The truth is within five posterior standard deviations on the log scale, and these are small where the updates
    # know the scale: Span statistics would say gamma = 28 at 1024 numbers.
    log_gamma = draws.gamma.log()
    assert float(log_gamma.std()) < 0.2
    assert abs(float(log_gamma.mean())) < 5 * float(log_gamma.std())
    log_nu = draws.nu.log()
    if math.isfinite(nu):
        assert abs(float(log_nu.mean()) - math.log(nu)) < 5 * float(log_nu.std())
    else:
        # Tails that are not there: beyond what the prior alone (mean 20) would say in many dimensions.
        assert float(draws.nu.median()) > (10 if size == 4 else 60)


@pytest.mark.slow
def test_nuts_agrees_with_evidence_on_a_grid(generator: torch.Generator) -> None:
    # Posterior of (gamma, nu) by quadrature of importance-sampled evidence: another estimator, without chains.
    truth = torch.tensor(1.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    updates = simulate(*truth, (6, 4), 16, generator)
    poe = design(NAMES, StudentT(4.0, "multivariate"), Absolute(1.0))
    draws = hierarchical(poe, updates, 120, seed=1, chains=2, warmup=60, max_tree_depth=4)
    assert draws.nu is not None
    log_gamma, log_nu = torch.linspace(-0.6, 0.7, 12).double(), torch.linspace(-0.6, 4.8, 13).double()
    density = torch.empty(12, 13, dtype=torch.float64)
    for i, gamma in enumerate(log_gamma.exp().tolist()):
        for j, nu in enumerate(log_nu.exp().tolist()):
            posterior = design(NAMES, StudentT(nu, "multivariate"), Absolute(gamma)).bind(updates)
            density[i, j] = log_evidence(posterior, generator=generator, samples=100).total
    density = density + dist.LogNormal(0.0, 1.0).log_prob(log_gamma.exp()).unsqueeze(-1) + log_gamma.unsqueeze(-1)
    density = density + dist.Gamma(2.0, 0.1).log_prob(log_nu.exp()) + log_nu
    density = torch.softmax(density.flatten(), 0).view(12, 13)
    for values, grid, mass in ((draws.gamma, log_gamma, density.sum(1)), (draws.nu, log_nu, density.sum(0))):
        mean = float((mass * grid).sum())
        deviation = float((mass * (grid - mean).square()).sum().sqrt())
        found = chain_summary(values.log().numpy())
        assert float(found.ess_bulk) > 60
        error = deviation / math.sqrt(float(found.ess_bulk))
        assert abs(float(found.mean) - mean) < 4.9 * error
        assert 0.6 < float(found.sd) / deviation < 1.6


def test_gamma_has_its_exact_posterior(generator: torch.Generator) -> None:
    # With Gaussian energies the evidence is exact, and gamma's posterior is one-dimensional quadrature of it.
    updates = random_updates(generator, 4, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES[:3], InputGram(), Gaussian(), Relative(0.5))
    draws = hierarchical(poe, updates, 240, seed=2, chains=1, warmup=120)
    eta = poe.bind(updates).anchor_precision
    assert torch.equal(draws.eta, eta)
    grid = torch.linspace(0.05, 1.5, 400, dtype=torch.float64)
    evidence, bare = [], []
    for gamma in grid.tolist():
        bound = ProductOfExperts.of(NAMES[:3], InputGram(), Gaussian(), Relative(gamma)).bind(updates)
        fixed = replace(bound, anchor_precision=eta)  # the anchor of the reference, whatever gamma is
        value = log_evidence(fixed, generator=generator)
        evidence.append(value.total)
        bare.append(value.total + float(log_normalizers(fixed).sum()))
    prior = dist.LogNormal(math.log(0.5), 1.0).log_prob(grid)

    def p_value(log_likelihood: list[float]) -> float:
        density = torch.softmax(prior + torch.tensor(log_likelihood, dtype=torch.float64), 0)
        uniform = np.interp(draws.gamma[0, ::3].numpy(), grid.numpy(), density.cumsum(0).numpy())
        return float(stats.kstest(uniform, "uniform").pvalue)

    assert p_value(evidence) > 1e-6
    assert p_value(bare) < 1e-10  # control: without the normalisers it would be another posterior
    assert draws.nu is None


def test_a_gram_like_map_is_recovered(generator: torch.Generator) -> None:
    # A fixed dense covariance in the place of Identity: the same truth.
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64) + 2 * torch.eye(8, dtype=torch.float64)
    truth = torch.tensor([0.5, 0.5, 1.5], dtype=torch.float64), torch.tensor(math.inf, dtype=torch.float64)
    updates = simulate(*truth, (30, 3), 8, generator, root)
    poe = design(NAMES[:3], Gaussian(), Absolute(1.0), Fixed(root @ root.mT))
    draws = hierarchical(poe, updates, 100, seed=1, shared="expert", chains=1, warmup=80)
    assert draws.gamma.shape == (1, 100, 3)
    z = (draws.gamma.log().mean((0, 1)) - truth[0].log()) / draws.gamma.log().std((0, 1))
    assert float(z.abs().max()) < 5
    assert float(draws.gamma.log().std((0, 1)).max()) < 0.1


@cache
def module_wise(size: int) -> tuple[Tensor, Tensor, HierarchicalDraws]:
    """Fifty replications at once: every module has its own `gamma` and `nu`, drawn from the priors."""
    generator = seeded(5)
    torch.manual_seed(seed_of(5))
    gamma_prior, df_prior = dist.LogNormal(0.0, 0.5), dist.Gamma(4.0, 1.0)
    gamma, nu = gamma_prior.sample((50,)).double(), df_prior.sample((50,)).double()
    updates = simulate(gamma[:, None], nu[:, None], (50, 4), size, generator)
    poe = design(NAMES, StudentT(4.0, "multivariate"), Absolute(1.0))
    draws = hierarchical(
        poe, updates, 150, seed=1, shared="module", chains=1, warmup=100,
        gamma_prior=gamma_prior, df_prior=df_prior, max_tree_depth=5,
    )  # fmt: skip
    return gamma, nu, draws


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 64, 1024])
def test_intervals_cover_as_often_as_they_say(size: int) -> None:
    # Over models drawn from the prior, 90 % intervals cover in 90 % of them: bounds at one in a million.
    gamma, nu, draws = module_wise(size)
    assert draws.nu is not None
    for truth, values in ((gamma, draws.gamma), (nu, draws.nu)):
        levels = (values < truth).double().mean((0, 1))
        covered = int(((levels > 0.05) & (levels < 0.95)).sum())
        assert stats.binom.ppf(1e-6, 50, 0.9) <= covered
        assert float(stats.kstest(levels.numpy(), "uniform").pvalue) > 1e-6
    # Control: a scale that is half too wide would be caught.
    wrong = (1.5 * draws.gamma < gamma).double().mean((0, 1))
    assert float(stats.kstest(wrong.numpy(), "uniform").pvalue) < 1e-6


def small(generator: torch.Generator, energy: Energy | None = None) -> tuple[ProductOfExperts, Tensor]:
    updates = random_updates(generator, 2, 2, 3, 3)
    return ProductOfExperts.of(NAMES[:2], InputGram(), energy or Gaussian(), Relative(0.5)), updates


def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(generator: torch.Generator) -> None:
    poe, updates = small(generator, StudentT(5.0, "multivariate"))
    before = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = hierarchical(poe, updates, 6, seed=4, chains=2, warmup=10, progress=lambda i, n: seen.append((i, n)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [(i, 32) for i in range(1, 33)]
    torch.randn(3)
    again = hierarchical(poe, updates, 6, seed=4, chains=2, warmup=10)
    assert torch.equal(first.gamma, again.gamma)
    assert torch.equal(first.update("1", 1, 2), again.update("1", 1, 2))
    assert not torch.equal(first.gamma[0], first.gamma[1])
    assert not torch.equal(first.gamma, hierarchical(poe, updates, 6, seed=5, chains=2, warmup=10).gamma)
    with pytest.raises(ValueError, match="modules are 0, 1"):
        first.update("2", 0, 0)


def test_merged_updates_are_drawn_given_their_weights(generator: torch.Generator) -> None:
    # Many draws at one set of weights: mean and covariance of N(H^-1 b, H^-1 / 2).
    poe, updates = small(generator, StudentT(5.0, "multivariate"))
    draws = hierarchical(poe, updates, 2, seed=4, chains=1, warmup=5)
    (batch,) = draws.updates
    weights = batch.weights[0, 1, 1]
    z = torch.stack([batch.regenerate(1, weights, seed) for seed in range(3000)])
    posterior = poe.bind(updates).module(1)
    grams = torch.stack([expert.operator.gram[0] for expert in posterior.experts])  # type: ignore[attr-defined]
    h = torch.einsum("e,eab->ab", weights, grams) + posterior.anchor_precision * torch.eye(3, dtype=torch.float64)
    b = torch.einsum("e,eab,ebc->ac", weights, updates[1], grams)
    mean, covariance = torch.linalg.solve(h, b.mT).mT, torch.linalg.inv(h) / 2
    deviation = covariance.diagonal().sqrt()
    assert float(((z.mean(0) - mean) / deviation * math.sqrt(3000)).abs().max()) < 4.9
    rows = ((z - mean) @ torch.linalg.cholesky(torch.linalg.inv(covariance))).flatten(0, 1)
    scatter = rows.mT @ rows / len(rows) - torch.eye(3, dtype=torch.float64)
    assert float(scatter.abs().max()) < 4.9 * math.sqrt(2 / len(rows))


@pytest.mark.filterwarnings("ignore:.*trajectories diverged")  # of so few, at some seeds
def test_a_model_of_unequal_modules(generator: torch.Generator) -> None:
    shapes = {"one.weight": (3, 4), "two.weight": (2, 6), "three.weight": (3, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    experts = {
        name: {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for name in NAMES[:2]
    }
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    poe = design(NAMES[:2], StudentT(4.0, "multivariate"), Balanced(1.0), InputGram())
    draws = hierarchical(poe, vectors, 4, seed=0, chains=2, warmup=4, shared="module")
    assert draws.gamma.shape == (2, 4, 3)
    assert set(draws.modules) == set(shapes)
    for name, shape in shapes.items():
        assert draws.update(name, 1, 3).shape == shape
    data = to_inference_data(draws)
    assert data.posterior["gamma"].dims == ("chain", "draw", "module")
    assert list(data.posterior["module"].values) == list(draws.modules)
    assert data.posterior["weights"].dims == ("chain", "draw", "module", "expert")
    assert data.sample_stats["diverging"].shape == (2, 4)


def test_arviz_has_r_hat_for_gamma_and_nu(generator: torch.Generator) -> None:
    poe, updates = small(generator, StudentT(5.0, "multivariate"))
    draws = hierarchical(poe, updates, 30, seed=4, chains=2, warmup=30, max_tree_depth=4)
    assert draws.nu is not None
    table = az.summary(to_inference_data(draws), var_names=["gamma", "nu"], round_to="none")
    assert list(table.index) == ["gamma", "nu"]
    assert table.loc["nu", "r_hat"] == pytest.approx(float(chain_summary(draws.nu.numpy()).r_hat))
    with pytest.raises(ValueError, match="Give them alone"):
        to_inference_data(draws, poe.bind(updates))


def test_divergences_are_counted_and_reported(generator: torch.Generator) -> None:
    poe, updates = small(generator)
    model = HierarchicalModel(poe, updates)
    samples = [{"gamma": torch.rand(4).double() + 0.1} for _ in range(2)]
    diverging = torch.zeros(2, 4, dtype=torch.bool)
    assert gather(model, samples, diverging).num_divergences == 0
    diverging[1, 2] = diverging[0, 0] = True
    with pytest.warns(UserWarning, match="2 of 8 trajectories diverged"):
        draws = gather(model, samples, diverging)
    assert draws.num_divergences == 2
