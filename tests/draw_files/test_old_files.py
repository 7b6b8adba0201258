"""Draws that were written by earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.models.draw_files import load_draws, save_draws
from inference.models.full_draws import sample_full
from poe_models import TaskVectors
from poe_models.weights.checkpoint import CheckpointError
from tests.draw_files.toys import edit_json, poe_of
from tests.seeds import seeded


def test_full_draws_that_call_their_sampler_a_method_are_read(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = sample_full(vectors, poe_of(vectors), 2, generator=seeded(5), sampler="laplace")
    save_draws(draws, tmp_path / "draws")
    edit_json(tmp_path / "draws" / "draws.json", lambda record: record.update(method=record.pop("sampler")))
    loaded = load_draws(tmp_path / "draws", draws.source)
    assert loaded.sampler == "laplace"
    assert loaded.digest() == draws.digest()
    assert torch.equal(loaded.numbers["weights"], draws.numbers["weights"])


def test_full_draws_without_a_sampler_are_refused(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = sample_full(vectors, poe_of(vectors), 2, generator=seeded(5), sampler="laplace")
    save_draws(draws, tmp_path / "draws")
    edit_json(tmp_path / "draws" / "draws.json", lambda record: record.pop("sampler"))
    with pytest.raises(CheckpointError, match="incomplete draws: `sampler`: Field required"):
        load_draws(tmp_path / "draws")
