"""Which published rules are the MAP of a Gaussian product of experts: each by the solver and by its own formula.

The rules' formulas are written out here on dense matrices, without anything of the package.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Activation,
    Anchor,
    Fisher,
    Gaussian,
    Identity,
    InputGram,
    Mixed,
    ModuleMoments,
    NormScaled,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
    Scale,
)
from tests.helpers import assert_close, random_updates

NAMES = ("a", "b", "c")
SHAPE = (5, 4)
MODULES = ("m", "n")


def solved(
    residual_map: ResidualMap,
    updates: Tensor,
    eta: float,
    scale: Scale | None = None,
    importance: tuple[float, ...] = (1.0, 1.0, 1.0),
    center: Tensor | None = None,
) -> Tensor:
    poe = ProductOfExperts.of(
        NAMES,
        residual_map,
        Gaussian(),
        scale or Absolute(1.0),
        importance=importance,
        anchor=Anchor(center, AbsolutePrecision(eta)),
    )
    return fixed_point(poe.for_modules(MODULES).bind(updates)).value


def moments(inputs: Tensor) -> ModuleMoments:
    """Of inputs ``(M, N, rows, d_in)``."""
    means = inputs.mT @ inputs / inputs.shape[-2]
    return ModuleMoments(
        "activations", {n: {m: means[j, i] for j, m in enumerate(MODULES)} for i, n in enumerate(NAMES)}
    )


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return random_updates(generator, 2, 3, *SHAPE)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 30, SHAPE[1], generator=generator, dtype=torch.float64)


def test_identity_is_averaging_and_weighted_averaging(updates: Tensor) -> None:
    assert_close(solved(Identity(), updates, 0.0), updates.mean(1))
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    expected = torch.einsum("n,mnij->mij", weights / weights.sum(), updates)
    assert_close(solved(Identity(), updates, 0.0, importance=(1.0, 2.0, 0.5)), expected)


def test_identity_with_an_anchor_is_task_arithmetic(updates: Tensor) -> None:
    """lambda = 1 / (N + 2 eta s^2): the anchor's precision is a task-arithmetic coefficient."""
    assert_close(solved(Identity(), updates, 0.5), updates.sum(1) / (3 + 2 * 0.5))


@pytest.mark.parametrize("floor", [0.0, 1e-2])
def test_fisher_is_fisher_weighted_averaging_of_the_weights(
    floor: float, updates: Tensor, generator: torch.Generator
) -> None:
    """Matena & Raffel (2022), with coefficients, on the weights themselves and not their updates."""
    fisher = torch.rand(2, 3, *SHAPE, generator=generator, dtype=torch.float64) + 0.01
    given = {n: {m: fisher[j, i] for j, m in enumerate(MODULES)} for i, n in enumerate(NAMES)}
    base = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)[:, None, None]
    precision = weights * (fisher + floor)
    expected = (precision * (base.unsqueeze(1) + updates)).sum(1) / precision.sum(1)
    found = solved(Fisher(ModuleMoments("fisher", given), floor), updates, 0.0, importance=(0.2, 0.5, 0.3))
    assert_close(base + found, expected)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
def test_activation_is_regmean(
    off_diagonal: float, updates: Tensor, inputs: Tensor, generator: torch.Generator
) -> None:
    """Jin et al. (2023), on the weights, with their factor on the off-diagonal entries."""
    base = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    for j in range(2):
        left = torch.zeros(SHAPE[1], SHAPE[1], dtype=torch.float64)
        right = torch.zeros(SHAPE[1], SHAPE[0], dtype=torch.float64)
        for i in range(3):
            x = inputs[j, i]
            gram = x.T @ x / len(x)
            for row in range(SHAPE[1]):
                for column in range(SHAPE[1]):
                    gram[row, column] *= 1.0 if row == column else off_diagonal
            left += gram
            right += gram @ (base[j] + updates[j, i]).T
        expected = torch.linalg.solve(left, right).T
        found = solved(Activation(moments(inputs), off_diagonal), updates, 0.0)
        assert_close(base[j] + found[j], expected)


def test_input_gram_with_norm_scale_one_is_wudi(updates: Tensor) -> None:
    """The closed form of WUDI's objective, sum |(Z - U_i) U_i^T|^2 / |U_i|^2, and its gradient."""
    found = solved(InputGram(), updates, 0.0, NormScaled(1.0))
    grams = updates.mT @ updates / updates.square().sum((-2, -1), keepdim=True)
    assert_close(found, (updates @ grams).sum(1) @ torch.linalg.inv(grams.sum(1)), 1e-9)
    z = found.clone().requires_grad_(True)
    norms = updates.square().sum((-2, -1))
    objective = (((z.unsqueeze(1) - updates) @ updates.mT).square().sum((-2, -1)) / norms).sum()
    (gradient,) = torch.autograd.grad(objective, z)
    assert_close(gradient, torch.zeros_like(gradient), 1e-9)


def test_wudi_of_updates_that_do_not_span_the_inputs_is_the_limit_of_a_vanishing_anchor(
    generator: torch.Generator,
) -> None:
    """With eta -> 0 the MAP is the minimiser of least norm: the closed form with a pseudo-inverse."""
    low = torch.randn(2, 3, 5, 1, generator=generator, dtype=torch.float64)
    updates = low @ torch.randn(2, 3, 1, 4, generator=generator, dtype=torch.float64)
    grams = updates.mT @ updates / updates.square().sum((-2, -1), keepdim=True)
    expected = (updates @ grams).sum(1) @ torch.linalg.pinv(grams.sum(1), rtol=1e-10)
    errors = [
        float((solved(InputGram(), updates, eta, NormScaled(1.0)) - expected).norm() / expected.norm())
        for eta in (1e-4, 1e-6, 1e-8)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("centered", [False, True])
def test_activation_with_an_anchor_is_bmm(centered: bool, updates: Tensor, inputs: Tensor) -> None:
    """[BMM] Eq. 8: (sum W_i X_i X_i^T + l Z_0)(sum X_i X_i^T + l I)^-1, whose ridge is l = 2 eta s^2 n."""
    rows, scale, eta = inputs.shape[2], 0.6, 0.3
    center = updates.mean(1) if centered else None
    ridge = 2 * eta * scale**2 * rows
    grams = inputs.mT @ inputs
    prior = torch.zeros_like(updates[:, 0]) if center is None else center
    left = (updates @ grams).sum(1) + ridge * prior
    expected = left @ torch.linalg.inv(grams.sum(1) + ridge * torch.eye(SHAPE[1], dtype=torch.float64))
    assert_close(solved(Activation(moments(inputs)), updates, eta, Absolute(scale), center=center), expected)


def test_input_gram_with_an_anchor_is_data_free_bmm(updates: Tensor) -> None:
    """[BMM] Eq. 15: task-vector Grams in the place of the activations', l = 2 eta s^2."""
    ridge = 2 * 0.3 * 0.36
    grams = updates.mT @ updates
    center = 0.3 * updates.sum(1)
    left = (updates @ grams).sum(1) + ridge * center
    expected = left @ torch.linalg.inv(grams.sum(1) + ridge * torch.eye(SHAPE[1], dtype=torch.float64))
    assert_close(solved(InputGram(), updates, 0.3, Absolute(0.6), center=center), expected)


def test_mixed_without_unit_traces_is_bmm_with_both_grams(updates: Tensor, inputs: Tensor) -> None:
    """[BMM] Eq. 35: epsilon X X^T + (1 - epsilon) U^T U, here with X X^T divided by n."""
    grams = 0.25 * inputs.mT @ inputs / inputs.shape[2] + 0.75 * updates.mT @ updates
    ridge = 2 * 0.1
    expected = (updates @ grams).sum(1) @ torch.linalg.inv(
        grams.sum(1) + ridge * torch.eye(SHAPE[1], dtype=torch.float64)
    )
    assert_close(solved(Mixed(moments(inputs), 0.25, unit_trace=False), updates, 0.1), expected)


def test_output_gram_is_the_input_gram_of_the_transposed_problem(updates: Tensor) -> None:
    assert_close(solved(OutputGram(), updates, 0.2).mT, solved(InputGram(), updates.mT.contiguous(), 0.2))


def test_relative_precision_is_the_absolute_one_it_stands_for(updates: Tensor) -> None:
    """eta = eta_rel (1/d) sum a_i tr(P_i) / s_i^2, once by the library and once from the traces."""
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Gaussian(), Absolute(0.5), anchor=Anchor(precision=RelativePrecision(0.1))
    )
    relative = fixed_point(poe.bind(updates))
    eta = 0.1 * updates.square().sum((-3, -2, -1)) / SHAPE[1] / 0.25
    assert_close(relative.info.anchor_precision, eta)
    for j in range(2):
        one = updates[j : j + 1].expand(2, -1, -1, -1)
        assert_close(relative.value[j], solved(InputGram(), one, float(eta[j]), Absolute(0.5))[0])
