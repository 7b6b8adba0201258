"""Evidence against closed forms and against independent integrals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from inference.evidence.direct_weights import direct_log_weights
from inference.evidence.estimate import Evidence, log_evidence, log_normalizers
from inference.evidence.importance import importance_mean
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    StudentT,
    average,
)
from poe_models.posterior import Posterior
from tests.evidences import ETA, NAMES, SKEWED, Columns, Fixed, Z, closed_form, design, grid_evidence, plain, simulate
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seeded, seeded_numpy


def sum_on_a_grid(posterior: Posterior) -> float:
    """The same for any energy, normalised on the grid as well."""
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    z = torch.stack([first.flatten(), second.flatten()], -1).view(-1, 1, 1, 2)
    cell = 2 * math.log(float(axis[1] - axis[0]))
    origin = torch.zeros_like(posterior.experts[0].update)
    total = -posterior.anchor_energy(z) / posterior.temperature
    total = total - torch.logsumexp(total, 0)
    for expert in posterior.experts:
        total = total - expert.energy(z) / posterior.temperature
        around_zero = -replace(expert, update=origin).energy(z) / posterior.temperature
        total = total - torch.logsumexp(around_zero, 0) - cell
    return float(torch.logsumexp(total, 0))


def normal_log_density(updates: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Log density of `U_i = Z + noise_i`, `Z ~ N(0, I)`, by Sherman and Morrison: `(N, D)`, `(S, N)` to `(S,)`."""
    size, gram, weights = updates.shape[1], updates @ updates.T, 1 / variances
    total = 1 + weights.sum(1)
    logdet = np.log(variances).sum(1) + np.log(total)
    quadratic = weights @ np.diag(gram) - np.einsum("sn,nm,sm->s", weights, gram, weights) / total
    density: np.ndarray = -0.5 * (size * (variances.shape[1] * math.log(2 * math.pi) + logdet) + quadratic)
    return density


def log_gamma_density(u: np.ndarray, half: float) -> np.ndarray:
    """Log density of `u = log lambda` for `lambda ~ Gamma(half, rate half)`."""
    density: np.ndarray = half * math.log(half) - special.gammaln(half) + half * (u - np.exp(u))
    return density


def assert_agrees(estimate: Evidence, truth: Tensor | float, largest_error: float) -> None:
    """Within `Z` standard errors, which must be small enough for this to mean something."""
    assert float(estimate.standard_error.max()) < largest_error
    z = (estimate.value - torch.as_tensor(truth)) / estimate.standard_error
    assert float(z.abs().max()) < Z, f"{estimate.value} is not {truth} (z = {z})"


def test_two_zero_mean_normals_have_the_textbook_evidence(generator: torch.Generator) -> None:
    # Covariances I (the anchor, T = 1, eta = 1/2) and C: -log|I + C| / 2 - d/2 log 2 pi.
    factor = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    poe = ProductOfExperts.of(["a"], Fixed(covariance), Gaussian(), Absolute(1.0), anchor=anchor)
    found = log_evidence(poe.bind(torch.zeros(1, 1, 1, 3, dtype=torch.float64)), generator=generator)
    eye = torch.eye(3, dtype=torch.float64)
    expected = -0.5 * torch.linalg.slogdet(eye + covariance)[1] - 1.5 * math.log(2 * math.pi)
    assert_close(found.value, expected, 1e-12)
    assert found.total_error == 0
    assert bool(found.effective_samples.isinf().all())


MAPS = [
    Identity(),
    InputGram(),
    OutputGram(),
    Directional(),
    Columns(),
    (Identity(), InputGram()),
    (OutputGram(), InputGram()),
    (OutputGram(), Identity(), InputGram()),
    (Identity(), Columns()),
]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 5), (4, 5)], ids=str)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_gaussian_designs_are_joint_normals(
    residual_map: ResidualMap | tuple[ResidualMap, ...], shape: tuple[int, int], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, *shape)
    updates[:, :, -1] = updates[:, :, 0]  # no full rank on either side
    for anchor in (Anchor(precision=RelativePrecision(0.3)), Anchor(average, AbsolutePrecision(0.4))):
        poe = ProductOfExperts.of(
            NAMES, residual_map, Gaussian(1.5), Relative(0.8), [1.0, 0.5, 2.0], anchor, temperature=0.7
        )
        posterior = poe.bind(updates)
        assert_close(log_evidence(posterior, generator=generator).value, closed_form(posterior), 1e-8)


def test_adapters_have_the_evidence_of_their_updates(generator: torch.Generator) -> None:
    left = torch.randn(2, 3, 9, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64)
    for residual_map in (InputGram(), OutputGram(), Identity()):
        for energy in (Gaussian(), StudentT(4.0, "multivariate")):
            poe = ProductOfExperts.of(NAMES, residual_map, energy, Relative(0.8))
            both = [poe.bind(left @ right, low_rank=given) for given in (None, (left, right))]
            found = [log_evidence(each, generator=seeded(1)) for each in both]
            if isinstance(energy, Gaussian):
                assert_close(found[0].value, closed_form(both[0]), 1e-8)
            assert_close(found[1].value, found[0].value, 1e-8)


@pytest.mark.parametrize("size", [0.0, 1e-17])
@pytest.mark.parametrize(
    "energy", [Gaussian(), Huber(1.0), GeneralizedGaussian(1.0), Cauchy("multivariate")], ids=name_of
)
def test_an_unmerged_expert_adds_nothing(energy: Energy, size: float, generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 2, 2)
    updates[1, 2] *= size  # or so little that it is rounding beside the others
    anchor = Anchor(precision=AbsolutePrecision(0.3))
    three = ProductOfExperts.of(NAMES, InputGram(), energy, Absolute(1.0), anchor=anchor)
    two = ProductOfExperts.of(NAMES[:2], InputGram(), energy, Absolute(1.0), anchor=anchor)
    whole, part = (
        log_evidence(poe.bind(given), generator=generator) for poe, given in ((three, updates), (two, updates[:, :2]))
    )
    error = float((whole.standard_error[1] ** 2 + part.standard_error[1] ** 2).sqrt())
    assert abs(float(whole.value[1] - part.value[1])) <= Z * error + 1e-9
    assert bool(((whole.value - part.value)[[0, 2]].abs() > 0.5).all())  # where all three are merged
    assert whole.dimension[1].tolist() == [4, 4, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "energy", [StudentT(3.0, "multivariate"), StudentT(2.0, 6.0), Cauchy("multivariate")], ids=name_of
)
def test_student_t_agrees_with_scipys_densities_on_a_grid(
    energy: Energy, temperature: float, generator: torch.Generator
) -> None:
    # Three experts that contradict each other: several modes.
    posterior = design(energy, temperature=temperature).bind(SKEWED)
    assert_agrees(log_evidence(posterior, generator=generator, samples=4000), grid_evidence(posterior), 0.03)


def test_opposed_experts_are_believed_in_turns(generator: torch.Generator) -> None:
    # Far apart beside their scales, with an anchor that is wide: two modes of equal mass.
    updates = torch.tensor([[[[6.0, 0.0]], [[-6.0, 0.0]]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        ["a", "b"], Identity(), Cauchy("multivariate"), Absolute(0.3), anchor=Anchor(precision=AbsolutePrecision(0.02))
    )
    posterior = poe.bind(updates)
    assert_agrees(log_evidence(posterior, generator=generator, samples=4000), grid_evidence(posterior), 0.03)


def test_more_experts_than_numbers_and_one_given_twice(generator: torch.Generator) -> None:
    updates = torch.randn(1, 5, 1, 2, generator=generator, dtype=torch.float64)
    updates[:, 4] = updates[:, 3]
    posterior = plain(list("abcde"), StudentT(3.0, "multivariate")).bind(updates)
    assert_agrees(log_evidence(posterior, generator=generator, samples=4000), grid_evidence(posterior), 0.03)


@pytest.mark.parametrize("energy", [Huber(0.7), GeneralizedGaussian(1.0), GeneralizedGaussian(4.0)], ids=name_of)
def test_other_energies_agree_with_a_grid(energy: Energy, generator: torch.Generator) -> None:
    posterior = design(energy).bind(SKEWED)
    assert_agrees(log_evidence(posterior, generator=generator, samples=4000), sum_on_a_grid(posterior), 0.06)


@pytest.mark.parametrize("power", [1.0, 2.5])
@pytest.mark.parametrize("size", [4, 64, 1024])
def test_one_expert_agrees_with_quadrature_over_its_weight(size: int, power: float, generator: torch.Generator) -> None:
    updates = simulate(1, 1, size, 3.0, generator)
    nu = 5.0
    poe = replace(plain(["a"], StudentT(nu, "multivariate")), temperature=1 / power)
    poe = replace(poe, anchor=Anchor(precision=AbsolutePrecision(ETA / power)))
    # A power of a Student-t density is one of more degrees of freedom and another scale.
    df = power * (nu + size) - size
    spread, square = nu / df, float(updates.square().sum())

    def log_joint(u: float) -> float:
        variance = 1 + spread * math.exp(-u)
        normal = -0.5 * (size * math.log(2 * math.pi * variance) + square / variance)
        return float(log_gamma_density(np.array(u), df / 2)) + normal

    axis = np.linspace(-12, 12, 4001)
    peak = max(axis, key=log_joint)
    top = log_joint(peak)
    mass, _ = integrate.quad(lambda u: math.exp(log_joint(u) - top), peak - 9, peak + 4, points=[peak], limit=500)
    truth = top + math.log(mass)
    assert_agrees(log_evidence(poe.bind(updates), generator=generator), truth, 0.05)


@pytest.mark.parametrize("size", [4, 64, 1024])
def test_two_experts_agree_with_a_grid_over_their_weights(size: int, generator: torch.Generator) -> None:
    updates = simulate(1, 2, size, 3.0, generator)
    gram = updates[0, :, 0].numpy()
    rough = np.log(size / np.maximum(1e-3, (gram**2).sum(1) / 2))
    axes = [np.linspace(value - 7, value + 4, 601) for value in rough]
    u = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    total = normal_log_density(gram, np.exp(-u)) + log_gamma_density(u, 1.5).sum(1)
    truth = float(np.logaddexp.reduce(total) + sum(math.log(axis[1] - axis[0]) for axis in axes))
    posterior = plain(["a", "b"], StudentT(3.0, "multivariate")).bind(updates)
    assert_agrees(log_evidence(posterior, generator=generator, samples=2000), truth, 0.05)


def test_four_experts_agree_with_weights_sampled_by_hand(generator: torch.Generator) -> None:
    # Another proposal (independent Gammas), another formula for the Gaussian integral, another library.
    size, nu, samples = 64, 3.0, 100_000
    updates = simulate(2, 4, size, nu, generator)
    rng, values, errors = seeded_numpy(0), [], []
    for module in updates[:, :, 0].numpy():
        gram = module @ module.T
        weights = np.ones(4)
        for _ in range(20):
            mean = weights / (1 + weights.sum())
            rough = np.diag(gram) - 2 * gram @ mean + mean @ gram @ mean
            seen = size * (1 - mean)
            weights = (nu + seen) / (nu + rough)
        shape, rate = nu / 2 + seen / 4, nu / 2 + rough / 4  # half as sharp as the posterior
        u = np.log(rng.gamma(shape, 1 / rate, (samples, 4)))
        proposed = (shape * np.log(rate) - special.gammaln(shape) + shape * u - rate * np.exp(u)).sum(1)
        log_weights = normal_log_density(module, np.exp(-u)) + log_gamma_density(u, nu / 2).sum(1) - proposed
        top = log_weights.max()
        relative = np.exp(log_weights - top)
        values.append(top + math.log(relative.mean()))
        errors.append(relative.std() / relative.mean() / math.sqrt(samples))
    posterior = plain(list("abcd"), StudentT(nu, "multivariate")).bind(updates)
    found = log_evidence(posterior, generator=generator)
    error = (found.standard_error.numpy() ** 2 + np.array(errors) ** 2) ** 0.5
    assert error.max() < 0.05
    assert float(np.abs((found.value.numpy() - values) / error).max()) < Z


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram(), Directional()], ids=name_of)
def test_weights_and_updates_are_two_routes_to_the_same_integral(
    residual_map: ResidualMap, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 3, 3, 4, 3)
    poe = ProductOfExperts.of(
        NAMES, residual_map, StudentT(6.0, "multivariate"), Relative(0.6), [1.0, 1.5, 2.0], Anchor(average), 0.8
    )
    posterior = poe.bind(updates)
    found = log_evidence(posterior, generator=generator, samples=2000)
    other = importance_mean(direct_log_weights(posterior, 4000, generator))
    error = (found.standard_error.square() + other.standard_error.square()).sqrt()
    assert bool(other.trusted.all())
    assert float(error.max()) < 0.06
    gap = found.value + log_normalizers(posterior).sum(-1) - other.value
    assert float((gap / error).abs().max()) < Z


def test_errors_are_what_they_say(generator: torch.Generator) -> None:
    # Values of one module by 60 independent runs scatter as their standard errors: chi-square at one in a million.
    updates = simulate(1, 3, 4, 3.0, generator).expand(60, -1, -1, -1)
    found = log_evidence(plain(NAMES, StudentT(3.0, "multivariate")).bind(updates), generator=generator)
    scatter = float(((found.value - found.value.mean()) / found.standard_error).square().sum())
    low, high = stats.chi2(59).ppf([5e-7, 1 - 5e-7])
    assert low / 1.3 < scatter < high  # samples in turns from each component scatter a little less
