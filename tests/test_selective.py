"""Selective prediction against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diagnostics.predictions.selective import risk_coverage
from tests.levels import binomial_range
from tests.seeds import seeded


def scored(size: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    score = torch.rand(size, generator=generator, dtype=torch.float64)
    return score, (torch.rand(size, generator=generator) > 0.3 + 0.6 * score).long()


def test_area_is_the_mean_of_running_risks() -> None:
    score, wrong = scored()
    found = risk_coverage(score, wrong, seed=0, num_resamples=20)
    ordered = wrong[score.argsort(descending=True)].double()
    running = ordered.cumsum(0) / torch.arange(1, 201)
    assert found.aurc.value == pytest.approx(float(running.mean()))
    assert torch.allclose(found.risk, running)
    assert torch.allclose(found.coverage, torch.arange(1, 201).double() / 200)
    best = wrong.sort().values.double().cumsum(0) / torch.arange(1, 201)
    assert found.aurc_of_perfect.value == pytest.approx(float(best.mean()))
    assert found.aurc_of_chance.value == pytest.approx(float(wrong.double().mean()))
    assert found.aurc_of_perfect.value < found.aurc.value < found.aurc_of_chance.value
    assert bool((found.low <= found.risk + 1e-9).float().mean() > 0.9)


def test_any_loss_and_its_perfect_order(generator: torch.Generator) -> None:
    loss = torch.rand(50, generator=generator, dtype=torch.float64)
    found = risk_coverage(-loss, loss, seed=0, num_resamples=10)
    assert found.aurc.value == pytest.approx(found.aurc_of_perfect.value)


def test_ties_are_kept_together_in_any_order() -> None:
    score = torch.tensor([0.9, 0.9, 0.9, 0.5])
    losses = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    found = [risk_coverage(score, loss, seed=0, num_resamples=10) for loss in losses]
    assert found[0].coverage.tolist() == [0.75, 1.0]
    assert found[0].risk.tolist() == pytest.approx([1 / 3, 1 / 2])
    assert found[0].aurc.value == found[1].aurc.value == pytest.approx(0.75 / 3 + 0.25 / 2)
    constant = risk_coverage(torch.zeros(4), losses[0], seed=0, num_resamples=10)
    assert constant.aurc.value == pytest.approx(0.5)


def test_few_points_of_a_long_curve() -> None:
    whole, thin = (risk_coverage(*scored(), seed=0, num_resamples=20, points=points) for points in (500, 7))
    places = [whole.thresholds.tolist().index(each) for each in thin.thresholds.tolist()]
    assert len(places) == 7
    assert places[-1] == 199
    assert torch.equal(thin.risk, whole.risk[places])
    assert torch.equal(thin.high, whole.high[places])
    assert thin.aurc == whole.aurc
    assert risk_coverage(*scored(), seed=0, num_resamples=2, points=1).coverage.tolist() == [1.0]


def test_area_covers_its_mean() -> None:
    every = [risk_coverage(*scored(100, seed), seed=seed, num_resamples=100).aurc for seed in range(100, 220)]
    truth = risk_coverage(*scored(40000, 7), seed=0, num_resamples=2).aurc.value
    fewest, _ = binomial_range(120, 0.91, 0.95)  # percentiles of a hundred resamples of a hundred examples
    assert sum(each.low <= truth <= each.high for each in every) >= fewest


@pytest.mark.parametrize(
    ("score", "loss", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "of both"),
        (torch.zeros(0), torch.zeros(0), "of both"),
        (torch.tensor([math.nan]), torch.zeros(1), "NaN"),
        (torch.zeros(1), torch.tensor([math.nan]), "NaN"),
        (torch.zeros(1), torch.tensor([-1.0]), "negative"),
    ],
)
def test_refused(score: Tensor, loss: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_coverage(score, loss, seed=0)


def test_levels_refused() -> None:
    with pytest.raises(ValueError, match=r"`risk_coverage\(confidence=95\)`: give a level between 0 and 1"):
        risk_coverage(torch.rand(30), torch.ones(30), seed=0, confidence=95)
