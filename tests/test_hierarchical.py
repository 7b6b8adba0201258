from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from inference import solve_posterior
from inference.evidence import annealed_evidence, log_evidence, log_normalizers, with_restricted_exponents
from inference.hierarchical import HierarchicalDraws, HierarchicalModel, Shared, _gather, hierarchical
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Directional,
    Energy,
    Expert,
    FactorExpert,
    Gaussian,
    Huber,
    Identity,
    InputGram,
    NormScaled,
    ProductOfExperts,
    Relative,
    Scale,
    SpanStatistics,
    StudentT,
    Welsch,
    average,
    span_posterior,
    span_statistics,
)
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seed_of, seeded

ETA = 0.5


def design(names: list[str], energy: Energy, scale: Scale) -> ProductOfExperts:
    return ProductOfExperts.of(names, Identity(), energy, scale, anchor=Anchor(precision=AbsolutePrecision(ETA)))


def simulate(gamma: Tensor, nu: Tensor, shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`Z` and updates of two numbers per module, `(M, 1, 2)` and `(M, N, 1, 2)`, from the model itself.

    With two numbers and at least two experts the span is everything, so that Span and Full are the same model, and
    Identity does not depend on the updates. `gamma` and `nu` broadcast to `shape = (M, N)`; infinite `nu` is normal.
    """
    z = torch.randn(shape[0], 1, 1, 2, generator=generator, dtype=torch.float64) / math.sqrt(2 * ETA)
    noise = torch.randn(*shape, 1, 2, generator=generator, dtype=torch.float64)
    nu = nu.expand(shape)
    half = torch.where(nu.isinf(), torch.ones_like(nu), nu) / 2
    mixing = torch._standard_gamma(half.contiguous(), generator=generator) / half
    mixing = torch.where(nu.isinf(), torch.ones_like(mixing), mixing)
    return z.squeeze(1), z + (gamma / mixing.sqrt()).expand(shape)[..., None, None] * noise


def interval(draws: Tensor, level: float = 0.99) -> tuple[float, float]:
    low, high = torch.quantile(draws.flatten(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype))
    return float(low), float(high)


# The model


@pytest.mark.parametrize("shared", ["model", "expert", "module"])
@pytest.mark.parametrize(
    ("residual_map", "energy", "scale"),
    [
        (InputGram(), StudentT(3.0, "multivariate"), Relative(0.7)),
        (InputGram(), Cauchy("multivariate"), NormScaled(0.5)),
        (Directional(), Huber(1.0), Absolute(2.0)),
        ((InputGram(), Identity()), Gaussian(1.5), Relative(1.3)),
    ],
    ids=name_of,
)
def test_density_is_priors_times_anchor_times_normalised_experts(
    residual_map: object, energy: Energy, scale: Scale, shared: Shared, generator: torch.Generator
) -> None:
    # Two routes: Pyro's trace, and a posterior bound at the drawn gamma and nu, with the Jacobian by autograd.
    updates = random_updates(generator, 2, 3, 4, 5)
    names, weights, temperature = ["a", "b", "c"], [1.0, 2.0, 1.5], 0.7
    poe = ProductOfExperts.of(names, residual_map, energy, scale, weights, Anchor(average), temperature)  # type: ignore[arg-type]
    statistics = span_statistics(poe, updates)
    model = HierarchicalModel(poe, statistics, shared)
    trace = poutine.trace(model).get_trace()
    value = {name: trace.nodes[name]["value"] for name in ("gamma", "white", "update")}
    expected = model.gamma_prior.log_prob(value["gamma"])
    nu = trace.nodes["nu"]["value"] if model.has_df else None
    assert model.has_df == isinstance(energy, StudentT)
    if nu is not None:
        expected = expected + model.df_prior.log_prob(nu)
    reference, _ = span_posterior(poe, statistics)
    eta, x = reference.anchor_precision, value["update"]
    assert reference.center is not None
    expected = (
        expected + dist.Normal(reference.center, (0.5 * temperature / eta).sqrt()[:, None, None]).log_prob(x).sum()
    )
    for m in range(2):
        for i, expert in enumerate(poe.experts):
            pick = {"model": (), "expert": (i,), "module": (m,)}[shared]
            df = 1.0 if nu is None else float(nu[pick])
            own = StudentT(df, "multivariate") if isinstance(energy, StudentT) else energy
            rescaled = type(scale)(float(value["gamma"][pick]))  # type: ignore[call-arg]
            single = replace(expert, energy=own, scale=rescaled)
            one = replace(poe, experts=tuple(single if e.name == expert.name else e for e in poe.experts))
            bound = with_restricted_exponents(one, span_posterior(one, statistics)[0])
            expected = expected - bound.experts[i].energy(x)[m] / temperature - log_normalizers(bound)[m, i]

    def update_of(white: Tensor) -> Tensor:
        return model.latents(model.eigencoordinates(white.view(2, 4), value["gamma"], nu)[0]).flatten()

    jacobian = torch.func.jacrev(update_of)(value["white"].flatten())
    expected = expected + torch.linalg.slogdet(jacobian)[1]
    assert_close(update_of(value["white"].flatten()), x.flatten(), 1e-12)
    assert_close(trace.log_prob_sum(), expected, 1e-9)
    assert [name for name in trace.nodes if name.startswith("expert/")] == [f"expert/{e.name}" for e in poe.experts]


def test_an_expert_that_is_rounding_beside_the_others_says_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    updates[:, 2] *= 1e-17
    poe = ProductOfExperts.of(["a", "b", "c"], InputGram(), StudentT(3.0, "multivariate"), Relative(0.7))
    model = HierarchicalModel(poe, span_statistics(poe, updates))
    y = torch.randn(5, 1, 4, generator=generator, dtype=torch.float64)
    gamma, nu = (torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.5).unbind()
    likelihood = model.log_likelihood(y, gamma, nu)
    assert float(likelihood[..., 2].abs().max()) == 0
    assert float(likelihood[..., :2].abs().min()) > 0.01


def test_integrating_the_update_out_gives_the_evidence(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 4, 5)
    anchor = Anchor(precision=AbsolutePrecision(0.02))
    poe = ProductOfExperts.of(["a", "b", "c"], InputGram(), StudentT(3.0, "multivariate"), Relative(0.4), anchor=anchor)
    statistics = span_statistics(poe, updates)
    model = HierarchicalModel(poe, statistics)
    other = ProductOfExperts.of(
        ["a", "b", "c"], InputGram(), StudentT(6.0, "multivariate"), Relative(0.6), anchor=anchor
    )
    gamma, nu = torch.tensor(0.6, dtype=torch.float64), torch.tensor(6.0, dtype=torch.float64)
    truth = annealed_evidence(
        with_restricted_exponents(other, span_posterior(other, statistics)[0]), generator=generator, particles=1000
    )
    # Importance sampling in the whitened coordinates, from twice their standard deviation.
    white = 2 * torch.randn(40_000, 3, 4, generator=generator, dtype=torch.float64)
    y, volume = model.eigencoordinates(white, gamma, nu)
    log_anchor = 2 * (model.shift / math.pi).log() - model.shift * y.square().sum(-1)
    log_proposal = dist.Normal(0.0, 2.0).log_prob(white).sum(-1)
    weights = log_anchor + volume + model.log_likelihood(y, gamma, nu).sum(-1) - log_proposal
    estimate = torch.logsumexp(weights, 0) - math.log(len(weights))
    relative = (weights - estimate).exp()
    assert truth.standard_error is not None
    error = (relative.var(0) / len(weights) + truth.standard_error.square()).sqrt()
    assert float(error.max()) < 0.1
    assert float(((estimate - truth.value) / error).abs().max()) < 4


# Recovery


def test_gamma_has_its_exact_posterior(generator: torch.Generator) -> None:
    # With Gaussian energies the evidence is exact, and gamma's posterior is one-dimensional quadrature of it.
    updates = random_updates(generator, 4, 3, 4, 5)
    poe = ProductOfExperts.of(["a", "b", "c"], InputGram(), Gaussian(), Relative(0.5))
    statistics = span_statistics(poe, updates)
    draws = hierarchical(poe, statistics, 240, seed=2, chains=1, warmup=120)
    eta = span_posterior(poe, statistics)[0].anchor_precision
    assert torch.equal(draws.eta, eta)
    grid = torch.linspace(0.05, 1.5, 150, dtype=torch.float64)
    evidence, bare = [], []
    for gamma in grid.tolist():
        bound, _ = span_posterior(
            ProductOfExperts.of(["a", "b", "c"], InputGram(), Gaussian(), Relative(gamma)), statistics
        )
        fixed = replace(bound, anchor_precision=eta)  # the anchor of the reference, whatever gamma is
        value = log_evidence(fixed, solve_posterior(fixed).value)
        evidence.append(value.total)
        bare.append(value.total + float(log_normalizers(fixed).sum()))
    prior = dist.LogNormal(math.log(0.5), 1.0).log_prob(grid)

    def p_value(log_likelihood: list[float]) -> float:
        density = torch.softmax(prior + torch.tensor(log_likelihood, dtype=torch.float64), 0)
        uniform = np.interp(draws.gamma[0, ::3].numpy(), grid.numpy(), density.cumsum(0).numpy())
        return float(stats.kstest(uniform, "uniform").pvalue)

    assert p_value(evidence) > 1e-3
    assert p_value(bare) < 1e-10  # control: without the normalisers it would be another posterior
    assert draws.nu is None
    # The first latent is padding (the anchor's centre is zero); the others are recovered from the coefficients.
    recovered = draws.coordinates.latents(draws.coefficients[0, 0])
    assert_close(recovered[:, 1:], draws.updates.latents(0, 0)[:, 1:], 1e-9)


def test_one_tail_for_the_whole_model_is_recovered() -> None:
    generator = seeded(3)
    gamma, nu = torch.tensor(0.3, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    _, updates = simulate(gamma, nu, (40, 4), generator)
    poe = design(["a", "b", "c", "d"], StudentT(10.0, "multivariate"), Absolute(0.5))
    draws = hierarchical(poe, span_statistics(poe, updates), 120, seed=3, chains=1, warmup=120, max_tree_depth=5)
    assert draws.num_divergences == 0
    assert draws.nu is not None
    low, high = interval(draws.gamma)
    assert low < 0.3 < high < 1.8 * low
    low, high = interval(draws.nu)
    assert low < 3 < high < 20


def test_every_task_gets_its_own_scale_and_tail(generator: torch.Generator) -> None:
    gamma = torch.tensor([0.6, 0.6, 0.3, 0.3], dtype=torch.float64)
    nu = torch.tensor([2.0, 2.0, math.inf, math.inf], dtype=torch.float64)
    _, updates = simulate(gamma, nu, (50, 4), generator)
    poe = design(["a", "b", "c", "d"], StudentT(10.0, "multivariate"), Absolute(0.5))
    statistics = span_statistics(poe, updates)
    draws = hierarchical(poe, statistics, 100, seed=3, shared="expert", chains=1, warmup=110, max_tree_depth=5)
    assert draws.num_divergences == 0
    assert draws.nu is not None
    assert draws.gamma.shape == draws.nu.shape == (1, 100, 4)
    for i in range(4):
        low, high = interval(draws.gamma[..., i])
        assert low < float(gamma[i]) < high < 3 * low
    for heavy in (0, 1):
        low, high = interval(draws.nu[..., heavy])
        assert low < 2 < high < 20
    assert float(draws.nu[..., 2:].median()) > 10


@cache
def module_wise() -> tuple[Tensor, Tensor, HierarchicalDraws]:
    """Fifty replications at once: every module has its own `gamma` and `nu`, drawn from the priors."""
    generator = seeded(5)
    torch.manual_seed(seed_of(5))
    gamma_prior, df_prior = dist.LogNormal(-1.0, 0.5), dist.Gamma(4.0, 1.0)
    gamma, nu = gamma_prior.sample((50,)).double(), df_prior.sample((50,)).double()
    _, updates = simulate(gamma[:, None], nu[:, None], (50, 3), generator)
    poe = design(["a", "b", "c"], StudentT(4.0, "multivariate"), Absolute(0.4))
    draws = hierarchical(
        poe, span_statistics(poe, updates), 160, seed=1, shared="module", chains=1, warmup=120,
        gamma_prior=gamma_prior, df_prior=df_prior, max_tree_depth=5,
    )  # fmt: skip
    return gamma, nu, draws


def rank_p_value(truth: Tensor, draws: Tensor) -> float:
    """Simulation-based calibration (Talts et al., 2018, arXiv 1804.06788): ranks of the truth are uniform."""
    thinned = draws[0, ::5]
    jitter = torch.rand(len(truth), generator=seeded(1), dtype=torch.float64)
    ranks = ((thinned < truth).sum(0) + jitter) / (len(thinned) + 1)
    return float(stats.kstest(ranks.numpy(), "uniform").pvalue)


@pytest.mark.slow
def test_ranks_of_the_truth_are_uniform() -> None:
    gamma, nu, draws = module_wise()
    assert draws.num_divergences == 0
    assert draws.nu is not None
    assert rank_p_value(gamma, draws.gamma) > 1e-3
    assert rank_p_value(nu, draws.nu) > 1e-3
    # Controls: a third too wide a scale, or a tail that is too light, would be caught.
    assert rank_p_value(gamma, 1.33 * draws.gamma) < 1e-3
    assert rank_p_value(nu, 2 * draws.nu) < 1e-3


# Randomness and reports


def small(generator: torch.Generator) -> tuple[ProductOfExperts, SpanStatistics]:
    updates = random_updates(generator, 2, 2, 3, 3)
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.5))
    return poe, span_statistics(poe, updates)


def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(generator: torch.Generator) -> None:
    poe, statistics = small(generator)
    before = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = hierarchical(poe, statistics, 6, seed=4, chains=2, warmup=10, progress=lambda i, n: seen.append((i, n)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [(i, 32) for i in range(1, 33)]
    torch.randn(3)
    again = hierarchical(poe, statistics, 6, seed=4, chains=2, warmup=10)
    assert torch.equal(first.gamma, again.gamma)
    assert torch.equal(first.updates.values, again.updates.values)
    assert not torch.equal(first.gamma[0], first.gamma[1])
    assert not torch.equal(first.gamma, hierarchical(poe, statistics, 6, seed=5, chains=2, warmup=10).gamma)


def test_divergences_are_counted_and_reported(generator: torch.Generator) -> None:
    poe, statistics = small(generator)
    model = HierarchicalModel(poe, statistics)
    samples = [{"gamma": torch.rand(4).double(), "white": torch.randn(4, 2, 3).double()} for _ in range(2)]
    diverging = torch.zeros(2, 4, dtype=torch.bool)
    assert _gather(model, samples, diverging).num_divergences == 0
    diverging[1, 2] = diverging[0, 0] = True
    with pytest.warns(UserWarning, match="2 of 8 trajectories diverged"):
        draws = _gather(model, samples, diverging)
    assert draws.num_divergences == 2
    assert draws.updates.stats["diverging"].shape == (2, 4, 2)


# Bad input


@pytest.mark.parametrize("energy", [Welsch(), Custom(torch.sqrt), Cauchy()], ids=name_of)
def test_bare_energies_are_refused_by_name(energy: Energy, generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["a", "b"], InputGram(), energy)
    statistics = span_statistics(poe, random_updates(generator, 2, 2, 3, 4))
    with pytest.raises(ValueError, match=f"(?s)'a' is not a density.*{type(energy).__name__}"):
        hierarchical(poe, statistics, 1, seed=0)


def refused(match: str, generator: torch.Generator, poe: ProductOfExperts, **settings: object) -> None:
    statistics = span_statistics(poe, random_updates(generator, 2, 2, 3, 4))
    with pytest.raises(ValueError, match=match):
        hierarchical(poe, statistics, **{"num_samples": 1, "seed": 0, **settings})  # type: ignore[arg-type]


def test_other_bad_input_is_one_clear_error(generator: torch.Generator) -> None:
    names, student = ["a", "b"], StudentT(3.0, "multivariate")
    good = ProductOfExperts.of(names, InputGram(), student)
    refused("exponent='multivariate'", generator, ProductOfExperts.of(names, InputGram(), StudentT(3.0)))
    refused("to a power below 1", generator, ProductOfExperts.of(names, InputGram(), student, temperature=2.0))
    mixed = Expert("a", energy=student) * Expert("b", energy=Gaussian())
    refused("a Student-t energy or none", generator, mixed)
    scales = Expert("a", energy=student, scale=Absolute(1.0)) * Expert("b", energy=student, scale=Relative(1.0))
    refused("Absolute, Relative", generator, scales)
    unequal = ProductOfExperts((Expert("a", energy=student, scale=Relative(0.5)), Expert("b", energy=student)))
    refused("differ.*0.5, 1", generator, unequal)
    flat = ProductOfExperts.of(names, Identity(), Gaussian(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    refused("precision is zero", generator, flat)
    refused("'extra' is a FactorExpert", generator, good * FactorExpert("extra", lambda c: c.sum(-1), "span"))
    refused("is one of 'model', 'expert', 'module'", generator, good, shared="layer")
    refused("at least one of each", generator, good, num_samples=0)
    refused("no expert has", generator, ProductOfExperts.of(names, energy=Gaussian()), df_prior=dist.Gamma(2.0, 0.1))
    refused("scalar distribution", generator, good, gamma_prior=dist.LogNormal(torch.zeros(2), 1.0))
    refused("negative values", generator, good, df_prior=dist.Normal(0.0, 1.0))


def test_modules_that_nobody_changed_are_refused(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    updates[1] = 0
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian())
    with pytest.raises(ValueError, match=r"modules \[1\] have no anchor.*leave out modules"):
        hierarchical(poe, span_statistics(poe, updates), 1, seed=0)
