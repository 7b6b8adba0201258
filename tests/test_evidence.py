from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor
from typing_extensions import override

from inference.evidence.direct_weights import direct_log_weights
from inference.evidence.estimate import (
    Evidence,
    UntrustedEvidence,
    dimensions,
    leave_one_expert_out,
    log_evidence,
    log_normalizers,
)
from inference.evidence.importance import importance_mean, pareto_k
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
    GeneralizedGaussian,
    Gram,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    StudentT,
    Welsch,
    average,
    span_statistics,
)
from poe_models.operators import Diagonal
from poe_models.posterior import Posterior
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seeded, seeded_numpy

NAMES = ["a", "b", "c"]
SKEWED = torch.tensor([[[[1.0, 0.2]], [[2.0, -1.5]], [[-0.5, 2.5]]]], dtype=torch.float64)
ETA = 0.5
Z = 4.9
"""Standard errors that a correct estimate exceeds once in a million."""


@dataclass(frozen=True)
class Fixed(ResidualMap):
    """A given covariance, whatever the update is."""

    covariance: Tensor

    @override
    def operator(self, update: Tensor) -> Gram:
        root = torch.linalg.cholesky(torch.linalg.inv(self.covariance))
        return Gram(root.expand(*update.shape[:-2], -1, -1), "right", (update.shape[-2], update.shape[-1]))


def design(energy: Energy, temperature: float = 1.0, eta: float = 0.05) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(eta))
    return ProductOfExperts.of(NAMES, Identity(), energy, Absolute(0.6), [1.0, 1.6, 2.0], anchor, temperature)


def plain(names: list[str], energy: Energy, gamma: float = 1.0) -> ProductOfExperts:
    return ProductOfExperts.of(
        names, Identity(), energy, Absolute(gamma), anchor=Anchor(precision=AbsolutePrecision(ETA))
    )


def simulate(modules: int, experts: int, size: int, nu: float, generator: torch.Generator) -> Tensor:
    """Updates of the model itself, Identity maps and `gamma = 1`, `(M, N, 1, D)`; infinite `nu` is normal."""
    z = torch.randn(modules, 1, 1, size, generator=generator, dtype=torch.float64) / math.sqrt(2 * ETA)
    noise = torch.randn(modules, experts, 1, size, generator=generator, dtype=torch.float64)
    mixing = torch.ones(modules, experts, 1, 1, dtype=torch.float64)
    if math.isfinite(nu):
        mixing = torch._standard_gamma(mixing * nu / 2, generator=generator) / (nu / 2)
    return z + noise / mixing.sqrt()


def closed_form(posterior: Posterior) -> Tensor:
    """Log density of everything that Gaussian experts see, as one joint normal over all experts, `(M,)`."""
    values = []
    temperature = float(posterior.temperature)
    for m in range(posterior.num_modules):
        shape = posterior.event_shape
        size = math.prod(shape)
        units = torch.eye(size, dtype=torch.float64).view(size, 1, *shape)
        prior = temperature / (2 * posterior.anchor_precision[m]) * torch.eye(size, dtype=torch.float64)
        center = torch.zeros(size, dtype=torch.float64) if posterior.center is None else posterior.center[m].flatten()
        seen, noise, data = [], [], []
        for expert in posterior.module(m).experts:
            matrix = expert.operator.apply(units).flatten(1)
            eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
            kept = eigenvalues > 1e-9 * eigenvalues.max()
            assert isinstance(expert.rho, Gaussian)
            precision = expert.importance * expert.rho.precision / temperature / float(expert.scale_squared)
            seen.append(vectors[:, kept].mT)
            noise.append(1 / (precision * eigenvalues[kept]))
            data.append(seen[-1] @ expert.update.flatten())
        rows = torch.cat(seen)
        covariance = rows @ prior @ rows.mT + torch.diag(torch.cat(noise))
        normal = torch.distributions.MultivariateNormal(rows @ center, covariance)
        values.append(normal.log_prob(torch.cat(data)))
    return torch.stack(values)


def grid_evidence(posterior: Posterior) -> float:
    """Integral over a two-dimensional latent of the normalised product by brute force, from scipy's densities."""
    axis = np.linspace(-20.0, 20.0, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    temperature = float(posterior.temperature)
    variance = temperature / (2 * float(posterior.anchor_precision))
    total = stats.multivariate_normal(np.zeros(2), variance * np.eye(2)).logpdf(grid)
    for expert in posterior.experts:
        scale, center = float(expert.scale_squared), expert.update.flatten().numpy()
        kappa = expert.importance * float(expert.rho.k) / temperature  # type: ignore[attr-defined]
        unit = scale * float(getattr(expert.rho, "df", 1.0))
        # (1 + |x|^2 / unit)^-kappa in two dimensions is a Student-t of 2 kappa - 2 degrees of freedom.
        df = 2 * kappa - 2
        total = total + stats.multivariate_t(center, unit / df * np.eye(2), df=df).logpdf(grid)
    step = axis[1] - axis[0]
    return float(np.logaddexp.reduce(total.ravel()) + 2 * math.log(step))


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


# Closed forms


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


@dataclass(frozen=True)
class Columns(ResidualMap):
    """Elementwise weights, some zero: a Fisher map without statistics."""

    @override
    def operator(self, update: Tensor) -> Diagonal:
        values = torch.arange(update.shape[-1], dtype=update.dtype).expand(update.shape)
        return Diagonal(values.contiguous())


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


# Independent routes


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


# What the evidence is for


@pytest.mark.parametrize("size", [4, 64, 1024])
def test_the_best_scale_is_the_true_one(size: int) -> None:
    # Where Span evidence prefers sqrt(3 D) / 4, 28 at D = 1024. The maximum has a standard error of about
    # gamma / sqrt(2 M (N - 1) D); the grid's step is added.
    for seed in range(3):
        generator = seeded(seed)
        updates = simulate(20, 4, size, math.inf, generator)
        scales = np.exp(np.linspace(-0.5, 0.5, 41))
        totals = [
            log_evidence(plain(list("abcd"), Gaussian(), s).bind(updates), generator=generator).total for s in scales
        ]
        best = math.log(scales[int(np.argmax(totals))])
        assert abs(best) < Z / math.sqrt(2 * 20 * 3 * size) + 0.025


@pytest.mark.parametrize("nu", [3.0, 10.0, math.inf])
def test_the_true_family_wins_in_many_dimensions(nu: float) -> None:
    families: dict[float, Energy] = {
        3.0: StudentT(3.0, "multivariate"),
        10.0: StudentT(10.0, "multivariate"),
        math.inf: Gaussian(),
    }
    for seed in range(3):
        generator = seeded(seed)
        updates = simulate(40, 4, 1024, nu, generator)
        best = {}
        for name, energy in families.items():
            totals = [
                log_evidence(plain(list("abcd"), energy, s).bind(updates), generator=generator, samples=200)
                for s in ((0.8, 0.9, 1.0, 1.1, 1.25) if math.isfinite(name) else (0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8))
            ]
            best[name] = max(totals, key=lambda each: each.total)
        won = max(best, key=lambda name: best[name].total)
        others = [best[nu].total - each.total for name, each in best.items() if name != nu]
        assert won == nu
        assert min(others) > 5, others


def test_normalised_scales_have_a_best_and_bare_ones_do_not(generator: torch.Generator) -> None:
    updates = simulate(30, 3, 4, math.inf, generator)
    normalised, bare = [], []
    scales = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    for scale in scales:
        posterior = plain(NAMES, Gaussian(), scale).bind(updates)
        value = log_evidence(posterior, generator=generator)
        normalised.append(value.total)
        bare.append(value.total + float(log_normalizers(posterior).sum()))
    assert scales[int(np.argmax(normalised))] == 1.0
    assert bool((np.diff(bare) > 0).all())


# Leave one expert out


def test_a_gaussian_expert_is_predicted_as_a_conditional_normal(generator: torch.Generator) -> None:
    updates = simulate(2, 3, 3, math.inf, generator)
    posterior = plain(NAMES, Gaussian(), 0.7).bind(updates)
    found = leave_one_expert_out(posterior, generator=generator)
    # U_i given the others: mean V sum_j U_j / s^2, variance V + s^2, V = 1 / (1 + 2 / s^2).
    variance = 1 / (1 + 2 / 0.49)
    for i in range(3):
        mean = variance * (updates.sum(1) - updates[:, i]) / 0.49
        expected = torch.distributions.Normal(mean, math.sqrt(variance + 0.49)).log_prob(updates[:, i]).sum((-2, -1))
        assert_close(found.value[:, i], expected, 1e-10)
    assert float(found.standard_error.max()) == 0
    assert found.updates == ("a", "b", "c")


def test_leaving_out_keeps_operators_scales_and_anchor(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 2)
    poe = ProductOfExperts.of(NAMES, (InputGram(), OutputGram()), Gaussian(), Relative(0.8))
    posterior = poe.bind(updates)
    found = leave_one_expert_out(posterior, generator=generator)
    rest = replace(posterior, experts=tuple(e for e in posterior.experts if e.update_name != "b"))
    assert_close(found.value[:, 1], closed_form(posterior) - closed_form(rest), 1e-8)
    alone = ProductOfExperts.of(["a"], InputGram(), Gaussian()).bind(updates[:, :1])
    only = leave_one_expert_out(alone, generator=generator)
    assert_close(only.value[:, 0], closed_form(alone), 1e-9)


def test_a_student_expert_is_predicted_with_an_error(generator: torch.Generator) -> None:
    posterior = design(StudentT(4.0, "multivariate")).bind(SKEWED)
    found = leave_one_expert_out(posterior, generator=generator, samples=3000)
    for i in range(3):
        rest = replace(posterior, experts=tuple(e for j, e in enumerate(posterior.experts) if j != i))
        truth = grid_evidence(posterior) - grid_evidence(rest)
        assert 0 < float(found.standard_error[0, i]) < 0.05
        assert abs(float(found.value[0, i]) - truth) < Z * float(found.standard_error[0, i])


# Trust


def test_pareto_shapes_of_known_tails(generator: torch.Generator) -> None:
    for shape in (0.3, 0.8, 1.5):
        uniform = torch.rand(20_000, 8, generator=generator, dtype=torch.float64)
        found = pareto_k(-shape * uniform.log())  # weights u^-k have a Pareto tail of shape k
        assert float((found - shape).abs().max()) < 0.25
    assert float(pareto_k(torch.zeros(1000, 1, dtype=torch.float64))) == -math.inf


def test_an_estimate_that_cannot_be_trusted_is_refused_and_carries_its_number(generator: torch.Generator) -> None:
    # Heavy tails in many dimensions without the help of their mixture.
    heavy = StudentT(3.0, "multivariate")

    class Bare(Energy):
        rho = heavy.for_dimension(torch.tensor(512.0, dtype=torch.float64)).rho

        @override
        def log_normalizer(self, scale: object, dim: object, importance: float = 1.0) -> Tensor:
            return heavy.log_normalizer(scale, dim, importance)  # type: ignore[arg-type]

    updates = simulate(12, 4, 512, 1.0, generator)
    with pytest.raises(UntrustedEvidence, match=r"module \d of the batch: \d+ of 1000.*which 'a' has not") as caught:
        log_evidence(plain(list("abcd"), Bare()).bind(updates), generator=generator)
    assert bool(caught.value.evidence.value.isfinite().all())
    assert not bool(caught.value.evidence.trusted.all())


def test_single_precision_loses_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 8, 6).float()
    poe = ProductOfExperts.of(NAMES, OutputGram(), Gaussian(), Relative(0.5))
    single, double = poe.bind(updates), poe.bind(updates.double())
    values = [log_evidence(each, generator=generator).value for each in (single, double)]
    assert_close(values[0], values[1], 1e-5)


# Bad input


def calls(posterior: Posterior, generator: torch.Generator) -> list[Callable[[], object]]:
    return [
        lambda: log_evidence(posterior, generator=generator),
        lambda: leave_one_expert_out(posterior, generator=generator),
    ]


@pytest.mark.parametrize("energy", [Welsch(), Cauchy(), StudentT(3.0), Custom(torch.sqrt)], ids=name_of)
def test_unnormalised_experts_are_refused_by_name(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 4)
    posterior = ProductOfExperts.of(NAMES, InputGram(), energy, Relative(1.0)).bind(updates)
    for call in calls(posterior, generator):
        with pytest.raises(ValueError, match=f"(?s)'a' is not a density.*{type(energy).__name__}"):
            call()


def test_a_missing_anchor_is_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 2)
    poe = ProductOfExperts.of(
        NAMES, Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    for call in calls(poe.bind(updates), generator):
        with pytest.raises(ValueError, match="eta = 0.*flat prior has no normaliser"):
            call()


def test_span_coordinates_are_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0))
    posterior = poe.bind(span_statistics(poe, updates))
    for call in calls(posterior, generator):
        with pytest.raises(ValueError, match="Span coordinates.*made of the updates.*bind"):
            call()


def test_other_bad_input_is_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0))
    posterior = poe.bind(updates)
    with pytest.raises(ValueError, match="fewer than 50 effective samples.*at least 100"):
        log_evidence(posterior, generator=generator, samples=99)
    weak = ProductOfExperts.of(
            NAMES, (InputGram(), OutputGram(), Identity()), Gaussian(), Absolute(1.0),
            anchor=Anchor(precision=AbsolutePrecision(1.0)),
        ).bind(updates)  # fmt: skip
    assert dimensions(weak).shape == (2, 9)
    mixed = Expert("a", Directional()) * Expert("b", Identity()) * Expert("c", Identity())
    gaussian = replace(mixed, experts=tuple(replace(e, energy=Gaussian()) for e in mixed.experts))
    with pytest.raises(ValueError, match="Directional and Identity.*one kind per module"):
        log_evidence(gaussian.bind(updates), generator=generator)
    factor = poe * FactorExpert("extra", lambda c: c.sum(-1), "span")
    bound = factor.bind(span_statistics(factor, updates))
    with pytest.raises(ValueError, match="'extra' is a FactorExpert"):
        log_normalizers(replace(bound, span=None))
