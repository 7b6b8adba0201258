"""A base that is left out is read from the configs of the adapters, if these agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poe_merge.cli import run


def adapter(where: Path, base: str, generator: torch.Generator) -> None:
    where.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (where / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (2, 4), "B": (6, 2)}
    key = "base_model.model.layers.0.fc.lora_"
    factors = {f"{key}{side}.weight": torch.randn(shape, generator=generator) for side, shape in shapes.items()}
    save_file(factors, where / "adapter_model.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    (tmp_path / "base").mkdir()
    save_file({"layers.0.fc.weight": torch.randn(6, 4, generator=generator)}, tmp_path / "base" / "model.safetensors")
    for name in "ab":
        adapter(tmp_path / name, "base", generator)
    adapter(tmp_path / "other", "elsewhere", generator)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_base_of_adapters_need_not_be_given(here: Path) -> None:
    models = ["--model", "a=a", "--model", "b=b"]
    assert run(["merge", *models, "--out", "found"]) == 0
    assert run(["merge", "--base-model", "base", *models, "--out", "given"]) == 0
    found, given = (load_file(here / each / "model.safetensors")["layers.0.fc.weight"] for each in ("found", "given"))
    assert torch.equal(found, given)
    assert not torch.equal(found, load_file(here / "base" / "model.safetensors")["layers.0.fc.weight"])


def test_adapters_of_two_bases_do_not_say_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "--model", "a=a", "--model", "b=other", "--out", "merged"]) == 2
    assert "base_model" in capsys.readouterr().err
    assert not (here / "merged").exists()
