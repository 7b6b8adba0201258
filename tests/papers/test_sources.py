"""Where models and data come from, and what is said when they do not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import sources as module
from benchmarks.papers.sources import Data, SourceError, Sources, picked


def folder_of(hub: Path, name: str, *files: str) -> Path:
    (hub / name).mkdir(parents=True)
    for file in files:
        (hub / name / file).write_bytes(b"")
    return hub / name


def test_a_local_folder_has_the_hubs_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "org/model", "model.safetensors")
    assert Sources(tmp_path).folder("org/model") == Sources(tmp_path).folder("org/model@refs/pr/15") == folder


def test_weights_that_are_no_safetensors_are_not_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "org/model", "pytorch_model.bin", "config.json")
    with pytest.raises(SourceError, match=r"model org/model: .* has no safetensors.*ORG/NAME@REVISION"):
        Sources(tmp_path).folder("org/model")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model org/model: .*model is not there.*--local"):
        Sources(tmp_path).folder("org/model")


def test_only_weights_and_tokenizers_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append((name, given))
        return str(folder_of(tmp_path, f"{name}-{len(asked)}", "adapter_model.safetensors"))

    monkeypatch.setattr(module, "snapshot_download", fetch)
    Sources().folder("org/model")
    Sources().folder("org/model@v1")
    assert [(name, given["revision"]) for name, given in asked] == [("org/model", None), ("org/model", "v1")]
    assert all(given["allow_patterns"] == ["*.safetensors", "*.json", "*.txt", "*.model"] for _, given in asked)


def test_what_the_hub_says_is_one_line_with_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **_: Any) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(module, "snapshot_download", fetch)
    with pytest.raises(SourceError, match=r"^model org/model@v1: not to be had .*\(OSError: no network\)\. Check"):
        Sources().folder("org/model@v1")


def test_without_datasets_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r'data: .*`datasets` is not installed.*pip install "poe-merge\[papers\]"'):
        Sources().rows(Data("org/data", "test"))


def test_rows_are_chosen_by_the_seed_in_the_order_of_the_data() -> None:
    found = [list(picked(1000, 50, seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] == sorted(set(found[0]))
    assert found[0] != found[2]
    assert list(picked(3, 5, 0)) == list(picked(3, None, 0)) == [0, 1, 2]
    counts = torch.tensor([list(picked(10, 5, seed)) for seed in range(400)]).flatten().bincount()
    assert (
        float(((counts - 200) / 10).square().sum()) < 40
    )  # each is in half of the choices, 10 standard deviations of one
