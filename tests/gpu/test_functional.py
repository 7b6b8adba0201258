"""Experts on predictions on a GPU against the CPU: the fit, its posterior, draws, and the score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diagnostics import functional_score
from inference.functional import KullbackLeibler, Residual, fit, functional_laplace
from inference.minimize import minimize
from poe_models import StudentT
from tests.devices import on
from tests.functional_toys import linear_model, linear_posterior
from tests.helpers import assert_close
from tests.seeds import seeded

pytestmark = pytest.mark.gpu
DIVERGENCES = (KullbackLeibler(), Residual(scale=0.5), Residual(StudentT(4.0), 0.5))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_fit_and_its_posterior_agree(divergence: Any, device: torch.device) -> None:
    """By the same seed of the CPU, so that both see the same mini-batches."""
    found = []
    for place in (torch.device("cpu"), device):
        model = linear_model(device=place)
        posterior = replace(linear_posterior(model, divergence, batch_size=5), temperature=0.3)
        fitted = fit(posterior, model.start(), generator=seeded(0), steps=40, batch_size=6, learning_rate=0.05)
        assert fitted.value.device.type == place.type
        mode = minimize(posterior, model.start()).value
        around = functional_laplace(posterior, mode)
        found.append((fitted.value.cpu(), mode.cpu(), around.standard_deviations().cpu(), around.log_integral().cpu()))
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-5)


def test_a_seed_gives_the_same_draws_on_the_device(device: torch.device) -> None:
    model = linear_model(device=device)
    posterior = linear_posterior(model, KullbackLeibler())
    around = functional_laplace(posterior, minimize(posterior, model.start()).value)
    first, second = (around.sample(5, on(device, 1)).values for _ in range(2))
    assert first.device.type == device.type
    assert torch.equal(first, second)


@pytest.mark.parametrize("logits", [False, True])
def test_the_score_without_labels_agrees(logits: bool, device: torch.device) -> None:
    drawn = torch.randn(2, 400, 4, generator=seeded(11), dtype=torch.float64)
    own, merge = drawn if logits else drawn.softmax(2)
    here, there = (
        functional_score({"one": {"t": merge.to(place)}}, {"t": own.to(place)}, seed=0, logits=logits)
        for place in ("cpu", device)
    )
    assert there.on_task("one", "t") == here.on_task("one", "t")
