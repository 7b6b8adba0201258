from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from typing_extensions import override

from inference import evidence as module
from inference import fixed_point, solve_posterior
from inference.evidence import (
    Evidence,
    annealed_evidence,
    compare_designs,
    dimensions,
    log_evidence,
    log_normalizers,
    with_restricted_exponents,
)
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Directional,
    Energy,
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
    full_posterior,
    span_posterior,
    span_statistics,
)
from poe_models.posterior import Posterior
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]
SKEWED = torch.tensor([[[[1.0, 0.2]], [[2.0, -1.5]], [[-0.5, 2.5]]]], dtype=torch.float64)


@dataclass(frozen=True)
class Fixed(ResidualMap):
    """A given covariance, whatever the update is."""

    covariance: Tensor

    @override
    def operator(self, update: Tensor) -> Gram:
        root = torch.linalg.cholesky(torch.linalg.inv(self.covariance))
        return Gram(root.expand(*update.shape[:-2], -1, -1), "right", (update.shape[-2], update.shape[-1]))


def design(
    energy: Energy, residual_map: ResidualMap | None = None, temperature: float = 1.0, eta: float = 0.05
) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(eta))
    return ProductOfExperts.of(
        NAMES, residual_map or Identity(), energy, Absolute(0.6), [1.0, 1.6, 2.0], anchor, temperature
    )


def mode_of(posterior: Posterior) -> Tensor:
    solution = solve_posterior(posterior)
    assert all(status.converged for status in solution.status)
    return solution.value


def closed_form(posterior: Posterior) -> Tensor:
    """Log density of everything that Gaussian experts see, as one joint normal over all experts, `(M,)`."""
    values = []
    temperature = posterior.temperature
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
    variance = posterior.temperature / (2 * float(posterior.anchor_precision))
    total = stats.multivariate_normal(np.zeros(2), variance * np.eye(2)).logpdf(grid)
    for expert in posterior.experts:
        scale, center = float(expert.scale_squared), expert.update.flatten().numpy()
        kappa = expert.importance * float(expert.rho.k) / posterior.temperature  # type: ignore[attr-defined]
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


def assert_agrees(estimate: Evidence, truth: Tensor | float, largest_error: float) -> None:
    """Within four standard errors, which must be small enough for this to mean something."""
    assert estimate.standard_error is not None
    assert float(estimate.standard_error.max()) < largest_error
    z = (estimate.value - torch.as_tensor(truth)) / estimate.standard_error
    assert float(z.abs().max()) < 4, f"{estimate.value} is not {truth} (z = {z})"


# Closed forms


def test_two_zero_mean_normals_have_the_textbook_evidence(generator: torch.Generator) -> None:
    # Covariances I (the anchor, T = 1, eta = 1/2) and C: -log|I + C| / 2 - d/2 log 2 pi.
    factor = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    poe = ProductOfExperts.of(["a"], Fixed(covariance), Gaussian(), Absolute(1.0), anchor=anchor)
    posterior = full_posterior(poe, torch.zeros(1, 1, 1, 3, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    expected = -0.5 * torch.linalg.slogdet(eye + covariance)[1] - 1.5 * math.log(2 * math.pi)
    assert_close(log_evidence(posterior, mode_of(posterior)).value, expected, 1e-12)
    assert_agrees(annealed_evidence(posterior, generator=generator, steps=50), expected, 0.05)


MAPS = [Identity(), InputGram(), OutputGram(), Directional()]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 5)], ids=str)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_gaussian_designs_are_joint_normals(
    residual_map: ResidualMap, shape: tuple[int, int], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, *shape)
    for anchor in (Anchor(precision=RelativePrecision(0.3)), Anchor(average, AbsolutePrecision(0.4))):
        poe = ProductOfExperts.of(
            NAMES, residual_map, Gaussian(1.5), Relative(0.8), [1.0, 0.5, 2.0], anchor, temperature=0.7
        )
        full = full_posterior(poe, updates)
        span, _ = span_posterior(poe, span_statistics(poe, updates))
        for posterior in (full, span):
            laplace = log_evidence(posterior, mode_of(posterior))
            assert_close(laplace.value, closed_form(posterior), 1e-8)
            annealed = annealed_evidence(posterior, generator=generator, steps=40, particles=128)
            assert_agrees(annealed, closed_form(posterior), 0.4)


def test_both_sides_are_a_composite_of_two_densities(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 2, 3)
    poe = ProductOfExperts.of(["a", "b"], (OutputGram(), InputGram()), Gaussian(), Relative(1.0))
    posterior = full_posterior(poe, updates)
    assert_close(log_evidence(posterior, mode_of(posterior)).value, closed_form(posterior), 1e-9)
    assert_agrees(annealed_evidence(posterior, generator=generator, steps=60), closed_form(posterior), 0.1)


@pytest.mark.parametrize("size", [0.0, 1e-17])
@pytest.mark.parametrize(
    "energy", [Gaussian(), Huber(1.0), GeneralizedGaussian(1.0), Cauchy("multivariate")], ids=name_of
)
def test_an_unmerged_expert_and_padding_add_nothing(energy: Energy, size: float, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 2)
    updates[0, 2] *= size  # or so little that it is rounding beside the others
    anchor = Anchor(precision=AbsolutePrecision(0.3))
    three = ProductOfExperts.of(NAMES, InputGram(), energy, Absolute(1.0), anchor=anchor)
    two = ProductOfExperts.of(NAMES[:2], InputGram(), energy, Absolute(1.0), anchor=anchor)
    for span in (False, True) if size == 0 else (False,):  # rounding is a direction of the span all the same
        values = []
        for poe, given in ((three, updates), (two, updates[:, :2])):
            posterior = full_posterior(poe, given)
            if span:
                posterior = with_restricted_exponents(poe, span_posterior(poe, span_statistics(poe, given))[0])
            values.append(log_evidence(posterior, mode_of(posterior)).value)
        assert_close(values[0][0], values[1][0], 1e-9)
        assert abs(float(values[0][1] - values[1][1])) > 1  # where all three are merged


# Quadrature


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "energy", [StudentT(3.0, "multivariate"), StudentT(2.0, 6.0), Cauchy("multivariate")], ids=name_of
)
def test_student_t_agrees_with_scipys_densities_on_a_grid(
    energy: Energy, temperature: float, generator: torch.Generator
) -> None:
    posterior = full_posterior(design(energy, temperature=temperature), SKEWED)
    truth = grid_evidence(posterior)
    estimate = annealed_evidence(posterior, generator=generator, particles=2000, steps=100)
    assert_agrees(estimate, truth, 0.02)
    # Three experts that contradict each other: Laplace sees one mode, and annealing notices.
    assert abs(log_evidence(posterior, mode_of(posterior)).total - truth) > 20 * estimate.total_error


@pytest.mark.parametrize("energy", [Huber(0.7), GeneralizedGaussian(1.0), StudentT(3.0, "multivariate")], ids=name_of)
def test_slice_steps_agree_with_a_grid(
    energy: Energy, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_mixture", lambda expert: False)  # also where Gibbs steps would do
    posterior = full_posterior(design(energy), SKEWED)
    estimate = annealed_evidence(posterior, generator=generator, particles=1500, steps=40)
    assert_agrees(estimate, sum_on_a_grid(posterior), 0.04)


def test_wrong_estimates_are_noticed(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = full_posterior(design(StudentT(3.0, "multivariate")), SKEWED)
    truth = grid_evidence(posterior)
    warmer = annealed_evidence(replace(posterior, temperature=1.02), generator=generator, particles=2000, steps=100)
    with pytest.raises(AssertionError, match="is not"):
        assert_agrees(warmer, truth, 0.02)
    # Steps that leave another distribution invariant: the bridge's tails are taken for those of the posterior.
    move = module._Path._gibbs_step
    monkeypatch.setattr(module._Path, "_gibbs_step", lambda self, q, b: move(self, q, torch.ones_like(b)))
    with pytest.raises(AssertionError, match="is not"):
        assert_agrees(annealed_evidence(posterior, generator=generator, particles=2000, steps=100), truth, 0.5)


def test_few_steps_cost_precision_and_not_truth(generator: torch.Generator) -> None:
    posterior = full_posterior(design(StudentT(3.0, "multivariate")), SKEWED)
    few = annealed_evidence(posterior, generator=generator, particles=20_000, steps=5)
    many = annealed_evidence(posterior, generator=generator, particles=20_000, steps=80)
    assert_agrees(few, grid_evidence(posterior), 0.05)
    assert few.total_error is not None
    assert many.total_error is not None
    assert many.total_error < 0.5 * few.total_error
    # The variance of the log weights is about length^2 / steps.
    assert many.path_length is not None
    assert many.effective_samples is not None
    variance = math.log(20_000 / float(many.effective_samples))
    assert 0.4 < variance / (float(many.path_length) ** 2 / 80) < 2.5


# What the evidence is for


def test_normalised_scales_have_a_best_and_bare_ones_do_not(generator: torch.Generator) -> None:
    z = torch.randn(30, 1, 1, 4, generator=generator, dtype=torch.float64)
    updates = z + 0.5 * torch.randn(30, 3, 1, 4, generator=generator, dtype=torch.float64)
    normalised, bare = [], []
    scales = [0.125, 0.25, 0.5, 1.0, 2.0, 8.0]
    for scale in scales:
        anchor = Anchor(precision=AbsolutePrecision(0.5))
        poe = ProductOfExperts.of(NAMES, Identity(), Gaussian(), Absolute(scale), anchor=anchor)
        posterior = full_posterior(poe, updates)
        value = log_evidence(posterior, mode_of(posterior))
        normalised.append(value.total)
        bare.append(value.total + float(log_normalizers(posterior).sum()))
    assert scales[int(np.argmax(normalised))] == 0.5
    assert bool((np.diff(bare) > 0).all())


def test_the_table_finds_the_tails_that_made_the_data(generator: torch.Generator) -> None:
    z = torch.randn(40, 1, 1, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, 3, 1, 2, generator=generator, dtype=torch.float64)
    mixing = torch._standard_gamma(torch.full((40, 3, 1, 1), 1.0, dtype=torch.float64), generator=generator)
    heavy = z + 0.3 * noise / mixing.sqrt()
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    energies = {"t(2)": StudentT(2.0, "multivariate"), "t(30)": StudentT(30.0, "multivariate"), "normal": Gaussian()}

    def table(updates: Tensor, scales: dict[str, float]) -> list[str]:
        posteriors = {}
        for name, energy in energies.items():
            poe = ProductOfExperts.of(NAMES, Identity(), energy, Absolute(scales[name]), anchor=anchor)
            posteriors[name] = full_posterior(poe, updates)
        result = compare_designs(posteriors, generator=generator, particles=128, steps=200)
        rows = {row.name: row.annealed for row in result.rows}
        gap = abs(rows["t(2)"].total - rows["normal"].total)
        assert gap > 4 * sum(row.total_error or math.inf for row in rows.values())
        lines = str(result).splitlines()
        assert [line.split()[0] for line in lines] == ["design", *rows]
        assert f"{result.rows[0].laplace.total:.2f}" in lines[1]
        return [row.name for row in result.rows]

    # Every energy at about its own best scale for these residuals.
    assert table(heavy, {"t(2)": 0.3, "t(30)": 0.6, "normal": 0.9}) == ["t(2)", "t(30)", "normal"]
    assert table(z + 0.3 * noise, {"t(2)": 0.22, "t(30)": 0.3, "normal": 0.3})[-1] == "t(2)"


def test_span_compares_sides_and_full_refuses_to(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 3)
    updates[:, :, 2:] = updates[:, :, :2] @ torch.ones(3, 3, dtype=torch.float64)  # rank below 4 on the left
    designs = {name_of(map_): ProductOfExperts.of(NAMES, map_, Gaussian()) for map_ in (InputGram(), OutputGram())}
    full = {name: full_posterior(poe, updates) for name, poe in designs.items()}
    with pytest.raises(ValueError, match="densities of different numbers.*numbers of an update"):
        compare_designs(full, generator=generator)
    span = {name: span_posterior(poe, span_statistics(poe, updates))[0] for name, poe in designs.items()}
    table = compare_designs(span, generator=generator, particles=64, steps=40)
    assert {row.name for row in table.rows} == set(designs)
    for row in table.rows:
        assert_close(row.laplace.value, closed_form(span[row.name]), 1e-8)
        assert bool((row.laplace.dimension == 3).all())
    with pytest.raises(ValueError, match="latents are"):
        compare_designs({"full": full["InputGram()"], "span": span["InputGram()"]}, generator=generator)
    directional = ProductOfExperts.of(NAMES, Directional(), Gaussian())
    span["Directional()"] = span_posterior(directional, span_statistics(directional, updates))[0]
    with pytest.raises(ValueError, match="'InputGram.*Directional.*3 numbers of an update, 'a' 1"):
        compare_designs(span, generator=generator)


def test_rank_deficient_sides_of_equal_rank_are_still_different_numbers(generator: torch.Generator) -> None:
    left = torch.randn(1, 2, 3, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, 2, 1, 3, generator=generator, dtype=torch.float64)
    posteriors = {
        name_of(map_): full_posterior(ProductOfExperts.of(NAMES[:2], map_, Gaussian()), left @ right)
        for map_ in (InputGram(), OutputGram())
    }
    assert torch.equal(*(dimensions(posterior) for posterior in posteriors.values()))
    with pytest.raises(ValueError, match="different directions"):
        compare_designs(posteriors, generator=generator)
    other = full_posterior(ProductOfExperts.of(NAMES[:2], InputGram(), Gaussian()), 2 * left @ right)
    with pytest.raises(ValueError, match="differ in length"):
        compare_designs({"one": posteriors["InputGram()"], "twice": other}, generator=generator)


def test_rounding_in_span_forms_is_not_rank(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 4, 20, 30)
    poe = ProductOfExperts.of(["a", "b", "c", "d"], Directional(), Gaussian())
    posterior, _ = span_posterior(poe, span_statistics(poe, updates))
    assert_close(dimensions(posterior), torch.ones(3, 4, dtype=torch.float64))
    expected = full_posterior(poe, updates)
    # On its own direction an expert is the same density in both coordinates.
    assert_close(log_normalizers(posterior), log_normalizers(expected), 1e-9)


def test_restricted_exponents_are_marginals(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0, "multivariate"))
    bound, _ = span_posterior(poe, span_statistics(poe, updates))
    posterior = with_restricted_exponents(poe, bound)
    for expert in posterior.experts:
        assert_close(expert.rho.k, torch.full((2,), (4.0 + 3) / 2, dtype=torch.float64))  # type: ignore[attr-defined]
        form = expert.operator.gram[0][1:, 1:]  # type: ignore[attr-defined]
        update = expert.update[0, 1:, 0]
        scale = torch.linalg.inv(form) * expert.scale_squared[0]
        density = stats.multivariate_t(np.zeros(3), scale.numpy(), df=4.0).logpdf(update.numpy())
        q = expert.operator.quadratic(expert.update)
        ours = -expert.energy_of(q) - log_normalizers(posterior)[:, posterior.experts.index(expert)]
        assert float(ours[0]) == pytest.approx(float(density), abs=1e-8)
    full = full_posterior(poe, updates)
    assert_close(log_normalizers(with_restricted_exponents(poe, full)), log_normalizers(full))
    # The whole density along the span would be much narrower.
    assert bool((log_normalizers(bound) + 2 < log_normalizers(posterior)).all())


# Bad input


@pytest.mark.parametrize("energy", [Welsch(), Cauchy(), StudentT(3.0), Custom(torch.sqrt)], ids=name_of)
def test_unnormalised_experts_are_refused_by_name(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 4)
    posterior = full_posterior(ProductOfExperts.of(NAMES, InputGram(), energy), updates)
    for call in (
        lambda: log_evidence(posterior, updates.mean(1)),
        lambda: annealed_evidence(posterior, generator=generator),
        lambda: compare_designs({"mine": posterior}, generator=generator),
    ):
        with pytest.raises(ValueError, match=f"(?s)'a' is not a density.*{type(energy).__name__}"):
            call()


def test_a_missing_anchor_is_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 2)
    poe = ProductOfExperts.of(NAMES, Identity(), Gaussian(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    posterior = full_posterior(poe, updates)
    for call in (
        lambda: log_evidence(posterior, updates.mean(1)),
        lambda: annealed_evidence(posterior, generator=generator),
    ):
        with pytest.raises(ValueError, match="eta = 0.*flat prior has no normaliser"):
            call()


def test_other_bad_input_is_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian())
    posterior = full_posterior(poe, updates)
    mode = fixed_point(poe, updates).value
    shifted = mode.clone()
    shifted[1] += 0.5
    with pytest.raises(ValueError, match="module 1 of the batch is not at its mode"):
        log_evidence(posterior, shifted)
    with pytest.raises(ValueError, match="at least two particles"):
        annealed_evidence(posterior, generator=generator, particles=1)
    with pytest.raises(ValueError, match="no designs"):
        compare_designs({}, generator=generator)
    factor = ProductOfExperts.of(NAMES, InputGram(), Gaussian()) * FactorExpert("extra", lambda c: c.sum(-1), "span")
    with pytest.raises(ValueError, match="'extra' is a FactorExpert"):
        log_normalizers(span_posterior(factor, span_statistics(factor, updates))[0])


def test_an_estimate_that_cannot_be_trusted_warns_and_carries_its_number(generator: torch.Generator) -> None:
    posterior = full_posterior(design(GeneralizedGaussian(4.0)), SKEWED)
    with pytest.warns(UserWarning, match="particles are effective in module 0.*units long"):
        estimate = annealed_evidence(posterior, generator=generator, particles=64, steps=3)
    assert math.isfinite(estimate.total)
    far = full_posterior(design(Gaussian(), eta=0.5), 1e4 * SKEWED)
    with pytest.raises(ValueError, match="longer than 3000 units"):
        annealed_evidence(far, generator=generator)


def test_single_precision_and_progress(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 8, 6)
    poe = ProductOfExperts.of(NAMES, OutputGram(), Gaussian())
    double, single = full_posterior(poe, updates), full_posterior(poe, updates.float())
    values = [log_evidence(posterior, mode_of(posterior)).value for posterior in (double, single)]
    assert_close(values[1], values[0], 1e-5)
    seen: list[tuple[int, int]] = []
    annealed_evidence(single, generator=generator, particles=64, steps=120, progress=lambda i, n: seen.append((i, n)))
    assert seen == [(i, 120) for i in range(1, 121)]
