"""Distances of draws from a merge by hand: vectors in the plane, few draws, and thresholds where they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.merge_distance import MergeDistance, displacement_of, span_distance, spread_along, squared_error
from poe_models.span import SpanStatistics
from tests.helpers import assert_close
from tests.seeds import seeded


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def distance_of(displacement: Tensor, spread: Tensor, length: Tensor) -> MergeDistance:
    names = tuple("abcdef"[: len(displacement)])
    return MergeDistance(names, displacement, spread, length)


def bases_of(modules: int, size: int, dimension: int) -> Tensor:
    """Members of the basis as vectors, `(M, K, D)`, the last being the merge."""
    return torch.randn(modules, size, dimension, generator=seeded(3), dtype=torch.float64)


def statistics_of(bases: Tensor, through: bool = True) -> SpanStatistics:
    modules, size = bases.shape[:2]
    names = tuple(f"m{i}" for i in range(modules))
    gram = bases @ bases.mT
    return SpanStatistics(
        modules=names,
        updates=tuple(f"u{i}" for i in range(size - 1 - through)),
        residual_maps=(),
        center="zero",
        gram=gram,
        forms=torch.zeros(modules, 0, size, size, dtype=torch.float64),
        mean_curvature=torch.zeros(modules, 0, dtype=torch.float64),
        dimension=torch.zeros(modules, 0, dtype=torch.float64),
        through=("merge",) * modules if through else None,
    )


def draws_of(chains: int, count: int, modules: int, size: int) -> Tensor:
    offset = torch.linspace(-1.0, 2.0, modules * size, dtype=torch.float64).view(modules, size)
    noise = torch.randn(chains, count, modules, size, generator=seeded(4), dtype=torch.float64)
    return offset + 0.5 * noise


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(("chains", "count"), [(1, 12), (2, 6), (3, 5)])
def test_it_is_that_of_the_vectors_themselves(chains: int, count: int, default: bool) -> None:
    """Three modules on four members in seven dimensions; the merge is the last member or any other point."""
    bases, coefficients = bases_of(3, 4, 7), draws_of(chains, count, 3, 4)
    merge = f64(0, 0, 0, 1).expand(3, -1) if default else torch.arange(12, dtype=torch.float64).view(3, 4) / 10
    found = span_distance(statistics_of(bases, through=default), coefficients, None if default else merge)
    assert found is not None
    assert found.modules == ("m0", "m1", "m2")
    for m in range(3):
        vectors = coefficients[:, :, m] @ bases[m]  # (C, S, D)
        target = merge[m] @ bases[m]
        every = vectors.reshape(-1, 7)
        away = every.mean(0) - target
        independent = vectors.mean(1) if chains > 1 else every  # draws of one chain depend on each other
        error = (independent - independent.mean(0)).square().sum() / (len(independent) * (len(independent) - 1))
        left = away.square().sum() - error - (1e-3 * target.norm()) ** 2
        assert_close(found.length[m], target.norm(), 1e-12)
        assert_close(found.displacement[m], left.sqrt(), 1e-10)
        assert_close(found.spread[m], (every @ (away / away.norm())).std(), 1e-10)
        assert_close(found.distance[m], left.sqrt() / (every @ (away / away.norm())).std(), 1e-10)


def test_a_merge_that_is_given_goes_before_the_one_of_the_span() -> None:
    bases, coefficients = bases_of(2, 3, 4), draws_of(1, 10, 2, 3)
    first = f64(1, 0, 0).expand(2, -1)
    given = span_distance(statistics_of(bases), coefficients, first)
    assert given is not None
    assert_close(given.length, bases[:, 0].norm(dim=-1), 1e-12)
    assert span_distance(statistics_of(bases, through=False), coefficients) is None


@pytest.mark.parametrize(("count", "known"), [(1, False), (2, False), (9, False), (10, True), (11, True)])
def test_the_spread_is_known_from_ten_draws_on(count: int, known: bool) -> None:
    """Of all chains together: 0, 1, ..., n - 1 have the variance n (n + 1) / 12."""
    line = torch.arange(count, dtype=torch.float64)
    coefficients = torch.stack([line, 2 * line], -1).view(1, count, 1, 2)
    if not count % 2:
        coefficients = coefficients.view(2, count // 2, 1, 2)
    found = spread_along(coefficients, f64(1, 1).view(1, 2))
    if known:
        assert_close(found, f64(3 * math.sqrt(count * (count + 1) / 12)), 1e-12)
    else:
        assert found.isnan().all()


def test_the_error_of_the_mean_is_the_variance_over_the_number() -> None:
    """Of coefficients 0 and 2 the mean has the squared error 2 / 2 = 1, times the length of the basis."""
    gram = f64(9).view(1, 1, 1)
    assert_close(squared_error(f64(0, 2).view(1, 2, 1, 1), gram), f64(9), 1e-12)
    assert_close(squared_error(f64(-1, 1, 1, 3).view(2, 2, 1, 1), gram), f64(9), 1e-12)  # chains' means are 0 and 2
    assert_close(squared_error(f64(0, 3, 6).view(1, 3, 1, 1), gram), f64(27), 1e-12)  # variance 9 over 3
    alone = squared_error(f64(5).view(1, 1, 1, 1), gram)  # of one draw it is not known, and nothing is taken off
    assert torch.equal(alone, f64(0))


def test_what_is_no_displacement_is_taken_off() -> None:
    squared, error, length = f64(25, 1, 4e-6, 4e-6), f64(9, 2, 0, 0), f64(0, 0, 1, 4)
    expected = f64(4, 0, math.sqrt(3e-6), 0)  # 1e-3 of the length, squared, is 1e-6 and 16e-6
    assert_close(displacement_of(squared, error, length), expected, 1e-12)


def test_draws_around_the_merge_have_no_displacement_and_no_direction() -> None:
    coefficients = torch.cat([torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6).view(1, 12, 1, 1)
    found = span_distance(statistics_of(torch.ones(1, 1, 1, dtype=torch.float64)), 1 + coefficients)
    assert found is not None
    assert float(found.displacement) == 0
    assert found.spread.isnan().all()
    assert (found.worst, found.unknown, found.typical) == (0.0, (), 0.0)
    assert str(found).endswith("the farthest module (0 on average)")


def test_numbers_of_all_modules() -> None:
    found = distance_of(f64(1, 6, 2, 0), f64(2, 2, math.nan, math.nan), f64(3, 4, 0, 0))
    assert found.distance[[0, 1, 3]].tolist() == [0.5, 3.0, 0.0]
    assert math.isnan(found.typical)
    assert (found.worst, found.where, found.unknown) == (3.0, "b", ("c",))
    assert found.share == pytest.approx(math.sqrt(41) / 5)
    known = found.select([0, 1, 3])
    assert known.modules == ("a", "b", "d")
    assert known.typical == pytest.approx(3.5 / 3)
    assert known.share == pytest.approx(math.sqrt(37) / 5)
    both = MergeDistance.joined([found.select([2]), known])
    assert both.modules == ("c", "a", "b", "d")
    assert both.displacement.tolist() == [2, 1, 6, 0]


@pytest.mark.parametrize(("deviations", "beyond"), [(3.0, ()), (3.1, ("b",)), (4.4, ("b",))])
def test_beyond_begins_above_three_standard_deviations(deviations: float, beyond: tuple[str, ...]) -> None:
    found = distance_of(f64(0.5, 2 * deviations), f64(1, 2), f64(1, 1))
    assert found.beyond == beyond
    assert distance_of(f64(1), f64(math.nan), f64(1)).beyond == ()


def test_a_module_that_is_not_known_is_never_the_farthest() -> None:
    found = distance_of(f64(5, 0.5, 0.1), f64(math.nan, 1, 1), f64(1, 1, 1))
    assert (found.worst, found.where) == (0.5, "b")
    nothing = distance_of(f64(0, 0), f64(0, math.nan), f64(1, 1))
    assert nothing.distance.tolist() == [0, 0]
    unknown = distance_of(f64(5, 1), f64(math.nan, math.nan), f64(1, 1))
    assert math.isnan(unknown.worst)
    assert unknown.unknown == ("a", "b")


def test_draws_that_are_around_the_merge_by_construction() -> None:
    found = MergeDistance.zero(["a", "b"], f64(3, 4))
    assert (found.modules, found.worst, found.typical, found.share) == (("a", "b"), 0.0, 0.0, 0.0)
    assert found.spread.isnan().all()
    assert found.length.tolist() == [3, 4]
    assert MergeDistance.zero(["a"], f64(0)).share == 0.0  # a merge that is the base


@pytest.mark.parametrize(
    ("unknown", "said"),
    [
        (0, "(1 on average; there one standard deviation is 50 % of the merge's length)"),
        (1, "length; too few to tell in b)"),
        (3, "length; too few to tell in b, c, d)"),
        (4, "length; too few to tell in b, c, d and 1 more)"),
        (5, "length; too few to tell in b, c, d and 2 more)"),
    ],
)
def test_up_to_three_unknown_modules_are_named(unknown: int, said: str) -> None:
    ones = torch.ones(1 + unknown, dtype=torch.float64)
    spread = torch.cat([f64(1), torch.full((unknown,), math.nan, dtype=torch.float64)])
    assert str(distance_of(ones, spread, 2 * ones)).endswith(said)


def test_the_spread_is_that_of_the_farthest_module() -> None:
    """Its percentage is written without powers of ten: two digits below 100 %, whole ones from there."""
    found = distance_of(f64(2, 8), f64(10, 4), f64(1, 4))
    assert "2 standard deviations of the draws from the merge in b, the farthest module (1.1 on average" in str(found)
    assert "is 100 % of" in str(found)
    for length, percent in ((3.0, "133 %"), (0.03, "13333 %"), (4.1, "98 %"), (32.0, "12 %"), (4000.0, "0.1 %")):
        assert f"is {percent} of the merge's length" in str(replace(found, length=f64(1, length)))
    assert "there one" not in str(replace(found, length=f64(1, 0)))
