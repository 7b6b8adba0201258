from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from inference import fixed_point, minimize
from inference.laplace import DenseLaplace, Laplace, laplace
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    FactorExpert,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    StudentT,
    Welsch,
    average,
    span_statistics,
)
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]
CASES = [
    (Identity(), (3, 4)),
    (OutputGram(), (3, 4)),
    (InputGram(), (3, 4)),
    (InputGram(), (1, 12)),  # three rows span less than twelve inputs: compressed
    (OutputGram(), (9, 1)),
    (Directional(), (3, 4)),
    ((OutputGram(), InputGram()), (3, 4)),
    ((Identity(), InputGram()), (3, 4)),
]


def assert_white(white: torch.Tensor) -> None:
    """Rows ``(D, n)`` are independent standard normals: means and second moments, all together at a level of 1e-6.

    Means have variance 1 / n, second moments of i = j and i != j variances 2 / n and 1 / n.
    """
    size, n = white.shape
    reach = NormalDist().inv_cdf(1 - 1e-6 / (size * (size + 3)))  # two-sided, of size means and size (size + 1) / 2
    assert float(white.mean(1).abs().max()) < reach / math.sqrt(n)
    excess = (white @ white.mT / n - torch.eye(size)) / (1 + torch.eye(size)).sqrt()
    assert float(excess.abs().max()) < reach / math.sqrt(n)


def dense_hessian(poe: ProductOfExperts, updates: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    posterior = poe.bind(updates)
    return torch.func.hessian(lambda z: posterior.energy(z.view(at.shape)).sum())(at.flatten())


@pytest.mark.parametrize("energy", [Gaussian(), Cauchy(), StudentT(3.0), Welsch()], ids=name_of)
@pytest.mark.parametrize(("residual_map", "shape"), CASES, ids=name_of)
def test_structure_equals_the_dense_autograd_hessian(
    residual_map: object, shape: tuple[int, int], energy: object, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, *shape)
    poe = ProductOfExperts.of(
        NAMES, residual_map, energy, Relative(0.8), anchor=Anchor(average, RelativePrecision(0.5)), temperature=0.3
    )  # type: ignore[arg-type]
    solution = fixed_point(poe.bind(updates))
    assert solution.converged
    ours = laplace(poe.bind(updates), solution)
    hessian = dense_hessian(poe, updates, solution.value)
    covariance = 0.3 * torch.linalg.inv(hessian)
    assert_close(ours.standard_deviations().flatten(), covariance.diagonal().sqrt(), 1e-7)
    reference = torch.distributions.MultivariateNormal(solution.value.flatten(), covariance)
    z = solution.value + 0.3 * torch.randn(5, 1, *shape, generator=generator, dtype=torch.float64)
    assert_close(ours.log_density(z).squeeze(-1), reference.log_prob(z.flatten(1)), 1e-8)
    size = math.prod(shape)
    integral = -poe.bind(updates).energy(solution.value) / 0.3 + 0.5 * size * math.log(2 * math.pi * 0.3)
    assert_close(ours.log_integral(), integral - 0.5 * torch.linalg.slogdet(hessian)[1], 1e-8)


@pytest.mark.parametrize("temperature", [0.3, 4.0])
@pytest.mark.parametrize(("residual_map", "shape"), CASES, ids=name_of)
def test_draws_have_the_dense_covariance(
    residual_map: object, shape: tuple[int, int], temperature: float, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, *shape)
    poe = ProductOfExperts.of(
        NAMES, residual_map, Cauchy(), Relative(0.8), [1.0, 0.5, 2.0], Anchor(precision=AbsolutePrecision(0.5)),
        temperature,
    )  # type: ignore[arg-type]  # fmt: skip
    solution = fixed_point(poe.bind(updates))
    draws = laplace(poe.bind(updates), solution).sample(2000, generator)
    values = torch.stack([draws.latents(0, i).flatten() for i in range(draws.num_draws)]) - solution.value.flatten()
    covariance = temperature * torch.linalg.inv(dense_hessian(poe, updates, solution.value))
    assert_white(torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), values.mT, upper=False))
    assert torch.equal(draws.latents(0, 7), draws.latents(0, 7))


@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_dense_draws_have_the_dense_covariance(temperature: float, generator: torch.Generator) -> None:
    """Over two modules that a factor expert couples, against the Hessian of the summed energies."""
    updates = random_updates(generator, 2, 2, 3, 4)
    coupling = FactorExpert("coupling", lambda c: (c[..., 0, 0] - c[..., 1, 0]).square(), "span", "model")
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), Relative(0.8), [0.5, 2.0], anchor, temperature)
    posterior = (poe * coupling).bind(span_statistics(poe, updates))
    mode = minimize(posterior).value
    draws = DenseLaplace(posterior, mode).sample(4000, generator).values[0] - mode
    hessian = torch.func.hessian(lambda x: posterior.joint_energy(x.view(mode.shape)))(mode.flatten())
    covariance = temperature * torch.linalg.inv(hessian)
    assert_white(torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), draws.flatten(1).mT, upper=False))


def test_span_laplace_and_the_dense_one_agree(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(3.0), Relative(0.7), temperature=0.5)
    posterior = poe.bind(span_statistics(poe, updates))
    mode = fixed_point(posterior).value
    structured, dense = Laplace(posterior, mode), DenseLaplace(posterior, mode)
    assert_close(structured.standard_deviations(), dense.standard_deviations(), 1e-8)
    assert_close(structured.log_integral().sum(), dense.log_integral(), 1e-8)
    x = mode + 0.1 * torch.randn(6, *mode.shape, generator=generator, dtype=torch.float64)
    assert_close(structured.log_density(x).sum(-1), dense.log_density(x), 1e-8)


def test_factor_experts_go_through_the_dense_hessian(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    coupling = FactorExpert("coupling", lambda c: (c[..., 0, 0] - c[..., 1, 0]).square(), "span", "model")
    poe = ProductOfExperts.of(["a", "b"]) * coupling
    posterior = poe.bind(span_statistics(poe, updates))
    solution = minimize(posterior)
    assert solution.converged
    with pytest.raises(ValueError, match="DenseLaplace"):
        Laplace(posterior, solution.value)
    draws = DenseLaplace(posterior, solution.value).sample(20_000, generator).values[0]
    deviations = DenseLaplace(posterior, solution.value).standard_deviations()
    error = (draws.std(0) / deviations - 1).abs().max()
    assert float(error) < 5 / math.sqrt(2 * 20_000)


def test_gaussian_evidence_is_exact(generator: torch.Generator) -> None:
    # Two normalised zero-mean Gaussians with precisions A and B: the product integrates to N(0; 0, A^-1 + B^-1).
    updates = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    poe = ProductOfExperts.of(
        ["a"], Identity(), Gaussian(), Relative(1.0), anchor=Anchor(precision=AbsolutePrecision(0.7))
    )
    solution = fixed_point(poe.bind(updates))
    value = laplace(poe.bind(updates), solution).log_integral()
    assert_close(value, 3 * math.log(2 * math.pi / (1 + 1.4)), 1e-12)


def test_a_saddle_is_not_a_minimum() -> None:
    updates = torch.tensor([[[[3.0]], [[-3.0]]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        ["a", "b"], Identity(), Welsch(), Relative(0.3), anchor=Anchor(precision=AbsolutePrecision(1e-3))
    )
    with pytest.raises(ValueError, match="not at a minimum"):
        Laplace(poe.bind(updates), torch.full((1, 1, 1), 2.0, dtype=torch.float64))


def test_an_improper_posterior_is_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 2)
    for residual_map, energy, reason in (
        (Identity(), Welsch(), "bounded"),
        (Identity(), Cauchy(), "4 of its directions"),
        (Directional(), Gaussian(), "1 of its directions"),
    ):
        flat = Anchor(average, AbsolutePrecision(0.0))
        poe = ProductOfExperts.of(NAMES, residual_map, energy, anchor=flat, temperature=2.0)
        with pytest.raises(ValueError, match=reason):
            Laplace(poe.bind(updates), updates.mean(1))
    enough = ProductOfExperts.of(NAMES, Identity(), Cauchy(2.0), anchor=Anchor(average, AbsolutePrecision(0.0)))
    Laplace(enough.bind(updates), fixed_point(enough.bind(updates)).value)


def test_a_solution_of_something_else_or_one_that_did_not_converge_is_noticed(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.3))
    solution = fixed_point(poe.bind(updates))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 5\) for a posterior with latents \(1, 4, 5\)"):
        laplace(poe.bind(updates[:1]), solution)
    early = fixed_point(poe.bind(updates), max_steps=1, acceleration=False)
    assert not early.converged
    with pytest.warns(UserWarning, match="had not converged"):
        laplace(poe.bind(updates), early)
