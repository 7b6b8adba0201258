from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poe_models import Diagonal, Directional, Gram, Identity, InputGram, Operator, OutputGram, ResidualMap
from tests.helpers import assert_close, name_of, random_updates

SHAPES = [(4, 3), (3, 7), (1, 5), (6, 1)]
SINGLE: list[ResidualMap] = [Identity(), Directional(), OutputGram(), InputGram()]


def formula(residual_map: ResidualMap, update: Tensor, x: Tensor) -> Tensor:
    """q as DESIGN's table has it, for x = Z - U."""
    if isinstance(residual_map, Identity):
        return x.square().sum((-2, -1))
    if isinstance(residual_map, Directional):
        return (x * update).sum((-2, -1)).square()
    product = update.mT @ x if isinstance(residual_map, OutputGram) else x @ update.mT
    return product.square().sum((-2, -1))


def dense(operator: Operator, shape: tuple[int, int]) -> Tensor:
    """P as a matrix on vec(x), by applying it to every unit matrix."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).unflatten(1, shape).unsqueeze(1)
    return operator.apply(units.expand(-1, 2, -1, -1)).flatten(2).permute(1, 2, 0)  # (M, D, D)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual_map", SINGLE, ids=name_of)
def test_operator_is_the_map_of_the_paper(
    residual_map: ResidualMap, shape: tuple[int, int], generator: torch.Generator
) -> None:
    update, x = random_updates(generator, 2, 2, *shape).unbind(1)
    operator = residual_map.operator(update)
    assert_close(operator.quadratic(x), formula(residual_map, update, x))
    assert_close((x * operator.apply(x)).sum((-2, -1)), formula(residual_map, update, x))
    matrix = dense(operator, shape)
    assert_close(matrix, matrix.mT)
    assert_close(operator.dimension(), torch.linalg.matrix_rank(matrix).double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual_map", SINGLE, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pseudo_determinant_is_that_of_the_dense_matrix(
    residual_map: ResidualMap, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    update = random_updates(generator, 2, 1, *shape)[:, 0]
    if min(shape) > 1:
        update[1, 1:] = update[1, :1] * torch.tensor([[2.0]])  # rank one: a null space on either side
    operator = residual_map.operator(update.to(dtype))
    eigenvalues = torch.linalg.eigvalsh(dense(residual_map.operator(update), shape))
    kept = eigenvalues > 1e-10 * eigenvalues[:, -1:]
    assert_close(operator.dimension(), kept.sum(-1).double())
    expected = torch.where(kept, eigenvalues, 1.0).log().sum(-1)
    assert operator.log_pseudo_determinant().dtype == torch.float64
    assert_close(operator.log_pseudo_determinant(), expected, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("residual_map", SINGLE[1:], ids=name_of)
def test_pseudo_determinant_of_a_zero_operator_is_one(residual_map: ResidualMap) -> None:
    operator = residual_map.operator(torch.zeros(2, 3, 4, dtype=torch.float64))
    assert_close(operator.log_pseudo_determinant(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("residual_map", SINGLE, ids=name_of)
def test_mean_curvature_is_a_trace_over_a_side(residual_map: ResidualMap, generator: torch.Generator) -> None:
    update = random_updates(generator, 2, 1, 4, 3)[:, 0]
    total = dense(residual_map.operator(update), (4, 3)).diagonal(dim1=-2, dim2=-1).sum(-1)
    # The trace on vec(Z) counts the Gram once per column (row) of the other side; Directional divides by N.
    sides = {Identity: 12, Directional: 5, OutputGram: 4 * 3, InputGram: 3 * 4}
    assert_close(residual_map.operator(update).mean_curvature(5), total / sides[type(residual_map)])


@pytest.mark.parametrize("residual_map", SINGLE, ids=name_of)
def test_factored_updates_give_the_same_operator(residual_map: ResidualMap, generator: torch.Generator) -> None:
    left = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    plain, factored = residual_map.operator(left @ right), residual_map.operator_of_factors(left, right)
    assert_close(factored.apply(x), plain.apply(x))
    assert_close(factored.quadratic(x), plain.quadratic(x))
    assert_close(factored.dimension(), plain.dimension())


def test_diagonal_is_elementwise(generator: torch.Generator) -> None:
    values = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    operator = Diagonal(values)
    assert_close(operator.quadratic(x), (values * x * x).sum((-2, -1)))
    assert_close(dense(operator, (3, 4)).diagonal(dim1=-2, dim2=-1), values.flatten(1))
    assert_close(operator.mean_curvature(1), values.mean((-2, -1)))
    assert_close(operator.log_pseudo_determinant(), values.log().sum((-2, -1)))
    assert_close(Diagonal(values * torch.eye(3, 4)).log_pseudo_determinant(), values.diagonal(0, 1, 2).log().sum(-1))


def test_residuals_are_summed_in_float64() -> None:
    x = torch.full((1, 3000, 3000), 1e-3, dtype=torch.float32)
    value = Identity().operator(x).quadratic(x)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(9.0, rel=1e-6)


def test_a_factor_of_the_wrong_side_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 4 rows"):
        Gram(torch.ones(3, 2), "left", (4, 3))


def test_derivatives_at_a_zero_residual_are_finite(generator: torch.Generator) -> None:
    update = random_updates(generator, 1, 1, 3, 4)[:, 0]
    for residual_map in SINGLE:
        z = update.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            residual_map.operator(update).quadratic(z - update).sum(), z, create_graph=True
        )
        (second,) = torch.autograd.grad(gradient.sum(), z)
        assert_close(gradient.detach(), torch.zeros_like(update))
        assert bool(second.isfinite().all())


def test_what_is_kept_outlives_no_transform(generator: torch.Generator) -> None:
    """A Hessian by `torch.func` first: what it made of the operator must not be used after it."""
    operator = Gram(torch.randn(1, 3, 5, generator=generator, dtype=torch.float64), "right", (4, 3))
    x = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
    hessian = torch.func.hessian(lambda z: operator.quadratic(z).sum() + (operator.gram * z[:, :3]).sum())(x)
    assert hessian.shape == (1, 4, 3, 1, 4, 3)
    expected = (x @ operator.factor).square().sum((-2, -1))
    assert_close(operator.quadratic(x), expected, 1e-12)
    assert operator.narrow is operator.narrow
    assert operator.gram is operator.gram
