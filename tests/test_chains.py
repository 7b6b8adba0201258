"""Chains of draws: sample sizes, R-hat and ranks against formulas, and verdicts of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.arviz_adapter import chain_summary
from diagnostics.chains import ChainConvergence, chain_convergence, rank_histogram
from diagnostics.verdicts import Level
from inference.models.model_draws import SpanDraws
from tests.helpers import assert_close
from tests.levels import binomial_range
from tests.seeds import seeded_numpy


def independent(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return seeded_numpy(seed).normal(size=shape)


def chains(values: np.ndarray, **stats: Any) -> ChainConvergence:
    draws = SpanDraws(
        ("m",),
        torch.tensor([[1.0] * (values.shape[-1] + 1)]),
        "digest",
        tuple("abc"[: values.shape[-1]]),
        torch.from_numpy(np.concatenate([values, np.zeros((*values.shape[:-1], 1))], -1)),
        stats={name: torch.as_tensor(value) for name, value in stats.items()},
    )
    return chain_convergence(
        replace(draws, squared_norms=draws.squared_norms * torch.tensor([1.0] * values.shape[-1] + [0]))
    )


def test_independent_draws_are_good() -> None:
    found = chains(independent((4, 500, 1, 2)), diverging=np.zeros((4, 500, 1), bool))
    assert [verdict.level for verdict in found.verdicts] == [Level.GOOD] * 3
    size = found.summary.ess_bulk
    # 2000 independent draws. Over 1500 repetitions the estimated size was 1960 with a standard deviation of 120, and
    # the error 1.01 of the true one with one of 0.036: bounds six of these away.
    assert ((size > 1960 - 6 * 120) & (size < 1960 + 6 * 120)).all()
    assert_close(torch.from_numpy(found.summary.mcse_mean), torch.tensor(2000**-0.5).double(), 0.23)


def test_autoregressive_chains_have_the_sample_size_of_the_formula() -> None:
    rho, noise = 0.8, independent((8, 4000, 1, 1))
    for t in range(1, noise.shape[1]):
        noise[:, t] = rho * noise[:, t - 1] + (1 - rho**2) ** 0.5 * noise[:, t]
    expected = 8 * 4000 * (1 - rho) / (1 + rho)
    # Over 60 repetitions the estimate was 0.99 of it with a standard deviation of 0.05: six of these.
    assert float(chains(noise).summary.ess_bulk[0, 0]) == pytest.approx(expected, rel=0.3)


def test_chains_apart_are_bad() -> None:
    values = independent((4, 500, 1, 2))
    values[0, ..., 1] += 3
    found = chains(values)
    assert [verdict.level for verdict in found.verdicts] == [Level.BAD, Level.BAD]
    assert "b in m" in found.verdicts[0].text
    ranks = rank_histogram(values[..., 0, 1])
    assert ranks.counts[0, -1] > ranks.high > ranks.expected > ranks.low > ranks.counts[0, 0]


def test_slow_chains_are_a_caution() -> None:
    # About 300 of 300 draws, give or take 50; 400 are wanted, and fewer than 100 would be bad.
    assert chains(independent((4, 75, 1, 1))).verdicts[1].level is Level.CAUTION


def test_divergences_speak_up() -> None:
    diverging = np.zeros((4, 500, 1), bool)
    diverging[1, :5] = True
    found = chains(independent((4, 500, 1, 1)), diverging=diverging)
    assert [verdict.level for verdict in found.verdicts[2:]] == [Level.CAUTION]
    assert "5 of 2000" in found.verdicts[2].text
    diverging[:, :100] = True
    assert chains(independent((4, 500, 1, 1)), diverging=diverging).verdicts[-1].level is Level.BAD


def test_one_chain_or_constants_cannot_be_judged() -> None:
    found = chains(independent((1, 2000, 1, 1)))
    assert found.verdicts[0].level is Level.UNKNOWN
    assert "one chain" in found.verdicts[0].text
    assert found.verdicts[1].level is Level.GOOD  # within one chain, it can
    constant = chains(np.ones((4, 500, 1, 1)))
    assert [verdict.level for verdict in constant.verdicts] == [Level.UNKNOWN, Level.UNKNOWN]


def test_a_constant_does_not_hide_the_others() -> None:
    values = independent((4, 500, 1, 2))
    values[..., 0] = 1.0
    found = chains(values)
    assert np.isnan(found.summary.r_hat[0, 0])
    assert [verdict.level for verdict in found.verdicts] == [Level.GOOD, Level.GOOD]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_draws_that_are_not_finite_are_bad_whatever_the_others(value: float) -> None:
    values = independent((4, 500, 1, 2))
    values[1, 7:9, 0, 1] = value
    (verdict,) = chains(values).verdicts  # and nothing good is said of the rest
    assert (verdict.about, verdict.level) == ("draws", Level.BAD)
    assert "2 of 2000 draws are NaN or infinite, the most in b in m" in verdict.text
    values[..., 1] = value
    assert chains(values).verdicts[0].level is Level.BAD


def test_ranks_of_alike_chains_are_flat() -> None:
    ranks = rank_histogram(independent((4, 2000)), bins=10)
    assert ranks.counts.sum(1).tolist() == [2000] * 4
    inside = (ranks.counts >= ranks.low) & (ranks.counts <= ranks.high)
    assert inside.sum() >= binomial_range(40, 0.95, 0.95)[0]
    assert rank_histogram(np.zeros((2, 40)), bins=4).counts.sum() == 80  # all ties


@pytest.mark.parametrize("values", [np.zeros(10), np.full((2, 20), np.nan), np.zeros((2, 3))])
def test_draws_that_cannot_be_ranked(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rank_histogram"):
        rank_histogram(values, bins=10)


def test_statistics_of_draws_that_are_not_finite() -> None:
    values = independent((4, 100, 2))
    values[0, 0, 0] = np.nan
    found = chain_summary(values)
    assert np.isnan(found.r_hat[0])
    assert np.isfinite(found.r_hat[1])
