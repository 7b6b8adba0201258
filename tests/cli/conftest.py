"""A folder with a base, two experts and a configuration, and the command line in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.cli.toys import CONFIG, SHAPES, State


@pytest.fixture
def state(generator: torch.Generator) -> Callable[[], State]:
    return lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base, two experts and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path
