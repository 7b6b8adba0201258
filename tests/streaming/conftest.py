"""Small checkpoints, a product of experts and an output folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.models.merge import merge_checkpoint
from poe_models import TaskVectors
from tests.streaming.toys import contents, poe, save_folder, states


@pytest.fixture
def models(tmp_path: Path, generator: torch.Generator) -> Callable[..., TaskVectors]:
    def make(stored: torch.dtype = torch.float32, shards: int = 1, **options: Any) -> TaskVectors:
        made = states(generator, stored)
        folders = {
            name: save_folder(tmp_path / "in" / name, state, shards if name == "base" else 1)
            for name, state in made.items()
        }
        (folders["base"] / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "float32"}))
        return TaskVectors(folders.pop("base"), folders, **options)

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def uninterrupted(models: Any, tmp_path: Path) -> tuple[TaskVectors, dict[str, bytes]]:
    vectors = models(torch.bfloat16, shards=3)
    merge_checkpoint(vectors, poe(vectors), tmp_path / "whole", batch_bytes=2000)
    return vectors, contents(tmp_path / "whole")
