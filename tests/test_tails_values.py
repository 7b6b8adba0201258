"""Tails at values worked by hand: families and their parts, samples at their limits, curves, grids of a posterior."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from diagnostics.tails import (
    FAMILIES,
    Family,
    comparison,
    hill,
    log_density,
    maximum_likelihood,
    quantiles,
    tail_posterior,
)
from diagnostics.tails import posteriors as grids
from diagnostics.tails.comparison import with_error
from diagnostics.tails.families import CAUCHY, GAUSSIAN, GENERALIZED_GAUSSIAN, LAPLACE, LOGISTIC, STUDENT_T, Array
from diagnostics.tails.fits import profile
from diagnostics.tails.samples import as_array, sample_of
from tests.seeds import seeded_numpy

BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def data(count: int = 200, seed: int = 1) -> Array:
    return 3.0 * seeded_numpy(seed).standard_t(3.0, count)


# Families


@BY_NAME
@pytest.mark.parametrize("shape", [0.7, 2.0, 5.0])
def test_densities_are_scipys_and_influence_is_the_slope(family: Family, shape: float) -> None:
    x = np.linspace(-7, 7, 30)
    expected = family.distribution(1.7, shape).logpdf(x)
    np.testing.assert_allclose(family.log_density(x, 1.7, shape), expected, rtol=1e-11, atol=1e-12)
    u, parameter, step = np.linspace(0.1, 6, 30), np.float64(shape), 1e-6
    slope = (family.energy(u + step, parameter) - family.energy(u - step, parameter)) / (2 * step)
    np.testing.assert_allclose(family.influence(u, parameter), u * slope, rtol=1e-7)


def test_priors_are_the_densities_of_their_names() -> None:
    shapes = np.array([0.3, 1.0, 4.0, 60.0])
    for family, prior in ((STUDENT_T, scipy.stats.gamma(2, scale=10)), (GENERALIZED_GAUSSIAN, scipy.stats.lognorm(1))):
        assert family.shape is not None
        difference = family.shape.log_prior(shapes) - prior.logpdf(shapes)
        np.testing.assert_allclose(difference, difference[0], atol=1e-12)


def test_a_typical_size_is_the_mean_where_scale_and_shape_trade_off() -> None:
    for power in (0.6, 1.0, 3.0):
        mean = scipy.stats.gennorm(power).expect(lambda x: 2 * x, lb=0)
        assert math.exp(GENERALIZED_GAUSSIAN.log_size(power)) == pytest.approx(mean, rel=1e-6)
    assert float(STUDENT_T.log_size(np.float64(3.0))) == 0.0


def test_what_covers_what() -> None:
    pairs = {(a.name, b.name) for a in FAMILIES for b in FAMILIES if a.covers(b) and a is not b}
    assert pairs == {
        ("Student-t", "Gaussian"),
        ("Student-t", "Cauchy"),
        ("generalised Gaussian", "Gaussian"),
        ("generalised Gaussian", "Laplace"),
    }
    assert all(family.covers(family) for family in FAMILIES)


def test_ranges_of_shapes() -> None:
    assert STUDENT_T.shape is not None
    assert GENERALIZED_GAUSSIAN.shape is not None
    assert STUDENT_T.shape.bounds == (0.1, 1000.0)
    assert GENERALIZED_GAUSSIAN.shape.bounds == (0.1, 20.0)
    assert {f.name for f in FAMILIES if f.shape is None} == {"Gaussian", "Laplace", "logistic", "Cauchy"}


# Fits


@BY_NAME
def test_fits_are_stationary_and_maximal(family: Family) -> None:
    x = data()
    fit = maximum_likelihood(x, family)
    assert fit.log_likelihood == pytest.approx(fit.log_density(x).sum(), rel=1e-10)
    assert not fit.at_bound
    shape = 1.0 if fit.shape is None else fit.shape
    for scale_factor, shape_factor in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        if shape_factor != 1.0 and fit.shape is None:
            continue
        near = family.log_density(x, scale_factor * fit.scale, shape_factor * shape).sum()
        assert near < fit.log_likelihood


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_profiles_find_scales_however_far(unit: float) -> None:
    sizes = unit * np.array([1.0, 2.0, 3.0, 6.0])
    scale, total = profile(sizes, LAPLACE, 1.0)
    assert scale == pytest.approx(3.0 * unit, rel=1e-10)
    assert total == pytest.approx(-4 - 4 * math.log(2 * scale), rel=1e-10)
    scale, _ = profile(sizes, GAUSSIAN, 1.0)
    assert scale == pytest.approx(unit * math.sqrt(12.5), rel=1e-10)


def test_a_shape_at_the_end_of_its_range_is_said() -> None:
    assert maximum_likelihood(np.linspace(-1, 1, 200), STUDENT_T).at_bound
    assert not maximum_likelihood(np.linspace(-1, 1, 200), GAUSSIAN).at_bound
    heaviest = np.concatenate([np.exp(np.linspace(-90, 90, 40)), -np.exp(np.linspace(-80, 80, 40))])
    assert maximum_likelihood(heaviest, STUDENT_T).at_bound


# Samples


def test_samples_at_their_limits() -> None:
    assert sample_of(np.arange(1.0, 6.0)).unit == 3.0
    with pytest.raises(ValueError, match="4 residuals; a fit of tails needs at least 5"):
        sample_of(np.arange(1.0, 5.0))
    assert sample_of(np.arange(1.0, 50.0)).warnings == ("only 49 residuals",)
    assert sample_of(np.arange(1.0, 51.0)).warnings == ()
    zeros = np.concatenate([np.zeros(5), np.arange(1.0, 96.0)])
    assert sample_of(zeros).unit == 45.5
    with pytest.raises(ValueError, match="6 of 101 residuals are exactly zero"):
        sample_of(np.append(zeros, 0.0))
    with pytest.raises(ValueError, match="all 6 residuals have the absolute value 2"):
        sample_of([2.0, -2.0, 2.0, -2.0, 2.0, 2.0 * (1 + 1e-13)])
    sample_of([2.0, -2.0, 2.0, -2.0, 2.0, 2.0 * (1 + 1e-11)])
    with pytest.raises(ValueError, match="have the absolute value 1e"):
        sample_of(1e6 * np.array([1.0, -1.0, 1.0, -1.0, 1.0, 1 + 1e-13]))
    with pytest.raises(ValueError, match="1 of 6 residuals are NaN or infinite"):
        sample_of([1.0, 2.0, 3.0, -math.inf, 4.0, 5.0])
    assert as_array([[1.0, 2.0], [3.0, 4.0]]).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_scaled_and_limited_samples() -> None:
    sample = sample_of(np.arange(-10.0, 11.0) + 0.5)
    np.testing.assert_allclose(sample.scaled * sample.unit, sample.values)
    assert np.median(np.abs(sample.scaled)) == pytest.approx(1.0)
    assert sample.limited(None, 0) is sample
    assert sample.limited(21, 0) is sample
    fewer = sample.limited(20, 0).values
    assert len(fewer) == len(set(fewer)) == 20
    assert bool((np.diff(fewer) > 0).all())  # in their order
    assert set(fewer) <= set(sample.values)


# Curves


def test_hills_estimator_by_hand() -> None:
    x = np.array([1.0, -2.0, 4.0, -8.0, 16.0, 32.0, -64.0])
    curve = hill(x, largest=0.6)
    log2 = math.log(2)
    # Of 64, 32 against 16: (2 + 1) / 2 log 2; of 64, 32, 16 against 8: 2 log 2; of four against 4: 2.5 log 2.
    assert curve.k.tolist() == [2.0, 3.0, 4.0]
    np.testing.assert_allclose(curve.index, [1 / (1.5 * log2), 1 / (2 * log2), 1 / (2.5 * log2)])
    for place, k in enumerate((2, 3, 4)):
        half = 1.959963984540054 / math.sqrt(k)
        assert curve.low[place] == pytest.approx(curve.index[place] * max(1 - half, 0.0))
        assert curve.high[place] == pytest.approx(curve.index[place] * (1 + half))
        assert curve.at(k).error == pytest.approx(curve.index[place] / math.sqrt(k))
    assert hill(x, largest=1.0).k.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert hill(x, largest=0.01).k.tolist() == [2.0]
    many = np.concatenate([x, np.arange(1.0, 40.0), [0.0]])
    assert float(hill(many).k[-1]) == 23.0  # half of the 46 that are not zero
    assert hill(many).warnings == ("only 47 residuals",)
    tied = hill([1.0, 2.0, 3.0, 3.0, 3.0, 3.0], largest=0.5)
    assert math.isnan(tied.index[0])
    for share in (0.0, 1.01):
        with pytest.raises(ValueError, match="a share in"):
            hill(x, largest=share)


def test_quantiles_are_at_the_middles_of_the_ranks() -> None:
    x = np.array([5.0, -3.0, 1.0, -1.0, 0.5])
    fit = maximum_likelihood(x, LAPLACE)
    found = quantiles(x, fit)
    assert found.observed.tolist() == [-3.0, -1.0, 0.5, 1.0, 5.0]
    assert found.name == "Laplace"
    np.testing.assert_allclose(found.theoretical, scipy.stats.laplace(scale=2.1).ppf([0.1, 0.3, 0.5, 0.7, 0.9]))
    t = maximum_likelihood(data(), STUDENT_T)
    expected = scipy.stats.t(t.shape, scale=t.scale).ppf((np.arange(200) + 0.5) / 200)
    np.testing.assert_allclose(quantiles(data(), t).theoretical, expected)


def test_log_densities_by_hand() -> None:
    x = np.array([-2.0, -1.5, -0.5, 0.1, 0.2, 0.3, 1.2, 2.0, 0.4, 2.0])
    curves = log_density(x, [maximum_likelihood(x, LOGISTIC)], bins=4, coverage=1.0)
    np.testing.assert_allclose(curves.centres, [-1.5, -0.5, 0.5, 1.5])
    counts = np.array([2.0, 1.0, 4.0, 3.0])
    np.testing.assert_allclose(curves.observed, np.log(counts / 10))
    np.testing.assert_allclose(curves.error, np.sqrt((1 - counts / 10) / counts))
    np.testing.assert_allclose(curves.fitted["logistic"], maximum_likelihood(x, LOGISTIC).log_density(curves.centres))
    assert curves.outside == pytest.approx(0.0)
    wide = log_density(np.arange(-100.0, 101.0), bins=10, coverage=0.5)
    assert wide.outside == pytest.approx(1 - 101 / 201)
    assert np.isnan(log_density([-5.0, -1.0, 1.0, 2.0, 5.0], bins=3, coverage=1.0).observed).tolist() == [False] * 3
    assert np.isnan(log_density([-5.0, -4.0, 4.0, 4.5, 5.0], bins=3, coverage=1.0).observed).tolist() == [
        False, True, False,
    ]  # fmt: skip
    assert log_density(data()).centres.shape == (61,)
    for bins, coverage in ((0, 0.9), (3, 0.0), (3, 1.01)):
        with pytest.raises(ValueError, match="at least one bin"):
            log_density(x, bins=bins, coverage=coverage)


# The posterior on a grid


@pytest.mark.parametrize(("family", "power"), [(GAUSSIAN, 2.0), (LAPLACE, 1.0)], ids=["Gaussian", "Laplace"])
def test_the_posterior_of_a_scale_is_an_inverse_gamma(family: Family, power: float) -> None:
    """Flat in log s, ``s^p`` is ``InverseGamma(n / p, sum |x|^p / p)``."""
    x = data(40)
    exact = scipy.stats.invgamma(len(x) / power, scale=np.sum(np.abs(x) ** power) / power)
    found = tail_posterior(x, family)
    ends = exact.ppf([0.025, 0.5, 0.975]) ** (1 / power)
    np.testing.assert_allclose([found.scale.low, found.scale.value, found.scale.high], ends, rtol=1e-3)
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.weights @ found.scales**power == pytest.approx(exact.mean(), rel=1e-8)
    assert found.shape is None
    assert set(found.shapes) == {1.0}
    assert len(found.scales) == grids.NODES_ALONE


@pytest.mark.parametrize("family", [STUDENT_T, GENERALIZED_GAUSSIAN], ids=lambda family: family.name)
def test_moments_of_scale_and_shape_are_those_of_a_finer_wider_grid(family: Family) -> None:
    x = data(150)
    assert family.shape is not None
    found, fit = tail_posterior(x, family), maximum_likelihood(x, family)
    log_scales = math.log(fit.scale) + np.linspace(-3, 3, 301)
    log_shapes = np.linspace(*np.log(family.shape.bounds), 301)
    scales, shapes = np.exp(log_scales)[:, None], np.exp(log_shapes)
    total = sum(family.log_density(value, scales, shapes) for value in x)
    total = total + family.shape.log_prior(shapes) + log_shapes
    weights = np.exp(total - total.max())
    weights /= weights.sum()
    shape = found.shape
    assert shape is not None
    assert found.weights @ found.scales == pytest.approx(np.sum(weights * scales), rel=1e-3)
    assert found.weights @ np.log(found.shapes) == pytest.approx(np.sum(weights * log_shapes), abs=2e-3)
    own = np.sum(weights * np.log(scales) * log_shapes) - np.sum(weights * np.log(scales)) * np.sum(
        weights * log_shapes
    )
    mean = found.weights @ np.log(found.scales), found.weights @ np.log(found.shapes)
    theirs = found.weights @ (np.log(found.scales) * np.log(found.shapes)) - mean[0] * mean[1]
    assert theirs == pytest.approx(own, rel=5e-3)
    assert shape.low < shape.value < shape.high


def test_draws_are_as_frequent_as_their_weights() -> None:
    found = tail_posterior(data(60), STUDENT_T)
    scales, shapes = found.draws(500, seed=3)
    for draws, nodes in ((scales, found.scales), (shapes, found.shapes)):
        for node in np.unique(nodes):
            share = found.weights[nodes == node].sum()
            several = np.count_nonzero(nodes == node)  # each node is right to within one draw
            assert abs(np.mean(draws == node) - share) <= several / 500
    again, _ = found.draws(500, seed=3)
    assert np.array_equal(again, scales)
    assert not np.array_equal(np.sort(scales), scales)


def test_boxes_around_what_matters() -> None:
    axes = (np.linspace(0.0, 8.0, 9), np.linspace(10.0, 18.0, 9))
    inside = np.zeros((9, 9), dtype=bool)
    inside[2, 1:4] = True
    low, high = grids._box(axes, inside)
    assert (low.tolist(), high.tolist()) == ([1.0, 10.0], [3.0, 14.0])  # a step wider
    inside[0, 8] = inside[8, 0] = True
    low, high = grids._box(axes, inside)
    assert (low.tolist(), high.tolist()) == ([-2.0, 8.0], [10.0, 20.0])  # a quarter wider where it touches an end
    single = (np.linspace(0.0, 8.0, 9), np.array([0.0]))
    low, high = grids._box(single, inside[:, 8:])
    assert (low.tolist(), high.tolist()) == ([-2.0, 0.0], [1.0, 0.0])


@pytest.mark.parametrize(("place", "axis"), [((0, 2), 0), ((-1, 2), 0), ((2, 0), 1), ((2, -1), 1)])
def test_a_cut_is_where_the_box_ends_and_could_go_on(place: tuple[int, int], axis: int) -> None:
    inside = np.zeros((5, 5), dtype=bool)
    inside[2, 2] = True
    box = (np.array([0.0, 0.0]), np.array([1.0, 1.0]))
    open_, closed = (np.array([-9.0, -9.0]), np.array([9.0, 9.0])), (np.array([-9.0, 0.0]), np.array([9.0, 1.0]))
    assert not grids._cut(inside, box, open_)
    inside[place] = True
    assert grids._cut(inside, box, open_)
    assert grids._cut(inside, box, closed) is (axis == 0)


def test_summaries_by_hand() -> None:
    """Nodes at 1, e, e^2 of weights 1/4, 1/2, 1/4: half of each node's mass lies below it."""
    nodes, weights = np.exp([0.0, 1.0, 2.0]), np.array([0.25, 0.5, 0.25])
    found = grids._summary(np.append(nodes, nodes[1]), np.array([0.25, 0.2, 0.25, 0.3]))
    assert found.value == pytest.approx(math.e)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(math.e**2))
    mean = nodes @ weights
    assert found.error == pytest.approx(math.sqrt((nodes - mean) ** 2 @ weights))


@BY_NAME
@pytest.mark.parametrize("outlier", [1.0, 1e9])
def test_the_grid_holds_the_likeliest_parameters_and_all_within_its_depth(family: Family, outlier: float) -> None:
    x = np.append(data(100), outlier)
    found, fit = tail_posterior(x, family), maximum_likelihood(x, family)
    assert found.scales.min() < fit.scale < found.scales.max()
    if fit.shape is not None and not fit.at_bound:
        assert found.shapes.min() < fit.shape < found.shapes.max()
    grid = found.weights.reshape(-1, 1 if family.shape is None else grids.NODES)
    assert max(grid[0].max(), grid[-1].max()) < 1e-6 * grid.max()
    assert float(np.mean(found.weights > math.exp(-grids.DEPTH) * found.weights.max())) > 0.05


@pytest.mark.parametrize("family", [GAUSSIAN, STUDENT_T], ids=lambda family: family.name)
def test_the_grid_is_no_wider_than_it_needs(family: Family) -> None:
    """Of many residuals the posterior is narrow; half of the nodes of each axis are within its depth all the same."""
    found = tail_posterior(data(2000), family)
    grid = found.weights.reshape(-1, 1 if family.shape is None else grids.NODES)
    inside = grid > math.exp(-grids.DEPTH) * grid.max()
    assert np.mean(inside.any(1)) > 0.5
    assert np.mean(inside.any(0)) > 0.5


def test_large_samples_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data(80)
    whole = tail_posterior(x, CAUCHY)
    monkeypatch.setattr(grids, "BLOCK", 7 * len(x))
    np.testing.assert_allclose(tail_posterior(x, CAUCHY).weights, whole.weights, rtol=1e-12)


# What a comparison says


def result(name: str, *, difference: float, error: float, pointwise: Array, unreliable: int = 0) -> SimpleNamespace:
    loo = SimpleNamespace(pointwise=pointwise, unreliable=unreliable, good_k=0.7)
    tied = difference <= 2 * error
    return SimpleNamespace(name=name, difference=difference, difference_error=error, loo=loo, tied=tied)


def test_notes_say_what_decides_and_what_is_close() -> None:
    sample = sample_of(np.arange(1.0, 101.0))
    even, one = np.zeros(100), np.zeros(100)
    one[0] = 9.0
    best = result("best", difference=0.0, error=0.0, pointwise=even, unreliable=2)
    alone = result("alone", difference=9.0, error=3.0, pointwise=-one)  # within four standard errors, by one residual
    clear = result("clear", difference=9.0, error=2.0, pointwise=-one)  # beyond them: nothing to say
    many = result("many", difference=9.0, error=3.0, pointwise=-np.tile([0.0, 0.18], 50))
    little = result("little", difference=3.9, error=0.9, pointwise=-np.tile([0.0, 0.08], 50))
    enough = result("enough", difference=4.0, error=0.9, pointwise=-np.tile([0.0, 0.08], 50))
    found = comparison._notes(sample, (best, alone, clear, many, little, enough))  # type: ignore[arg-type]
    assert len(found) == 3
    assert found[0].startswith("one residual decides about alone:")
    assert found[1] == "2 residuals have Pareto k above 0.70 (best)"
    one_bad = result("best", difference=0.0, error=0.0, pointwise=even, unreliable=1)
    assert comparison._notes(sample, (one_bad,)) == ("1 residual has Pareto k above 0.70 (best)",)  # type: ignore[arg-type]
    assert found[2].startswith("little is behind by less than 4 nats")
    assert comparison._notes(sample, (result("best", difference=0.0, error=0.0, pointwise=even),)) == ()  # type: ignore[arg-type]


def test_a_residual_dominates_with_more_than_half_of_the_variance() -> None:
    """Of deviations 1, -1 and nothing each has half; of 2, -1, -1 the first has two thirds."""
    assert not comparison._dominated(np.array([1.0, -1.0, 0.0]))
    assert comparison._dominated(np.array([2.0, -1.0, -1.0]))
    assert comparison._dominated(np.array([12.0, 9.0, 9.0]))


def test_warnings_are_about_families_that_may_be_the_best() -> None:
    sample, even = sample_of(np.arange(1.0, 201.0)), np.zeros(200)
    for count, tied, warned in ((3, True, True), (2, True, False), (3, False, False)):
        row = result("t", difference=0.0 if tied else 9.0, error=1.0, pointwise=even, unreliable=count)
        found = comparison._warnings(sample, (row,))  # type: ignore[arg-type]
        assert found == (("Pareto k above 0.70 for 3 residuals under t",) if warned else ())
    few = comparison._warnings(sample_of(np.arange(1.0, 9.0)), ())
    assert few == ("only 8 residuals",)


def test_tables_have_one_line_for_each_family() -> None:
    found = comparison.fit_tails(data(60), ["Student-t", "Laplace"], num_draws=100)
    table = found.to_dataframe()
    assert table.index.tolist() == [result.name for result in found.results]
    shape = found.result("Student-t").shape
    assert shape is not None
    assert table.loc["Student-t", ["shape", "shape_low", "shape_high"]].tolist() == [shape.value, shape.low, shape.high]
    assert np.isnan(table.loc["Laplace", "shape"])
    assert table.loc["Laplace", "elpd"] == found.result("Laplace").loo.elpd
    assert table["difference"].min() == 0.0


def test_numbers_with_their_errors() -> None:
    assert with_error(3.0, math.inf) == "3 ± inf"
    assert with_error(12.345, 0.0234) == "12.345 ± 0.023"
    assert with_error(12.345, 2.34) == "12.3 ± 2.3"
    assert with_error(1234.5, 234.0) == "1234 ± 234"
    assert with_error(3.0, 0.0) == "3 ± 0"
