"""The hierarchical model: integrals, slopes and density against dense matrices; bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference.evidence.estimate import log_evidence, log_normalizers
from inference.evidence.gaussian_integrals import Elementwise, GaussianIntegral, OneSided, TwoSided, gaussian_integral
from inference.hierarchical.model import integrated
from inference.hierarchical.sampler import HierarchicalModel, Shared, hierarchical
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
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
    OutputGram,
    ProductOfExperts,
    Relative,
    ResidualMap,
    Scale,
    StudentT,
    Welsch,
    average,
)
from poe_models.posterior import Posterior
from tests.evidences import Columns
from tests.helpers import assert_close, name_of, random_updates
from tests.hierarchies import design

NAMES = ["a", "b", "c", "d"]


def dense_integral(posterior: Posterior, weights: Tensor) -> Tensor:
    """By dense matrices on all entries, `(M,)`."""
    values = []
    size = math.prod(posterior.event_shape)
    units = torch.eye(size, dtype=torch.float64).view(size, 1, *posterior.event_shape)
    for m in range(posterior.num_modules):
        one = posterior.module(m)
        shift = float(one.anchor_precision) / float(one.temperature)
        center = torch.zeros(size, dtype=torch.float64) if one.center is None else one.center.flatten()
        matrix, pull, constant = shift * torch.eye(size, dtype=torch.float64), torch.zeros(size).double(), 0.0
        for weight, expert in zip(weights[m].tolist(), one.experts, strict=True):
            form = expert.operator.apply(units).flatten(1)
            target = expert.update.flatten() - center
            matrix, pull = matrix + weight * form, pull + weight * form @ target
            constant += weight * float(target @ form @ target)
        least = constant - float(pull @ torch.linalg.solve(matrix, pull))
        values.append(-0.5 * float(torch.linalg.slogdet(matrix / shift)[1]) - least)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("residual_map", "kind"),
    [
        (Identity(), OneSided),
        (InputGram(), OneSided),
        (OutputGram(), OneSided),
        (Directional(), OneSided),
        ((Identity(), OutputGram()), OneSided),
        (Columns(), Elementwise),
        ((Columns(), Identity()), Elementwise),
        ((InputGram(), OutputGram()), TwoSided),
        ((InputGram(), OutputGram(), Identity()), TwoSided),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("shape", [(1, 9), (4, 5), (15, 2)], ids=str)
def test_integrals_and_slopes_are_those_of_dense_matrices(
    residual_map: ResidualMap, kind: type[GaussianIntegral], shape: tuple[int, int], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, *shape)
    anchor = Anchor(average, AbsolutePrecision(0.3))
    poe = ProductOfExperts.of(NAMES[:3], residual_map, Gaussian(), Absolute(1.0), anchor=anchor, temperature=0.7)
    posterior = poe.bind(updates)
    integral = gaussian_integral(posterior)
    assert isinstance(integral, kind)
    weights = torch.rand(4, 2, len(poe.experts), generator=generator, dtype=torch.float64) + 0.1
    value, slope = integral.value_and_slope(weights)
    expected = torch.stack([dense_integral(posterior, each) for each in weights])
    assert_close(value, expected, 1e-9)
    assert_close(integral.value(weights), expected, 1e-9)
    step = 1e-6 * torch.eye(len(poe.experts), dtype=torch.float64)
    for i in range(len(poe.experts)):
        finite = (integral.value(weights + step[i]) - integral.value(weights - step[i])) / 2e-6
        assert_close(slope[..., i], finite, 1e-5)
    given = weights.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(integrated(given, integral).sum(), given)
    assert_close(gradient, slope, 1e-12)


@pytest.mark.parametrize("shared", ["model", "expert", "module"])
@pytest.mark.parametrize(
    ("residual_map", "energy", "scale"),
    [
        (InputGram(), StudentT(3.0, "multivariate"), Relative(0.7)),
        (InputGram(), Cauchy("multivariate"), NormScaled(0.5)),
        (Directional(), StudentT(5.0, "multivariate"), Absolute(2.0)),
        (OutputGram(), StudentT(5.0, "multivariate"), Balanced(1.2)),
        ((InputGram(), Identity()), Gaussian(1.5), Relative(1.3)),
    ],
    ids=name_of,
)
def test_density_is_priors_times_mixtures_times_the_integral(
    residual_map: ResidualMap, energy: Energy, scale: Scale, shared: Shared, generator: torch.Generator
) -> None:
    # Two routes: Pyro's trace, and a posterior bound at the drawn gamma and nu, with the experts' own normalisers.
    updates = random_updates(generator, 2, 3, 4, 5)
    updates[1, 2] = 0  # says nothing under maps made from it
    powers, temperature = [1.0, 2.0, 1.5], 0.7
    poe = ProductOfExperts.of(NAMES[:3], residual_map, energy, scale, powers, Anchor(average), temperature)
    model = HierarchicalModel(poe, updates, shared)
    trace = poutine.trace(model).get_trace()
    gamma, weights = trace.nodes["gamma"]["value"], trace.nodes["weights"]["value"]
    nu = trace.nodes["nu"]["value"] if model.has_df else None
    white = trace.nodes["white"]["value"] if "white" in trace.nodes else None
    assert model.has_df == (isinstance(energy, StudentT) and not isinstance(energy, Cauchy))
    expected = model.gamma_prior.log_prob(gamma)
    if nu is not None:
        expected = expected + model.df_prior.log_prob(nu)
    (reference,) = model.posteriors
    expected = expected + gaussian_integral(reference).value(weights).sum()
    for m in range(2):
        for i, expert in enumerate(poe.experts):
            if not bool(reference.experts[i].active[m]):
                assert float(weights[m, i]) == 0
                if white is not None:  # a number that nothing depends on
                    expected = expected + dist.Normal(0.0, 1.0).log_prob(white[m, i])
                continue
            pick = {"model": (), "expert": (i,), "module": (m,)}[shared]
            own = StudentT(float(nu[pick]), "multivariate") if nu is not None else energy
            single = replace(expert, energy=own)
            one = replace(poe, experts=tuple(single if e.name == expert.name else e for e in poe.experts))
            bound = one.bind(updates)
            power = 1 if isinstance(scale, NormScaled) else 2
            moved = bound.experts[i].scale_squared * (gamma[pick] / scale.gamma) ** power  # type: ignore[attr-defined]
            new = replace(bound.experts[i], scale_squared=moved)
            bound = replace(bound, experts=tuple(new if j == i else e for j, e in enumerate(bound.experts)))
            expected = expected - log_normalizers(bound)[m, i]
            mixture = new.rho.scale_mixture()
            unit = torch.as_tensor(mixture.unit, dtype=torch.float64).expand(2)[m] * moved[m]
            strength = expert.importance / temperature
            if mixture.shape is None:
                assert_close(weights[m, i], strength / unit)
                continue
            shape = strength * torch.as_tensor(mixture.shape, dtype=torch.float64).expand(2)[m]
            assert white is not None
            # The mixture's density of tau, in the coordinate white that NUTS moves in.
            tau = weights[m, i] * unit
            jacobian = _jacobian(model, gamma, nu, white, (m, i))
            expected = expected + dist.Gamma(shape, 1.0).log_prob(tau) + (tau * jacobian.abs()).log()
    assert_close(trace.log_prob_sum(), expected, 1e-9)


def _jacobian(
    model: HierarchicalModel, gamma: Tensor, nu: Tensor | None, white: Tensor, place: tuple[int, int]
) -> Tensor:
    """``d log w / d white`` of one weight, by autograd."""
    given = white.clone().requires_grad_(True)
    weight = model.weights(gamma, nu, given)[place]
    return torch.autograd.grad(weight.log(), given)[0][place]


def test_integrating_the_weights_out_gives_the_evidence(generator: torch.Generator) -> None:
    # At a gamma and nu that are not the reference's, by plain importance sampling in white.
    updates = random_updates(generator, 3, 3, 4, 5)
    anchor = Anchor(precision=AbsolutePrecision(0.02))

    def of(nu: float, gamma: float) -> ProductOfExperts:
        return ProductOfExperts.of(NAMES[:3], InputGram(), StudentT(nu, "multivariate"), Relative(gamma), anchor=anchor)

    model = HierarchicalModel(of(3.0, 0.4), updates)
    truth = log_evidence(of(6.0, 0.6).bind(updates), generator=generator)
    samples, df = 20_000, 8.0
    half = torch.full((samples, 3, 1), df / 2, dtype=torch.float64)
    normal = torch.randn(samples, 3, 3, generator=generator, dtype=torch.float64)
    scale = 1.5
    white = scale * normal / (torch._standard_gamma(half, generator=generator) / half).sqrt()
    proposed = (
        math.lgamma((df + 3) / 2) - math.lgamma(df / 2) - 1.5 * math.log(math.pi * df) - 3 * math.log(scale)
        - (df + 3) / 2 * torch.log1p((white / scale).square().sum(-1) / df)
    )  # fmt: skip
    gamma, nu = (torch.full((samples,), value, dtype=torch.float64) for value in (0.6, 6.0))
    prior, integral = model._log_weights(gamma, nu, white), model.integrals[0]
    normalised = model.rank / 2 * (prior[0] - math.log(math.pi)) + model.half_volume + prior[1]
    log_weights = normalised.sum(-1) + integral.value(prior[0].exp()) - proposed
    estimate = torch.logsumexp(log_weights, 0) - math.log(samples)
    relative = (log_weights - estimate).exp()
    error = (relative.var(0) / samples + truth.standard_error.square()).sqrt()
    assert float(error.max()) < 0.05
    assert float(((estimate - truth.value) / error).abs().max()) < 4.9
    density, _ = model.log_density(gamma[:5], nu[:5], white[:5])
    assert_close(density, (log_weights + proposed)[:5].sum(-1), 1e-10)


@pytest.mark.parametrize("value", [math.inf, 1e300, 1e-300, 0.0])
def test_a_scale_or_tail_beyond_all_numbers_has_no_density(value: float, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 3)
    for energy in (StudentT(3.0, "multivariate"), Gaussian()):
        model = HierarchicalModel(design(NAMES[:2], energy, Absolute(1.0), InputGram()), updates)
        far, one = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (value, 1.0))
        white = torch.zeros(2, 2, dtype=torch.float64) if model.has_df else None
        pairs = [(far, one), (one, far), (far, far)] if model.has_df else [(far, None)]
        for gamma, nu in pairs:
            density, _ = model.log_density(gamma, nu, white)
            assert not bool(density.isnan())
            assert float(density.detach()) < -100
            if not 0 < value < math.inf:
                assert float(density.detach()) == -math.inf
        trace = poutine.trace(poutine.condition(model, {"gamma": far})).get_trace()
        assert float(trace.nodes["updates"]["fn"].log_factor.detach()) < -100


@pytest.mark.parametrize("energy", [Welsch(), Custom(torch.sqrt), Huber(1.0)], ids=name_of)
def test_energies_that_are_no_mixtures_are_refused_by_name(energy: Energy, generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES[:2], InputGram(), energy, Relative(1.0))
    with pytest.raises(ValueError, match=f"(?s)'a' has the energy.*{type(energy).__name__}.*cannot be integrated out"):
        hierarchical(poe, random_updates(generator, 2, 2, 3, 4), 1, seed=0)


def test_bare_energies_are_refused_by_name(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES[:2], InputGram(), Cauchy(), Relative(1.0))
    with pytest.raises(ValueError, match="(?s)'a' is not a density.*Cauchy"):
        hierarchical(poe, random_updates(generator, 2, 2, 3, 4), 1, seed=0)


def refused(match: str, generator: torch.Generator, poe: ProductOfExperts, **settings: object) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    with pytest.raises(ValueError, match=match):
        hierarchical(poe, updates, **{"num_samples": 1, "seed": 0, **settings})  # type: ignore[arg-type]


def test_other_bad_input_is_one_clear_error(generator: torch.Generator) -> None:
    names, student = ["a", "b"], StudentT(3.0, "multivariate")
    good = ProductOfExperts.of(names, InputGram(), student)
    refused("exponent='multivariate'", generator, ProductOfExperts.of(names, InputGram(), StudentT(3.0)))
    refused("to a power below 1", generator, ProductOfExperts.of(names, InputGram(), student, temperature=2.0))
    mixed = Expert("a", energy=student) * Expert("b", energy=Gaussian())
    refused("a Student-t energy or none", generator, mixed)
    scales = Expert("a", energy=student, scale=Absolute(1.0)) * Expert("b", energy=student, scale=Relative(1.0))
    refused("Absolute, Relative", generator, scales)
    unequal = ProductOfExperts(
        (Expert("a", energy=student, scale=Relative(0.5)), Expert("b", energy=student, scale=Relative(1.0)))
    )
    refused("differ.*0.5, 1", generator, unequal)
    flat = ProductOfExperts.of(names, Identity(), Gaussian(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    refused("have no anchor.*eta = 0", generator, flat)
    refused("'extra' is a FactorExpert", generator, good * FactorExpert("extra", lambda c: c.sum(-1), "span"))
    refused("is one of 'model', 'expert', 'module'", generator, good, shared="layer")
    refused("at least one of each", generator, good, num_samples=0)
    refused("no expert has", generator, ProductOfExperts.of(names, energy=Gaussian()), df_prior=dist.Gamma(2.0, 0.1))
    refused("scalar distribution", generator, good, gamma_prior=dist.LogNormal(torch.zeros(2), 1.0))
    refused("negative values", generator, good, df_prior=dist.Normal(0.0, 1.0))


def test_modules_that_nobody_changed_are_refused(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    updates[1] = 0
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(1.0))
    with pytest.raises(ValueError, match=r"modules 1 have no anchor.*leave out modules"):
        hierarchical(poe, updates, 1, seed=0)
