"""A fit that was interrupted goes on to the same values; a state of another fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inference.functional import SpanModel, fit, functional
from inference.solution import FitInfo, Solution
from poe_models import FactorExpert, ProductOfExperts
from poe_models.weights.loading import CheckpointError
from tests.seeds import seeded
from tests.test_functional_draws import NAMES, called, vectors_of

NETWORK = nn.Sequential(nn.Linear(5, 4)).double()
MODEL = SpanModel(NETWORK, vectors_of(NETWORK), ProductOfExperts.of(NAMES))


def experts(seed: int) -> list[FactorExpert]:
    x: Tensor = torch.randn(10, 5, generator=seeded(seed), dtype=torch.float64)
    return [functional(name, MODEL, x + i, called) for i, name in enumerate(NAMES)]


def fitted(state: Path | None, stop: int = 100, seed: int = 0, inputs: int = 0) -> Solution[FitInfo]:
    def progress(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    return fit(
        MODEL.posterior(*experts(inputs)),
        MODEL.start(),
        generator=seeded(seed),
        steps=12,
        batch_size=4,
        every=3,
        held_out=experts(9),
        progress=progress,
        state=state,
    )


def test_it_goes_on_to_the_same_values(tmp_path: Path) -> None:
    whole, state = fitted(None), tmp_path / "fit.safetensors"
    for stop in (1, 4, 11):
        with pytest.raises(KeyboardInterrupt):
            fitted(state, stop)
    assert state.exists()
    found = fitted(state)
    assert torch.equal(found.value, whole.value)
    assert torch.equal(found.info.energy_trace, whole.info.energy_trace)
    assert torch.equal(found.info.held_out_trace, whole.info.held_out_trace)
    assert found.status == whole.status
    assert torch.equal(fitted(state).value, whole.value)  # nothing is left to be done
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]


def test_the_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "fit.safetensors"
    fitted(state)
    for seed, inputs in ((1, 0), (0, 1)):
        with pytest.raises(CheckpointError, match="the state of another fit"):
            fitted(state, seed=seed, inputs=inputs)
    state.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no state of a fit"):
        fitted(state)
