"""Folders of a small network and its task vectors on a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_models import TaskVectors
from tests.gpu.toys import NAMES, Net, Open, net


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    base = net(0)
    return {"base": base} | {name: net(i, base) for i, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="module")
def folders(nets: dict[str, Net], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for name, model in nets.items():
        (home / name).mkdir()
        save_file(model.state_dict(), home / name / "model.safetensors", metadata={"format": "pt"})
        (home / name / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return home


@pytest.fixture
def opened(folders: Path) -> Open:
    def make(device: torch.device | str, dtype: torch.dtype = torch.float32) -> TaskVectors:
        return TaskVectors(folders / "base", {n: folders / n for n in NAMES}, dtype=dtype, device=device)

    return make
