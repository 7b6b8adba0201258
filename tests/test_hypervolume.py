"""The area that designs dominate: against a grid, by hand, and of series of methods."""

from __future__ import annotations

import math

import pytest
import torch

from diagnostics import compare_methods
from diagnostics.predictions.agreement import hypervolume, pareto_front


def test_the_area_is_that_of_a_grid(generator: torch.Generator) -> None:
    accuracy, ece = torch.rand(2, 7, 5, generator=generator, dtype=torch.float64)
    reference = (0.3, 0.8)
    found = hypervolume(accuracy, ece, reference)
    size = 400
    x = reference[0] + (torch.arange(size) + 0.5) / size * (1 - reference[0])
    y = (torch.arange(size) + 0.5) / size * reference[1]
    dominated = ((accuracy[:, :, None, None] >= x[:, None]) & (ece[:, :, None, None] <= y)).any(1)
    area = dominated.double().mean((1, 2)) * (1 - reference[0]) * reference[1]
    # a front of five steps crosses at most 2 * size cells of the grid
    torch.testing.assert_close(found, area, rtol=0, atol=2 / size)


def test_only_the_front_counts(generator: torch.Generator) -> None:
    accuracy, ece = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    on = pareto_front(accuracy, ece)
    torch.testing.assert_close(hypervolume(accuracy, ece, (0, 1)), hypervolume(accuracy[on], ece[on], (0, 1)))
    assert float(hypervolume(torch.tensor([0.2]), torch.tensor([0.1]), (0.5, 0.3))) == 0
    assert float(hypervolume(torch.tensor([0.9]), torch.tensor([0.4]), (0.5, 0.3))) == 0
    with pytest.raises(ValueError, match="same designs"):
        hypervolume(torch.tensor([math.nan]), torch.tensor([0.1]), (0.0, 1.0))


def test_series_are_compared_on_the_same_resamples(generator: torch.Generator) -> None:
    labels = {"a": torch.randint(3, (200,), generator=generator)}
    right = torch.nn.functional.one_hot(labels["a"], 3).double()
    noise = torch.randn(200, 3, generator=generator).double()
    methods = {name: {"a": (k * right + noise).softmax(1)} for name, k in (("good", 3.0), ("poor", 1.0))}
    found = compare_methods(methods, labels, seed=0, num_resamples=200)
    area, gain = found.hypervolume([["good"], ["poor"]], (0.3, 0.5))
    at = {name: (found.mean(name).value, found.mean(name, "ece").value) for name in methods}
    by_hand = {name: max(x - 0.3, 0) * max(0.5 - y, 0) for name, (x, y) in at.items()}
    assert area.value == pytest.approx(by_hand["good"])
    assert gain.value == pytest.approx(by_hand["good"] - by_hand["poor"])
    assert area.low < area.value < area.high
    (same,) = found.hypervolume([["good"], ["good"]], (0.3, 0.5))[1:]
    assert (same.low, same.high) == (0, 0)
    with pytest.raises(ValueError, match="no method 'best'"):
        found.hypervolume([["best"]], (0, 1))
