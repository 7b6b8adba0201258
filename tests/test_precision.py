"""Every precision matrix against the dense one, entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poe_models.precisions import (
    DiagonalPrecision,
    GramPrecision,
    KroneckerSum,
    LowRankUpdate,
    NotPositiveDefiniteError,
    Precision,
)
from tests.helpers import assert_close

LEADING, ROWS, COLUMNS = (3, 2), 3, 4
"""Chains and modules, and the shape of an update."""
Case = Callable[[torch.Generator], tuple[Precision, Tensor]]


def positive(generator: torch.Generator, size: int) -> Tensor:
    """Positive definite matrices ``(S, M, size, size)``."""
    root = torch.randn(*LEADING, size, size + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of matrices with the same leading dimensions."""
    return torch.einsum("...ij,...kl->...ikjl", left, right).flatten(-4, -3).flatten(-2)


def eyes(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).expand(*LEADING, -1, -1)


def left_gram(generator: torch.Generator) -> tuple[Precision, Tensor]:
    a = positive(generator, ROWS)
    return GramPrecision(a, "left", (ROWS, COLUMNS)), kron(a, eyes(COLUMNS))


def right_gram(generator: torch.Generator) -> tuple[Precision, Tensor]:
    b = positive(generator, COLUMNS)
    return GramPrecision(b, "right", (ROWS, COLUMNS)), kron(eyes(ROWS), b)


def both_sides(generator: torch.Generator) -> tuple[Precision, Tensor]:
    a, b = positive(generator, ROWS), positive(generator, COLUMNS)
    a[0] = torch.ones(ROWS, ROWS)  # of rank one, with eigenvalues that rounding makes negative
    shift = (0.3 + torch.rand(LEADING, generator=generator, dtype=torch.float64))[..., None, None]
    return KroneckerSum(a, b, shift), kron(a, eyes(COLUMNS)) + kron(eyes(ROWS), b) + shift * eyes(ROWS * COLUMNS)


def diagonal(generator: torch.Generator) -> tuple[Precision, Tensor]:
    values = 0.2 + torch.rand(*LEADING, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return DiagonalPrecision(values, (ROWS, COLUMNS)), torch.diag_embed(values.flatten(-2))


def low_rank(base: Case) -> Case:
    """One term that adds and one that takes away, as far as the matrix stays positive definite."""

    def case(generator: torch.Generator) -> tuple[Precision, Tensor]:
        precision, dense = base(generator)
        vectors = [torch.randn(*LEADING, ROWS, COLUMNS, generator=generator, dtype=torch.float64) for _ in range(2)]
        flat = [v.flatten(-2).unsqueeze(-1) for v in vectors]
        against = (flat[1].mT @ torch.linalg.solve(dense, flat[1])).squeeze((-2, -1))
        coefficients = torch.stack([torch.full_like(against, 0.7), -0.6 / against], -1)
        for k in range(2):
            dense = dense + coefficients[..., k, None, None] * flat[k] @ flat[k].mT
        return LowRankUpdate(precision, vectors, coefficients), dense

    case.__name__ = f"low_rank_{base.__name__}"
    return case


PLAIN: list[Case] = [left_gram, right_gram, both_sides, diagonal]
CASES = [*PLAIN, *map(low_rank, PLAIN)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_agrees_with_the_dense_matrix(case: Case, generator: torch.Generator) -> None:
    precision, dense = case(generator)
    x = torch.randn(5, *LEADING, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    flat = x.flatten(-2).unsqueeze(-1)
    assert (precision.shape, precision.dtype) == ((ROWS, COLUMNS), torch.float64)
    assert_close(precision.solve(x).flatten(-2), torch.linalg.solve(dense, flat).squeeze(-1))
    assert_close(precision.logdet(), torch.linalg.slogdet(dense)[1])
    assert_close(precision.inverse_diagonal().flatten(-2), torch.linalg.inv(dense).diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_its_square_roots_belong_together(case: Case, generator: torch.Generator) -> None:
    precision, dense = case(generator)
    x = torch.randn(5, *LEADING, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    times = (dense @ x.flatten(-2).unsqueeze(-1)).squeeze(-1)
    assert_close(precision.standardize(x).square().sum((-2, -1)), (x.flatten(-2) * times).sum(-1))
    assert_close(precision.whiten(times.unflatten(-1, (ROWS, COLUMNS))), precision.standardize(x))
    assert_close(precision.sample(precision.standardize(x)), x)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.__name__)
def test_marginal_variances_in_other_coordinates(case: Case, generator: torch.Generator) -> None:
    update, dense = low_rank(case)(generator)
    assert isinstance(update, LowRankUpdate)
    turn = torch.randn(5, ROWS, generator=generator, dtype=torch.float64)
    change = update.base.inverse_diagonal() + update.inverse_diagonal_change(lambda x: x)
    assert_close(change.flatten(-2), torch.linalg.inv(dense).diagonal(dim1=-2, dim2=-1))
    # Of ``turn @ x``: the change of the covariance, turned on both sides.
    units = torch.eye(ROWS * COLUMNS, dtype=torch.float64).unflatten(-1, (ROWS, COLUMNS))
    plain = update.base.solve(units[:, None, None].expand(-1, *LEADING, -1, -1)).flatten(-2).movedim(0, -1)
    difference = torch.linalg.inv(dense) - plain
    lifted = torch.kron(turn, torch.eye(COLUMNS, dtype=torch.float64))
    expected = (lifted @ difference @ lifted.mT).diagonal(dim1=-2, dim2=-1)
    assert_close(update.inverse_diagonal_change(lambda x: turn @ x).flatten(-2), expected)


def test_modules_without_chains(generator: torch.Generator) -> None:
    values = 0.2 + torch.rand(3, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    assert_close(DiagonalPrecision(values, (ROWS, COLUMNS)).logdet(), values.log().sum((-2, -1)))
    a, b = (torch.diag_embed(values.mean(dim)) for dim in (2, 1))
    shift = torch.full((3, 1, 1), 0.5, dtype=torch.float64)
    sums = values.mean(2).unsqueeze(-1) + values.mean(1).unsqueeze(-2) + 0.5
    assert_close(KroneckerSum(a, b, shift).logdet(), sums.log().sum((-2, -1)))


def test_a_correction_keeps_the_dtype_of_its_base(generator: torch.Generator) -> None:
    base = GramPrecision(positive(generator, ROWS).float(), "left", (ROWS, COLUMNS))
    vectors = [torch.randn(*LEADING, ROWS, COLUMNS, generator=generator)]
    update = LowRankUpdate(base, vectors, torch.ones(*LEADING, 1, dtype=torch.float64))
    x = torch.randn(*LEADING, ROWS, COLUMNS, generator=generator)
    assert {update.solve(x).dtype, update.sample(x).dtype, update.standardize(x).dtype} == {torch.float32}
    assert update.logdet().dtype == torch.float64


@pytest.mark.parametrize("largest", [1.0, 9.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pivots_of_a_few_units_of_rounding_are_not_trusted(largest: float, dtype: torch.dtype) -> None:
    unit = largest * torch.finfo(dtype).eps
    GramPrecision(torch.diag(torch.tensor([largest, 4.5 * unit], dtype=dtype)).unsqueeze(0), "left", (2, 3))
    bad = torch.diag(torch.tensor([largest, 3.5 * unit], dtype=dtype))
    with pytest.raises(NotPositiveDefiniteError, match="module 1 of the batch"):
        GramPrecision(torch.stack([torch.eye(2, dtype=dtype), bad]), "left", (2, 3))


def test_a_negative_matrix_is_refused_whatever_its_structure() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="module 0"):
        GramPrecision(-torch.eye(2, dtype=torch.float64).unsqueeze(0), "right", (3, 2))
    with pytest.raises(NotPositiveDefiniteError, match="Raise the anchor"):
        KroneckerSum(0 * one, 0 * one, 0 * one)
    with pytest.raises(NotPositiveDefiniteError, match="some entry"):
        DiagonalPrecision(torch.tensor([[[1.0, 0.0]]]), (1, 2))
    base = DiagonalPrecision(one, (1, 1))
    with pytest.raises(NotPositiveDefiniteError, match=r"module 0 .*relative curvature -0\.5"):
        LowRankUpdate(base, [one], torch.full((1, 1), -1.5, dtype=torch.float64))
    LowRankUpdate(base, [one], torch.full((1, 1), -0.9, dtype=torch.float64))


def test_the_module_that_is_no_minimum_is_named() -> None:
    ones = torch.ones(3, 1, 2, dtype=torch.float64)
    coefficients = torch.tensor([[1.0], [-2.0], [-0.75]], dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match=r"module 1 .*relative curvature -3\b"):
        LowRankUpdate(DiagonalPrecision(ones, (1, 2)), [ones], coefficients)
    # The worst direction counts, and a flat one is none.
    first, second = torch.eye(2, dtype=torch.float64).unsqueeze(1).unsqueeze(1)
    single = DiagonalPrecision(ones[:1], (1, 2))
    for worst, shown in ((-3.0, "-2"), (-1.0, "0")):
        with pytest.raises(NotPositiveDefiniteError, match=rf"relative curvature {shown}\)"):
            LowRankUpdate(single, [first, second], torch.tensor([[5.0, worst]], dtype=torch.float64))
