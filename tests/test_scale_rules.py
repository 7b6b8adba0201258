"""Rules for scales and precisions worked by hand, on sizes rather than on updates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poe_models import Absolute, AbsolutePrecision, Balanced, NormScaled, Relative, RelativePrecision, Scale
from poe_models.scales import PRECISIONS, SCALES, ExpertSizes, weighted_median
from tests.helpers import assert_close


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SIZES = ExpertSizes(
    norm_squared=f64([2.0, 8.0, 0.5], [3.0, 3.0, 0.0]),
    residual_at_zero=f64([6.0, 4.0, 10.0], [5.0, 7.0, 0.0]),
    mean_curvature=f64([2.0, 4.0, 1.0], [1.0, 0.5, 0.0]),
    importance=f64(1.0, 1.0, 3.0),
    active=torch.tensor([[True, True, True], [True, True, False]]),
)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Absolute(3.0), [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]),
        (NormScaled(3.0), [[6.0, 24.0, 1.5], [9.0, 9.0, 0.0]]),
        (Relative(3.0), [[54.0, 36.0, 90.0], [45.0, 63.0, 0.0]]),
        # Ratios 3, 1, 10 of weights 1, 1, 3: the median is 10. Ratios 5, 14 and none: between the two, 9.5.
        (Balanced(3.0), [[180.0, 360.0, 90.0], [85.5, 42.75, 0.0]]),
    ],
)
def test_scales_by_hand(scale: Scale, expected: list[list[float]]) -> None:
    assert_close(scale.squared(SIZES), f64(*expected), 1e-14)


def test_balanced_in_common_units_takes_the_typical_residual_for_all() -> None:
    """Residuals 6, 4, 10 of weights 1, 1, 3: 10. Residuals 5, 7 and none: 6."""
    common = SIZES.among([0, 1, 2], common_units=True)
    assert_close(Balanced(1.0).squared(common), f64([10.0, 10.0, 10.0], [6.0, 6.0, 6.0]))


def test_an_expert_that_is_met_by_nothing_does_not_count_in_the_median() -> None:
    """Active with a residual of zero, or silent with one: neither says what is typical."""
    sizes = ExpertSizes(
        f64(1.0, 1.0, 1.0),
        f64(4.0, 0.0, 90.0),
        f64(2.0, 3.0, 1.0),
        f64(1.0, 9.0, 9.0),
        torch.tensor([True, True, False]),
    )
    assert_close(Balanced(1.0).squared(sizes), f64(4.0, 6.0, 2.0))
    nobody = ExpertSizes(f64(1.0), f64(0.0), f64(2.0), f64(1.0), torch.tensor([True]))
    assert_close(Balanced(1.0).squared(nobody), f64(0.0))


def test_sizes_of_some_experts() -> None:
    assert not SIZES.common_units
    some = SIZES.among([2, 0], common_units=True)
    assert some.common_units
    assert_close(some.norm_squared, f64([0.5, 2.0], [0.0, 3.0]))
    assert_close(some.residual_at_zero, f64([10.0, 6.0], [0.0, 5.0]))
    assert_close(some.mean_curvature, f64([1.0, 2.0], [0.0, 1.0]))
    assert_close(some.importance, f64(3.0, 1.0))
    assert some.active.tolist() == [[True, True], [False, True]]


def test_scales_agree_where_the_experts_are_equal() -> None:
    equal = ExpertSizes(f64(1.0, 1.0), f64(2.0, 2.0), f64(1.0, 1.0), f64(1.0, 1.0), torch.tensor([True, True]))
    assert_close(Balanced().squared(equal), Relative().squared(equal))
    assert (Balanced(), Relative()) == (Balanced(1.0), Relative(1.0))


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], 2.0),
        ([3.0, 1.0], [1.0, 1.0], 2.0),
        ([3.0, 1.0], [1.0, 1.1], 1.0),
        ([3.0, 1.0], [1.1, 1.0], 3.0),
        ([4.0, 1.0, 2.0, 8.0], [0.1, 0.2, 0.1, 0.2], 3.0),
        ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], 2.5),  # 0.1 + 0.2 is not 0.3 in binary: a tie is a tie
        ([5.0, math.inf, 7.0], [1.0, 0.0, 1.0], 6.0),
        ([5.0, 0.0], [2.0, 0.0], 5.0),
        ([1.0, 2.0], [0.0, 0.0], 0.0),
        ([9.0], [0.3], 9.0),
    ],
)
def test_weighted_medians_by_hand(values: list[float], weights: list[float], expected: float) -> None:
    assert float(weighted_median(f64(*values), f64(*weights))) == pytest.approx(expected)
    batch = weighted_median(f64(values, values), f64(weights, weights))
    assert_close(batch, f64(expected, expected))


def test_precisions_by_hand() -> None:
    curvature = f64(2.0, 0.0)
    assert_close(AbsolutePrecision(0.3).value(curvature), f64(0.3, 0.3))
    assert_close(RelativePrecision(0.3).value(curvature), f64(0.6, 0.0))
    assert RelativePrecision() == RelativePrecision(0.1)


@pytest.mark.parametrize("build", SCALES.values())
def test_a_scale_is_positive_and_finite(build: Callable[[float], Scale]) -> None:
    build(1e-30)
    build(0.5)
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a positive finite number"):
            build(value)


@pytest.mark.parametrize("build", PRECISIONS.values())
def test_a_precision_is_not_negative_and_finite(build: Callable[[float], object]) -> None:
    build(0.0)
    build(0.5)
    for value in (-1e-300, math.inf, math.nan):
        with pytest.raises(ValueError, match="zero or above"):
            build(value)
