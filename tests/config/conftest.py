"""A folder with a base and two experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.config.toys import SHAPES


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator) -> Path:
    for name in ("base", "one", "two", "center"):
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path
