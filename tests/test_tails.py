"""Fits of tails: against scipy, closed forms and quadrature of their own; groups; bad input."""

from __future__ import annotations

import math
import warnings

import arviz as az
import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import logsumexp

from benchmarks.tails import TRUTHS, Score, score
from diagnostics.arviz_adapter import TREES, compare_leave_one_out, leave_one_out
from diagnostics.tails import (
    FAMILIES,
    Family,
    fit_tails,
    hill,
    log_density,
    maximum_likelihood,
    pooled_tails,
    quantiles,
    tail_posterior,
)
from diagnostics.tails.families import (
    CAUCHY,
    GAUSSIAN,
    GENERALIZED_GAUSSIAN,
    LAPLACE,
    LOGISTIC,
    STUDENT_T,
    Array,
    families_named,
)
from diagnostics.tails.null import standardised, student_gain, usable_groups
from tests.seeds import seeded_numpy

BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SHAPES = {"Student-t": 2.7, "generalised Gaussian": 0.8}


def data(count: int = 300, seed: int = 1) -> Array:
    return 3.0 * seeded_numpy(seed).standard_t(3.0, count)


# Families


@BY_NAME
def test_densities_are_those_of_scipy(family: Family) -> None:
    x, shape = np.linspace(-8, 8, 33), SHAPES.get(family.name, 1.0)
    expected = family.distribution(1.7, shape).logpdf(x)
    np.testing.assert_allclose(family.log_density(x, 1.7, shape), expected, rtol=1e-11, atol=1e-12)


@BY_NAME
def test_the_influence_is_the_slope_of_the_energy_in_log_size(family: Family) -> None:
    u, shape, step = np.linspace(0.1, 5, 20), np.float64(SHAPES.get(family.name, 1.0)), 1e-6
    slope = (family.energy(u * math.exp(step), shape) - family.energy(u * math.exp(-step), shape)) / (2 * step)
    np.testing.assert_allclose(family.influence(u, shape), slope, rtol=1e-7, atol=1e-9)


def test_nested_families_are_special_cases() -> None:
    x = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(STUDENT_T.log_density(x, 1.3, 1.0), CAUCHY.log_density(x, 1.3), atol=1e-12)
    np.testing.assert_allclose(STUDENT_T.log_density(x, 1.3, 1e7), GAUSSIAN.log_density(x, 1.3), atol=1e-5)
    np.testing.assert_allclose(GENERALIZED_GAUSSIAN.log_density(x, 1.3, 1.0), LAPLACE.log_density(x, 1.3), atol=1e-12)
    twice = GENERALIZED_GAUSSIAN.log_density(x, 1.3 * math.sqrt(2), 2.0)
    np.testing.assert_allclose(twice, GAUSSIAN.log_density(x, 1.3), atol=1e-12)


def test_families_are_found_by_name_or_refused() -> None:
    assert families_named(["logistic", "Laplace"]) == (LOGISTIC, LAPLACE)
    for names in ([], ["Welsch"], ["Cauchy", "Cauchy"]):
        with pytest.raises(ValueError, match="Known: Gaussian"):
            families_named(names)


# Maximum likelihood


def test_scales_in_closed_form() -> None:
    x = data()
    assert maximum_likelihood(x, GAUSSIAN).scale == pytest.approx(math.sqrt(np.mean(x**2)), rel=1e-10)
    assert maximum_likelihood(x, LAPLACE).scale == pytest.approx(np.abs(x).mean(), rel=1e-10)
    power = maximum_likelihood(x, GENERALIZED_GAUSSIAN)
    assert power.shape is not None
    assert power.scale == pytest.approx(float(np.mean(power.shape * np.abs(x) ** power.shape)) ** (1 / power.shape))


@BY_NAME
def test_fits_are_at_least_as_likely_as_those_of_scipy_and_agree(family: Family) -> None:
    x = data()
    fit = maximum_likelihood(x, family)
    generic = {"Student-t": scipy.stats.t, "generalised Gaussian": scipy.stats.gennorm}.get(family.name)
    kind = generic or family.distribution(1.0).dist
    *shape, _, scale = kind.fit(x, floc=0.0)
    theirs = kind.logpdf(x, *shape, loc=0.0, scale=scale).sum()
    assert fit.log_likelihood >= theirs - 1e-9
    assert fit.scale == pytest.approx(scale, rel=2e-3)
    if shape:
        assert fit.shape == pytest.approx(shape[0], rel=2e-3)
    assert fit.log_likelihood == pytest.approx(fit.log_density(x).sum(), rel=1e-10)


@BY_NAME
def test_fits_do_not_depend_on_the_unit(family: Family) -> None:
    x = data()
    one, other = maximum_likelihood(x, family), maximum_likelihood(1e-6 * x, family)
    assert other.scale == pytest.approx(1e-6 * one.scale, rel=1e-6)
    assert other.shape == (None if one.shape is None else pytest.approx(one.shape, rel=1e-5))
    assert other.log_likelihood - one.log_likelihood == pytest.approx(len(x) * math.log(1e6), rel=1e-9)


def test_no_heavy_tail_puts_nu_at_its_bound() -> None:
    flat = np.linspace(-1, 1, 200)
    assert maximum_likelihood(flat, STUDENT_T).at_bound
    assert not maximum_likelihood(data(), STUDENT_T).at_bound


# Posterior


def test_the_posterior_of_a_gaussian_scale_is_inverse_gamma() -> None:
    x = data(40)  # flat in log s: s^2 ~ InverseGamma(n / 2, sum x^2 / 2)
    exact = scipy.stats.invgamma(len(x) / 2, scale=np.sum(x**2) / 2)
    estimate = tail_posterior(x, GAUSSIAN).scale
    ends = np.sqrt(exact.ppf([0.025, 0.5, 0.975]))
    np.testing.assert_allclose([estimate.low, estimate.value, estimate.high], ends, rtol=1e-3)


def wide_fine_ends(x: Array, family: Family, log_scale: Array) -> tuple[Array, Array]:
    """Quantiles 2.5, 50 and 97.5 % of the scale and of the shape, on a grid over all shapes."""
    assert family.shape is not None
    low, high = np.log(family.shape.bounds)
    log_shape = np.linspace(low, high, 241)
    shapes = np.exp(log_shape)
    total = sum(family.log_density(value, np.exp(log_scale)[:, None], shapes) for value in x)
    total = total + family.shape.log_prior(shapes) + log_shape
    weights = np.exp(total - total.max())
    weights /= weights.sum()
    return ends_of(log_scale, weights.sum(1)), ends_of(log_shape, weights.sum(0))


def ends_of(log_nodes: Array, weights: Array) -> Array:
    """Quantiles 2.5, 50 and 97.5 % of a variable whose logarithm has these weights at equidistant nodes."""
    return np.exp(np.interp([0.025, 0.5, 0.975], np.cumsum(weights) - weights / 2, log_nodes))


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e12])
def test_an_outlier_however_large_does_not_hide_the_posterior(outlier: float) -> None:
    x = np.append(data(100), outlier)
    exact = scipy.stats.invgamma(len(x) / 2, scale=np.sum(x**2) / 2)
    estimate = tail_posterior(x, GAUSSIAN).scale
    ends = np.sqrt(exact.ppf([0.025, 0.5, 0.975]))
    np.testing.assert_allclose([estimate.low, estimate.value, estimate.high], ends, rtol=1e-3)
    scale_ends, _ = wide_fine_ends(x, STUDENT_T, np.linspace(math.log(0.03), math.log(300), 901))
    scale = tail_posterior(x, STUDENT_T).scale
    np.testing.assert_allclose([scale.low, scale.value, scale.high], scale_ends, rtol=0.03)
    assert np.isfinite(tail_posterior(x, GENERALIZED_GAUSSIAN).scale.error)


@BY_NAME
def test_residuals_of_two_sizes_far_apart_have_a_posterior(family: Family) -> None:
    x = np.concatenate([1e-6 * data(50), 1e6 * data(50)])
    posterior = tail_posterior(x, family)
    fit = maximum_likelihood(x, family)
    assert posterior.scale.low < fit.scale < posterior.scale.high or fit.at_bound


def test_the_posterior_of_a_laplace_scale_is_inverse_gamma() -> None:
    x = data(40)
    exact = scipy.stats.invgamma(len(x), scale=np.abs(x).sum())
    posterior = tail_posterior(x, LAPLACE)
    scales, _ = posterior.draws(4000, seed=0)
    assert scales.mean() == pytest.approx(exact.mean(), rel=2e-3)
    assert posterior.scale.error == pytest.approx(exact.std(), rel=1e-3)


@pytest.mark.parametrize("family", [STUDENT_T, GENERALIZED_GAUSSIAN], ids=lambda family: family.name)
@pytest.mark.parametrize("count", [50, 1000])
def test_the_grid_covers_what_a_wide_fine_one_does(family: Family, count: int) -> None:
    x = data(count)
    assert family.shape is not None
    posterior = tail_posterior(x, family)
    fit = maximum_likelihood(x, family)
    width = 12.0 if count < 100 else 0.8
    log_scale = math.log(fit.scale) + np.linspace(-width, width, 961 if count < 100 else 201)
    low, high = np.log(family.shape.bounds)
    near = math.log(fit.shape or 1.0)
    log_shape = np.linspace(low, high, 241) if count < 100 else np.linspace(near - 0.6, near + 0.6, 101)
    shapes = np.exp(log_shape)
    total = sum(family.log_density(value, np.exp(log_scale)[:, None], shapes) for value in x)
    total = total + family.shape.log_prior(shapes) + log_shape
    weights = np.exp(total - total.max())
    weights /= weights.sum()
    for estimate, nodes, marginal in (
        (posterior.shape, log_shape, weights.sum(0)),
        (posterior.scale, log_scale, weights.sum(1)),
    ):
        assert estimate is not None
        mean = np.exp(nodes) @ marginal
        assert estimate.error == pytest.approx(math.sqrt((np.exp(nodes) - mean) ** 2 @ marginal), rel=0.02)
        np.testing.assert_allclose(
            [estimate.low, estimate.value, estimate.high],
            ends_of(nodes, marginal),
            rtol=0.03 if count < 100 else 0.005,
        )


# Comparison


def test_leave_one_out_is_the_quadrature_of_every_left_out_density() -> None:
    x = data(200)
    comparison = fit_tails(x, num_draws=2000)
    for result in comparison.results:
        posterior = result.posterior
        keep = posterior.weights > 0
        log_lik = result.family.log_density(x, posterior.scales[keep, None], posterior.shapes[keep, None])
        exact = -logsumexp(np.log(posterior.weights[keep])[:, None] - log_lik, axis=0)
        reliable = result.loo.pareto_k < 0.5
        np.testing.assert_allclose(result.loo.pointwise[reliable], exact[reliable], atol=0.02)
        assert reliable.mean() > 0.9


def test_differences_are_those_of_arviz_and_antisymmetric() -> None:
    comparison = fit_tails(data(200), limit=None)
    unrounded = {"round_to": "none"} if TREES else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # ArviZ 0.x on a newer pandas
        table = az.compare({result.name: result.loo.source for result in comparison.results}, **unrounded)
    assert list(table.index) == [result.name for result in comparison.results]
    divisor = 199 if TREES else 200  # 1.x takes n - 1 for the error of the elpd, n for that of differences
    for result in comparison.results:  # 1.x has a minus before differences
        row = table.loc[result.name]
        error = result.error * math.sqrt(200 / divisor)
        ours = (result.difference, result.difference_error, error, result.weight)
        assert ours == pytest.approx((abs(row["elpd_diff"]), row["dse"], row["se"], row["weight"]), abs=1e-9)
    assert [r.difference for r in comparison.results] == sorted(r.difference for r in comparison.results)
    for result in comparison.results[1:]:
        value, error = comparison.difference(comparison.best.name, result.name)
        assert value == pytest.approx(result.difference, abs=1e-9)
        assert error == pytest.approx(result.difference_error, abs=1e-9)
        assert comparison.difference(result.name, comparison.best.name)[0] == pytest.approx(-value)
    assert sum(r.weight for r in comparison.results) == pytest.approx(1.0, abs=1e-6)


def test_the_verdict_states_nu_and_the_gap() -> None:
    comparison = fit_tails(data(1000), ["Gaussian", "Student-t", "Cauchy"], limit=None)
    shape = comparison.result("Student-t").shape
    assert shape is not None
    assert abs(math.log(shape.value / 3.0)) < 5 * shape.error / shape.value  # the data's own error, level 6e-7
    assert comparison.verdict.startswith(f"nu = {shape} (Student-t); Student-t over ")
    assert " ± " in comparison.verdict
    assert comparison.verdict.endswith(" elpd")
    assert len(comparison.to_dataframe()) == 3
    assert comparison.trusted


def test_one_family_alone_is_its_own_tie_set() -> None:
    assert fit_tails(data(60), ["Cauchy"]).tie_set == ("Cauchy",)
    one = leave_one_out(seeded_numpy(0).normal(size=(200, 3)))
    assert compare_leave_one_out({"a": one})["a"]["error"] == pytest.approx(math.sqrt(3 * one.pointwise.var()))


def test_a_limit_takes_so_many_and_says_how_many_there_were() -> None:
    comparison = fit_tails(data(300), ["Laplace"], limit=100, seed=3)
    assert (len(comparison.values), comparison.available) == (100, 300)
    again = fit_tails(data(300), ["Laplace"], limit=100, seed=4)
    assert set(comparison.values) != set(again.values)


def test_a_lone_outlier_is_said() -> None:
    outlier = np.append(seeded_numpy(0).normal(size=200), 60.0)
    assert any("one residual decides about" in note for note in fit_tails(outlier, ["Gaussian", "Cauchy"]).notes)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.name)
def test_the_true_family_is_in_the_tie_set(truth: object) -> None:
    result: Score = score(truth, seeds=2)  # type: ignore[arg-type]  # the benchmark does a hundred
    assert (result.covered, result.wrong) == (2, 0)


# Groups


def test_standardised_residuals_do_not_see_location_and_scale_of_their_group() -> None:
    groups = [seeded_numpy(i).normal(size=21) for i in range(4)]
    moved = [10.0**i * (group - 3) for i, group in enumerate(groups)]
    np.testing.assert_allclose(standardised(moved), standardised(groups), atol=1e-9)


def test_the_gain_of_student_t_is_that_of_fits_on_a_grid_of_degrees() -> None:
    x = data(400)
    best = maximum_likelihood(x, STUDENT_T).log_likelihood - maximum_likelihood(x, GAUSSIAN).log_likelihood
    assert best - 3.0 < student_gain(x) <= best + 1e-6  # degrees are tried at powers of two
    assert student_gain(-7 * x) == pytest.approx(student_gain(x), rel=1e-9)


def test_groups_without_a_scale_are_left_out_and_said() -> None:
    groups = {"a": data(50), "one": np.ones(1), "zero": np.zeros(10)}
    usable, warnings = usable_groups(groups)
    assert list(usable) == ["a"]
    assert warnings == ("2 of 3 groups left out: too few residuals that differ",)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="1 of 4 residuals of group 'bad' are NaN or infinite"):
            usable_groups({**groups, "bad": np.array([1.0, value, 2.0, 3.0])})
    with pytest.raises(ValueError, match="1 of 3 residuals of group '1' are NaN"):
        pooled_tails([data(50), np.array([1.0, 2.0, np.nan])])
    with pytest.raises(ValueError, match="none of 1 groups"):
        usable_groups([np.ones(2)])


# Curves


def test_hill_finds_the_index_of_a_power_law() -> None:
    pareto = seeded_numpy(0).random(20000) ** (-1 / 2.5)
    curve = hill(pareto)
    tail = curve.at(5000)
    assert tail.low < 2.5 < tail.high
    assert tail.error == pytest.approx(tail.value / math.sqrt(5000))
    sizes = np.sort(pareto)[::-1]
    assert curve.at(10).value == pytest.approx(1 / np.mean(np.log(sizes[:10] / sizes[10])))
    gaussian = hill(seeded_numpy(0).normal(size=20000))
    assert gaussian.at(50).low > 2 * gaussian.at(5000).high  # no plateau


def test_quantiles_of_the_truth_lie_on_the_diagonal() -> None:
    x = seeded_numpy(0).logistic(scale=2.0, size=5000)
    data_ = quantiles(x, maximum_likelihood(x, LOGISTIC))
    middle = slice(250, -250)
    np.testing.assert_allclose(data_.observed[middle], data_.theoretical[middle], atol=0.4)
    assert np.all(np.diff(data_.observed) >= 0)


def test_log_densities_are_those_of_a_histogram() -> None:
    x = data(4000)
    curves = log_density(x, [maximum_likelihood(x, STUDENT_T)], bins=21)
    width = curves.centres[1] - curves.centres[0]
    assert np.nansum(np.exp(curves.observed)) * width == pytest.approx(1 - curves.outside)
    assert curves.outside == pytest.approx(0.01, abs=0.001)
    off = (curves.observed - curves.fitted["Student-t"]) / curves.error
    assert np.nanmax(np.abs(off)) < 5
    assert np.isnan(log_density(np.array([-5.0, -1, 1, 2, 5]), bins=50, coverage=1.0).observed).any()


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0, -1.0], "3 residuals; a fit of tails needs at least 5"),
        ([1.0, 2.0, math.nan, 3.0, 4.0, 5.0], "1 of 6 residuals are NaN"),
        ([1.0, 2.0, math.inf, 3.0, 4.0, 5.0], "1 of 6 residuals are NaN or infinite"),
        ([0.0] * 10, "10 of 10 residuals are exactly zero"),
        ([2.0, -2.0] * 10, "all 20 residuals have the absolute value 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused(values: list[float], message: str) -> None:
    for function in (fit_tails, hill, lambda x: maximum_likelihood(x, CAUCHY), lambda x: tail_posterior(x, STUDENT_T)):
        with pytest.raises(ValueError, match=message):
            function(values)


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`fit_tails\(num_draws=99\)`: .* Give 100 draws or more"):
        fit_tails(data(50), num_draws=99)


def test_few_residuals_give_a_number_that_is_not_trusted() -> None:
    comparison = fit_tails(data(12), ["Gaussian", "Student-t"])
    assert not comparison.trusted
    assert "not to be trusted: only 12 residuals" in comparison.verdict
    assert hill(data(12)).at(5).warnings == ("only 12 residuals",)


def test_tensors_of_any_shape_and_precision_are_taken() -> None:
    x = torch.from_numpy(data(60)).bfloat16().reshape(3, 20).mT
    assert fit_tails(x, ["Cauchy"]).values.dtype == np.float64
    with pytest.raises(ValueError, match="share in"):
        hill(x, largest=0.0)
    with pytest.raises(ValueError, match="at least one bin"):
        log_density(x, bins=0)
    with pytest.raises(ValueError, match="not fitted"):
        fit_tails(x, ["Cauchy"]).result("Gaussian")
