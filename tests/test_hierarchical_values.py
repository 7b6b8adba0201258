"""The hierarchical model's priors, starts and change of variables, at values worked by hand."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.hierarchical.model import HierarchicalModel, _mean_and_curvature
from inference.hierarchical.requirements import Shared
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Energy,
    Gaussian,
    Identity,
    InputGram,
    NormScaled,
    ProductOfExperts,
    StudentT,
)
from tests.helpers import assert_close, random_updates

ETA, GAMMA = 0.4, 1.5
SIZES: dict[Shared, tuple[int, ...]] = {"model": (), "expert": (3,), "module": (2,)}


def model_of(updates: Tensor, energy: Energy, shared: Shared = "model") -> HierarchicalModel:
    anchor = Anchor(None, AbsolutePrecision(ETA))
    poe = ProductOfExperts.of(["a", "b", "c"], Identity(), energy, Absolute(GAMMA), anchor=anchor)
    return HierarchicalModel(poe, updates, shared)


def identity_mean_and_curvature(updates: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``E[q_i] = |m - U_i|^2 + D / 2h`` with ``h = sum w + eta`` and ``m = sum w U / h``; and its slope in ``w_i``."""
    size = updates[0, 0].numel()
    h = weights.sum(-1, keepdim=True) + ETA
    m = (weights[..., None, None] * updates).sum(1) / h.unsqueeze(-1)
    away = (m.unsqueeze(1) - updates).square().sum((-2, -1))
    return away + size / 2 / h, -2 * away / h - size / 2 / h.square()


@pytest.mark.parametrize("shared", ["model", "expert", "module"])
def test_priors_are_around_the_designs_scale(shared: Shared, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    model = model_of(updates, StudentT(3.0, "multivariate"), shared)
    shape = SIZES[shared]
    gamma = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    wanted = dist.LogNormal(math.log(GAMMA), torch.ones((), dtype=torch.float64)).log_prob(gamma).sum()
    assert_close(model.gamma_prior.log_prob(gamma), wanted)
    wanted = dist.Gamma(gamma.new_tensor(2.0), gamma.new_tensor(0.1)).log_prob(gamma).sum()
    assert_close(model.df_prior.log_prob(gamma), wanted)
    white = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    assert_close(model.white_prior.log_prob(white), -(white.square() / 2).sum() - 3 * math.log(2 * math.pi))


@pytest.mark.parametrize("shared", ["model", "expert", "module"])
def test_starts_are_draws_of_the_priors_in_unconstrained_coordinates(
    shared: Shared, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = model_of(updates, StudentT(3.0, "multivariate"), shared).start()
        gaussian = model_of(updates, Gaussian(), shared).start()
    assert {name: value.shape for name, value in found.items()} == {
        "gamma": SIZES[shared],
        "nu": SIZES[shared],
        "white": (2, 3),
    }
    assert list(gaussian) == ["gamma"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_of(updates, StudentT(3.0, "multivariate"), shared)
        gamma, nu, white = model.gamma_prior.sample(), model.df_prior.sample(), model.white_prior.sample()
    assert_close(found["gamma"], gamma.log())
    assert_close(found["nu"], nu.log())
    assert_close(found["white"], white)


@pytest.mark.parametrize("heavy", [False, True])
def test_first_variances_count_what_is_known(heavy: bool, generator: torch.Generator) -> None:
    """Six entries an expert: ``log s^2`` has variance 2 / 6, and 0.2 more where weights vary. One update is missing."""
    updates = random_updates(generator, 2, 3, 2, 3)
    updates[1, 2] = 0.0
    energy: Energy = StudentT(3.0, "multivariate") if heavy else Gaussian()
    anchor = Anchor(None, AbsolutePrecision(ETA))
    for scale, power in ((Absolute(GAMMA), 2), (NormScaled(GAMMA), 1)):
        poe = ProductOfExperts.of(["a", "b", "c"], InputGram(), energy, scale, anchor=anchor)
        for shared, counts in (("model", [5]), ("expert", [2, 2, 1]), ("module", [3, 2])):
            found = HierarchicalModel(poe, updates, shared).first_variances()  # type: ignore[arg-type]
            count = torch.tensor(counts, dtype=torch.float64)
            # InputGram of two rows has rank 2 times 2: four entries are seen.
            known = (count / (2 / 4 + (0.2 if heavy else 0.0))).clamp(min=0.25)
            assert_close(found["gamma"].reshape(-1), 4 * (1 / (power**2 * known)).clamp(max=1))
            assert_close(found["nu"].reshape(-1), (10 / count).clamp(max=0.5))
            assert float(found["white"]) == 1.0


def test_variances_of_few_and_of_many_are_bounded(generator: torch.Generator) -> None:
    one = ProductOfExperts.of(
        ["a"], Identity(), Gaussian(), NormScaled(GAMMA), anchor=Anchor(None, AbsolutePrecision(ETA))
    )
    few = HierarchicalModel(one, random_updates(generator, 1, 1, 1, 1)).first_variances()
    assert float(few["gamma"]) == 4.0  # one number: variance 2, cut to 1
    assert float(few["nu"]) == 0.5
    many = HierarchicalModel(one, random_updates(generator, 25, 1, 1, 1)).first_variances()
    assert_close(many["gamma"], torch.tensor(4 * 2 / 25, dtype=torch.float64))
    assert_close(many["nu"], torch.tensor(10 / 25, dtype=torch.float64))


def test_mean_residuals_and_their_slopes(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    model = model_of(updates, Gaussian())
    weights = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.2
    mean, curvature = _mean_and_curvature(model.integrals[0], weights)
    wanted, slope = identity_mean_and_curvature(updates, weights)
    assert_close(mean, wanted, 1e-9)
    assert_close(curvature, slope, 1e-3)  # by a difference of 1e-4 of the weight


def test_white_is_conjugate_to_the_likelihood_at_typical_weights(generator: torch.Generator) -> None:
    """``A = alpha - D / 2 + d / 2`` and ``R = unit s^2 + r``: matching value and slope of the log likelihood of w."""
    updates = random_updates(generator, 2, 3, 2, 3)
    model = model_of(updates, StudentT(3.0, "multivariate"))
    (posterior,) = model.posteriors
    weights = torch.stack([posterior.residuals(e.update) for e in posterior.experts]).mean(0)
    weights = posterior.weights(weights)
    for _ in range(200):
        weights = posterior.weights(identity_mean_and_curvature(updates, weights)[0])
    mean, slope = identity_mean_and_curvature(updates, weights)
    flat = (mean + weights * slope).clamp(min=1e-3 * mean)
    assert_close(model.mean_residual, flat, 1e-3)
    half_count = 6 / 2 + weights * (flat - mean)
    assert_close(model.half_count, half_count.clamp(min=0.0), 1e-3)
    gamma, nu = torch.tensor(1.2, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    white = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    sharp, rate = 4.0 / 2 + model.half_count, 4.0 * 1.2**2 + model.mean_residual
    assert_close(model.weights(gamma, nu, white), sharp / rate * (white / sharp.sqrt()).exp())


def test_numbers_beyond_float64_have_no_density(generator: torch.Generator) -> None:
    """A weight of ``e^600`` is the limit: half of ``e^-2g`` of a Gaussian expert at ``gamma = e^g``."""
    model = model_of(random_updates(generator, 2, 3, 2, 3), Gaussian())
    for log_gamma, finite in ((-299.0, True), (-301.0, False), (299.0, True), (301.0, False)):
        gamma = torch.tensor([math.exp(log_gamma), 1.0], dtype=torch.float64)
        found, _ = model.log_density(gamma, None, None)
        assert found.shape == (2,)
        assert [bool(x) for x in found.isfinite()] == [finite, True]
        assert finite or float(found[0]) == -math.inf
