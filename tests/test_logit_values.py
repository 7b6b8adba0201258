"""Logit temperatures whose optimum is known, near the ends of the range and beside a task that says nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inference.logit_temperature import fit_ensemble_temperature, fit_logit_temperature


def three_of_four(temperature: float) -> tuple[Tensor, Tensor]:
    """Four examples of one gap, three of them right: the NLL is least where the gap over ``tau`` is log 3."""
    logits = torch.tensor([[math.log(3) * temperature, 0.0]], dtype=torch.float64).repeat(4, 1)
    return logits, torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize("temperature", [0.0102, 0.0125, 0.0145, 0.5, 3.0, 65.0, 80.0, 98.0])
def test_a_known_temperature_is_found_anywhere_in_the_range(temperature: float) -> None:
    logits, labels = three_of_four(temperature)
    assert fit_logit_temperature(logits, labels) == pytest.approx(temperature, rel=1e-6)
    assert fit_ensemble_temperature(logits.unsqueeze(0), labels) == pytest.approx(temperature, rel=1e-6)
    assert fit_ensemble_temperature(logits.expand(3, -1, -1), labels) == pytest.approx(temperature, rel=1e-6)


def test_a_task_that_says_nothing_leaves_the_temperature_to_the_others() -> None:
    logits, labels = three_of_four(2.5)
    nothing = torch.zeros(3, 5, dtype=torch.float64)
    both, own = {"a": nothing, "b": logits}, {"a": torch.tensor([0, 1, 4]), "b": labels}
    assert fit_logit_temperature(both, own) == pytest.approx(2.5, rel=1e-6)
    members = {task: each.unsqueeze(0) for task, each in both.items()}
    assert fit_ensemble_temperature(members, own) == pytest.approx(2.5, rel=1e-6)
    alone = {"a": nothing}
    assert fit_logit_temperature(alone, {"a": own["a"]}) == 1.0
    assert fit_ensemble_temperature({"a": nothing.unsqueeze(0)}, {"a": own["a"]}) == 1.0
