"""Importance sampling's limits and its generalised Pareto fit, against the published formulas in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inference.evidence.importance import ImportanceMean, pareto_k, trusted
from tests.seeds import seeded_numpy


def zhang_stephens(excess: np.ndarray) -> float:
    """Zhang and Stephens (2009), with the prior of Vehtari et al. (2024): ten observations of one half."""
    n = len(excess)
    points = 30 + math.floor(math.sqrt(n))
    star = excess[math.floor(n / 4 + 0.5) - 1]  # the first quartile
    thetas = [1 / excess[-1] + (1 - math.sqrt(points / (j - 0.5))) / (3 * star) for j in range(1, points + 1)]

    def shape(theta: float) -> float:
        return float(np.mean(np.log1p(-theta * excess)))

    likelihood = np.array([n * (math.log(-theta / shape(theta)) - shape(theta) - 1) for theta in thetas])
    weights = np.exp(likelihood - likelihood.max())
    found = shape(float(weights @ np.array(thetas) / weights.sum()))
    return (n * found + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("count", [26, 27, 40, 45, 150, 400])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_fit_is_the_published_one(count: int, spread: float) -> None:
    weights = np.exp(spread * seeded_numpy(count).standard_normal((count, 2)))
    found = pareto_k(torch.from_numpy(np.log(weights)))
    tail = min(math.ceil(count / 5), math.ceil(3 * math.sqrt(count)))
    for column in range(2):
        ordered = np.sort(weights[:, column] / weights[:, column].max())
        wanted = zhang_stephens(ordered[-tail:] - ordered[-tail - 1])
        assert float(found[column]) == pytest.approx(wanted, abs=1e-9)


def test_five_excesses_are_the_fewest_that_are_fitted() -> None:
    weights = torch.linspace(0.1, 2.0, 25, dtype=torch.float64).unsqueeze(-1)
    assert math.isfinite(float(pareto_k(weights.log())))  # 25 / 5 of them
    assert float(pareto_k(weights[:20].log())) == math.inf  # 20 / 5
    equal = torch.zeros(25, 1, dtype=torch.float64)
    assert float(pareto_k(equal)) == -math.inf


def mean_of(k: float, effective: float, count: int) -> ImportanceMean:
    like = torch.zeros(1, dtype=torch.float64)
    return ImportanceMean(like, like, like + effective, like + k, count)


def test_limits_are_those_of_the_literature() -> None:
    """Trust ends at k = 0.7 and 50 effective samples; a proposal has finite variance, k < 1/2, and a tenth of them."""
    for k, effective, told in ((0.7, 50.0, True), (0.7001, 50.0, False), (0.7, 49.99, False), (-math.inf, 1e9, True)):
        assert bool(mean_of(k, effective, 10_000).trusted) is told
        one = torch.tensor([k], dtype=torch.float64)
        assert bool(trusted(one, torch.full_like(one, effective))) is told
    for k, effective, told in ((0.4999, 100.1, True), (0.5, 100.1, False), (0.4999, 100.0, False)):
        assert mean_of(k, effective, 1000).good is told
