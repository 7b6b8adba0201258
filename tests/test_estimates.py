"""Bootstrap estimates against closed forms and their coverage."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from diagnostics.estimates import (
    Estimate,
    bootstrap,
    estimate_of,
    resamples,
    weighted_mean,
)
from tests.levels import Z, binomial_range, deviation_error


def test_resamples_are_multinomial() -> None:
    counts = torch.cat(list(resamples(5, 20000, seed=1)))
    assert counts.shape == (20000, 5)
    assert bool((counts.sum(1) == 5).all())
    covariance = torch.cov(counts.T)
    expected = torch.eye(5, dtype=torch.float64) - 0.2
    assert float((counts.mean(0) - 1).abs().max()) < Z * math.sqrt(0.8 / 20000)
    # A count is binomial with five trials of 1/5: fourth central moment 0.8 (1 + 9 * 0.16), variance 0.8.
    assert float((covariance - expected).abs().max()) < Z * math.sqrt((1.952 - 0.64) / 20000)


def test_resamples_do_not_depend_on_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat(list(resamples(7, 11, seed=3)))
    monkeypatch.setattr("diagnostics.estimates.BATCH", 14)
    pieces = list(resamples(7, 11, seed=3))
    assert len(pieces) == 6
    assert torch.equal(torch.cat(pieces), whole)


def test_strata_keep_their_size() -> None:
    strata = torch.tensor([0, 1, 1, 0, 5, 1])
    counts = torch.cat(list(resamples(6, 100, seed=0, strata=strata)))
    for label, size in ((0, 2), (1, 3), (5, 1)):
        assert bool((counts[:, strata == label].sum(1) == size).all())


def test_error_of_a_mean_is_the_closed_form(generator: torch.Generator) -> None:
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    found = bootstrap(weighted_mean(values), 400, seed=0, num_resamples=4000)
    error = float(values.std(unbiased=False)) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(error, rel=deviation_error(4000))
    # Each end is a 2.5 % quantile of the resamples: error sqrt(p (1 - p) / 4000) over the normal density there.
    end = math.sqrt(0.025 * 0.975 / 4000) / float(scipy.stats.norm.pdf(1.96))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, abs=Z * math.sqrt(2) * end * error)
    assert found.trusted


@pytest.mark.parametrize("interval", ["percentile", "normal"])
def test_coverage_of_a_mean(generator: torch.Generator, interval: str) -> None:
    hits, trials = 0, 1000
    for seed in range(trials):
        x = torch.randn(50, generator=generator, dtype=torch.float64)
        found = bootstrap(lambda w, x=x: w @ x / 50, 50, seed=seed, num_resamples=300, interval=interval)  # type: ignore[misc, arg-type]
        hits += found.low <= 0 <= found.high
    # Fifty values: their standard deviation without n - 1, and Student's tails, take about 1 % from 95 %.
    fewest, most = binomial_range(trials, 0.93, 0.95)
    assert fewest <= hits <= most


def test_weights_and_samples_are_two_routes(generator: torch.Generator) -> None:
    x, y = torch.randn(2, 30, generator=generator, dtype=torch.float64)

    def weighted(w: torch.Tensor) -> torch.Tensor:
        return (w @ (x * y)) / 30 - (w @ x) * (w @ y) / 900

    found = bootstrap(weighted, 30, seed=4, num_resamples=50)
    drawn = [torch.arange(30).repeat_interleave(row.long()) for w in resamples(30, 50, seed=4) for row in w]
    direct = torch.stack([(x[rows] * y[rows]).mean() - x[rows].mean() * y[rows].mean() for rows in drawn])
    assert found.error == pytest.approx(float(direct.std()))
    assert (found.low, found.high) == pytest.approx(
        tuple(direct.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
    )


def test_normal_interval_is_about_the_value_and_cut() -> None:
    replicates = torch.linspace(0.2, 0.6, 41, dtype=torch.float64)
    percentile = estimate_of(0.3, replicates, 0.9)
    normal = estimate_of(0.3, replicates, 0.9, interval="normal", bounds=(0.15, 1.0))
    assert (percentile.low, percentile.high) == pytest.approx((0.22, 0.58))
    assert normal.error == pytest.approx(0.01 * math.sqrt(41 * 42 / 12))
    assert (normal.low, normal.high) == pytest.approx((0.15, 0.3 + 1.644854 * normal.error))


def test_doubts_are_told_and_the_number_kept() -> None:
    few = bootstrap(weighted_mean(torch.tensor([1.0, 3.0])), 2, seed=0)
    assert few.value == 2.0
    assert not few.trusted
    holes = estimate_of(1.0, torch.tensor([1.0, math.nan, 2.0]))
    assert "1 of 3" in holes.warnings[0]
    assert holes.high > holes.low
    lost = estimate_of(1.0, torch.tensor([math.nan, math.nan]))
    assert lost.value == 1.0
    assert math.isnan(lost.low)
    assert "not to be trusted" in str(lost)
    assert not estimate_of(math.nan, torch.zeros(5)).trusted


def test_text_has_the_digits_that_the_error_allows() -> None:
    assert str(Estimate(123.456, 100.0, 150.0, 12.0)) == "123 [100, 150]"
    assert str(Estimate(1e-9, 0.0, 2e-9, 1e-9)) == "1e-09 [0, 2e-09]"
    assert str(Estimate(12345.0, 12000.0, 13000.0, 250.0)) == "12345 [12000, 13000]"


@pytest.mark.parametrize(
    "call",
    [
        lambda: next(resamples(0, 10, seed=0)),
        lambda: next(resamples(3, 1, seed=0)),
        lambda: next(resamples(3, 10, seed=0, strata=torch.zeros(2))),
        lambda: estimate_of(0.0, torch.zeros(3), 95.0),
    ],
)
def test_refused(call: object) -> None:
    with pytest.raises(ValueError, match="give|Give"):
        call()  # type: ignore[operator]
