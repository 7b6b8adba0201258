"""Predictions of experts on disk: the same as in memory, and refused for anything else than what they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inference.functional import SpanModel, fit, functional, load_predictions, predictions, save_predictions
from poe_models import ProductOfExperts, TaskVectors
from poe_models.weights.loading import CheckpointError
from tests.seeds import seeded
from tests.test_functional_draws import NAMES, called, network_of, vectors_of


def model_of(move: float = 0.0) -> SpanModel:
    """The model of the tests of draws, one value of expert b moved."""
    network = network_of()
    vectors = vectors_of(network)
    experts = {n: {k: vectors.experts[n].read(k).clone() for k in vectors.base.tensors} for n in NAMES}
    experts["b"]["3.bias"][0] += move
    base = {k: vectors.base.read(k).clone() for k in vectors.base.tensors}
    return SpanModel(network, TaskVectors(base, experts, dtype=torch.float64), ProductOfExperts.of(NAMES))


def inputs_of(count: int) -> Tensor:
    return torch.randn(count, 5, generator=seeded(3), dtype=torch.float64)


def test_they_are_the_experts_own(tmp_path: Path) -> None:
    model, x = model_of(), inputs_of(10)
    told: list[tuple[int, int]] = []
    folder = save_predictions(
        tmp_path / "b", "b", model, x, called, batch_size=4, progress=lambda *done: told.append(done)
    )
    assert told == [(4, 10), (8, 10), (10, 10)]
    found, own = load_predictions(folder, "b", model, x, called), predictions("b", model, x, called)
    torch.testing.assert_close(found.outputs.double(), own.outputs, rtol=1e-6, atol=1e-6)
    assert set(load_file(folder / "predictions.safetensors")) == {"outputs"}
    posterior = model.posterior(functional("b", model, x, called, targets=found))
    assert fit(posterior, model.start(), generator=seeded(0), steps=2, batch_size=3).info.steps == 2
    assert model.fingerprint("a") != model.fingerprint("b")


def test_the_mask_of_tokens_is_kept(tmp_path: Path) -> None:
    model, x = model_of(), torch.randn(6, 3, 5, generator=seeded(2), dtype=torch.float64)
    counted = torch.rand(6, 3, generator=seeded(1)) > 0.3
    folder = save_predictions(tmp_path / "a", "a", model, x, called, counted, batch_size=4)
    found = load_predictions(folder, "a", model, x, called)
    assert found.counted is not None
    assert torch.equal(found.counted, counted)
    assert found.outputs.shape == (6, 3, 4)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    model, x = model_of(), inputs_of(6)
    folder = save_predictions(tmp_path / "b", "b", model, x, called)
    with pytest.raises(CheckpointError, match=r"of other weights of the expert\. .*expert 'b', 6 examples"):
        load_predictions(folder, "b", model_of(1e-3), x, called)
    with pytest.raises(CheckpointError, match=r"of other inputs\."):
        load_predictions(folder, "b", model, x + 1e-6, called)
    with pytest.raises(CheckpointError, match="of another expert and other weights"):
        load_predictions(folder, "a", model, x, called)
    head = nn.Linear(4, 2).double()
    for forward in (lambda net, b: 2 * net(b), lambda net, b: head(net(b))):
        with pytest.raises(CheckpointError, match="of another forward function or head"):
            load_predictions(folder, "b", model, x, forward)
    with pytest.raises(CheckpointError, match=r"predictions\.json is missing"):
        load_predictions(tmp_path, "b", model, x, called)
    file = folder / "predictions.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        load_predictions(folder, "b", model, x, called)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    model, x = model_of(), inputs_of(6)
    calls: Iterator[int] = iter(range(9))

    def failing(net: Any, batch: Tensor) -> Tensor:
        return called(net, batch) * (torch.nan if next(calls) == 1 else 1.0)

    with pytest.raises(ValueError, match="NaN in the batch of rows 4 to 5"):
        save_predictions(tmp_path / "b", "b", model, x, failing, batch_size=4)
    assert list(tmp_path.iterdir()) == []
