"""Operators and the helpers around them at values worked by hand and at the edges of rank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poe_models import Diagonal, Gram, RankOne, ScaledIdentity
from poe_models.operators import mean_curvatures, moment_rounding, root_of, span_rank, thin, unit_diagonal
from poe_models.sums import inner_products
from tests.helpers import assert_close


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ranks_and_pseudo_determinants_by_hand() -> None:
    zero, ones = torch.zeros(1, 2, 3, dtype=torch.float64), torch.ones(1, 2, 3, dtype=torch.float64)
    cases = [
        (ScaledIdentity((2, 3), zero), 6.0, 0.0, 1.0),
        (RankOne(2 * ones), 1.0, math.log(24), 24.0),
        (RankOne(zero), 0.0, 0.0, 0.0),
        (Diagonal(2 * ones), 6.0, 6 * math.log(2), 2.0),
        (Diagonal(zero), 0.0, 0.0, 0.0),
        (Gram(f64([[2.0], [0.0]]), "left", (2, 3)), 3.0, 3 * math.log(4), 2.0),
        (Gram(f64([[2.0], [0.0], [0.0]]), "right", (2, 3)), 2.0, 2 * math.log(4), 4 / 3),
    ]
    for operator, rank, log_determinant, curvature in cases:
        assert float(operator.dimension()) == rank
        assert float(operator.log_pseudo_determinant()) == pytest.approx(log_determinant, abs=1e-12)
        assert float(operator.mean_curvature(1)) == pytest.approx(curvature)


def test_inner_products_of_one_and_of_several() -> None:
    one = f64([[1.0, 2.0]], [[3.0, 0.0]])
    assert_close(inner_products([one]), f64([[5.0]], [[9.0]]))
    other = f64([[0.0, 1.0]], [[1.0, 1.0]])
    assert_close(inner_products([one, other]), f64([[5.0, 2.0], [2.0, 1.0]], [[9.0, 3.0], [3.0, 2.0]]))
    assert inner_products([one.half()]).dtype == torch.float64


def test_rank_of_a_span_does_not_depend_on_lengths() -> None:
    a, b = f64([[1.0, 0.0, 0.0]]), f64([[0.0, 1e-8, 0.0]])
    for vectors, rank in (([a], 1), ([a, b], 2), ([a, 3 * a], 1), ([a, b, a + b], 2), ([0 * a], 0), ([a, 0 * b], 1)):
        assert float(span_rank(inner_products(vectors))) == rank


def test_directional_experts_share_as_many_directions_as_they_span() -> None:
    a, b = f64([[2.0, 0.0]]), f64([[0.0, 1.0]])
    assert [float(c) for c in mean_curvatures([RankOne(a)])] == [4.0]
    assert [float(c) for c in mean_curvatures([RankOne(a), RankOne(b)])] == [2.0, 0.5]
    assert [float(c) for c in mean_curvatures([RankOne(a), RankOne(3 * a)])] == [4.0, 36.0]
    assert [float(c) for c in mean_curvatures([RankOne(0 * a)])] == [0.0]
    identity = ScaledIdentity((1, 2), a)
    assert [float(c) for c in mean_curvatures([identity, RankOne(a), RankOne(b)])] == [1.0, 2.0, 0.5]


def test_factors_are_thin_and_no_thinner(generator: torch.Generator) -> None:
    for columns, kept in ((2, 2), (3, 3), (4, 3), (9, 3)):
        factor = torch.randn(2, 3, columns, generator=generator, dtype=torch.float64)
        assert thin(factor).shape == (2, 3, kept)
        assert_close(thin(factor) @ thin(factor).mT, factor @ factor.mT)
        assert (thin(factor) is factor) is (columns <= 3)


@pytest.mark.parametrize("sizes", [[1.0, 1.0, 1.0], [1e6, 1.0, 1e-6]])
def test_roots_of_regular_and_singular_matrices(sizes: list[float], generator: torch.Generator) -> None:
    scale = f64(*sizes)
    for rank in (3, 2, 1):
        root = scale[:, None] * torch.randn(2, 3, rank, generator=generator, dtype=torch.float64)
        matrix = root @ root.mT
        found = root_of(matrix)
        unit = scale.reciprocal()
        assert_close(unit[:, None] * (found @ found.mT) * unit, unit[:, None] * matrix * unit, 1e-12)
        assert torch.linalg.matrix_rank(unit[:, None] * found).tolist() == [rank, rank]


def test_what_is_within_the_rounding_of_its_dtype_is_no_direction() -> None:
    """Eigenvalues 1e-7 and 2 - 1e-7: a direction in float64, none in float32, whose rounding is 1e-6 on this side."""
    near = f64([1.0, 1 - 1e-7], [1 - 1e-7, 1.0])
    assert moment_rounding(2, torch.float32) == pytest.approx(8 * 2.0**-23)
    for dtype, rank in ((torch.float64, 2), (torch.float32, 1)):
        for batch in (near, torch.stack([torch.eye(2, dtype=torch.float64), near])):
            found = root_of(batch, dtype)
            assert_close(found @ found.mT, batch, 2e-7)
            singular = torch.linalg.svdvals(found.view(-1, 2, 2)[-1])
            assert int((singular.square() > 1e-12).sum()) == rank


def test_a_matrix_that_is_clearly_negative_is_refused_and_rounding_is_not() -> None:
    rounding = moment_rounding(2, torch.float64)
    for below, refused in ((500, False), (2000, True)):
        matrix = f64([1.0, 1 + below * rounding], [1 + below * rounding, 1.0])  # eigenvalues 2 and -below * rounding
        if refused:
            with pytest.raises(ValueError, match="it is not positive semi-definite"):
                root_of(matrix)
        else:
            assert_close(root_of(matrix) @ root_of(matrix).mT, torch.ones(2, 2, dtype=torch.float64))


def test_unit_diagonals_and_their_divisors() -> None:
    matrix = f64([4.0, 2.0, 0.0], [2.0, -9.0, 0.0], [0.0, 0.0, 0.0])
    unit, sizes = unit_diagonal(matrix)
    assert_close(sizes, f64(2.0, 3.0, 1.0))
    assert_close(unit, f64([1.0, 1 / 3, 0.0], [1 / 3, -1.0, 0.0], [0.0, 0.0, 0.0]))
