"""Paths in published records: none of this machine's, and inputs are found again by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inference.models.places import portable, resolved
from poe_merge.cli import run

MODELS = ["--base-model", "models/base", "--model", "a=models/a", "--model", "b=models/b"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    base = torch.randn(6, 4, generator=generator)
    for name in ("base", "a", "b", "anchor"):
        folder = tmp_path / "work" / "models" / name
        folder.mkdir(parents=True)
        noise = 0.0 if name == "base" else 0.1 * torch.randn(6, 4, generator=generator)
        save_file({"fc.weight": base + noise}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def texts(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [text for pair in data.items() for each in pair for text in texts(each)]
    if isinstance(data, list):
        return [text for each in data for text in texts(each)]
    return [data] if isinstance(data, str) else []


def test_no_record_has_a_path_of_this_machine(here: Path) -> None:
    anchor = ["--anchor", "models/anchor"]
    assert run(["merge", *MODELS, *anchor, "--out", "out/merged"]) == 0
    assert run(["sample", *MODELS, *anchor, "-n", "2", "--draws", "20", "--warmup", "5", "--out", "out/drawn"]) == 0
    for record in [here / "out/merged/poe_merge.json", *(here / "out/drawn").rglob("*.json")]:
        found = record.read_text()
        assert str(here.parent) not in found, record
    record = json.loads((here / "out/merged/poe_merge.json").read_text())
    assert record["inputs"]["base"]["source"] == "../../models/base"
    assert record["inputs"]["anchor ../../models/anchor"]["source"] == "../../models/anchor"
    assert record["designs"][0]["anchor"]["center"] == "../../models/anchor"
    assert record["settings"]["config"]["models"][0]["model"] == "../../models/a"


def test_inputs_are_found_again_where_the_folders_go_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["merge", *MODELS, "--anchor", "models/anchor", "--out", "merged"]) == 0
    moved = here.parent / "elsewhere"
    here.rename(moved)
    monkeypatch.chdir(here.parent)
    words = ["-n", "2", "--draws", "20", "--warmup", "5"]
    assert run(["sample", "--merge", "elsewhere/merged", *words, "--out", "drawn"]) == 0
    assert run(["diagnose", "elsewhere/merged", "--surrogates", "0", "--out", "r.html"]) == 0
    monkeypatch.chdir(moved / "merged")
    assert run(["diagnose", ".", "--surrogates", "0", "--out", "../r.html"]) == 0


def test_what_is_gone_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", *MODELS, "--out", "merged"]) == 0
    shutil.rmtree("models/a")
    capsys.readouterr()
    assert run(["diagnose", "merged"]) == 0  # without what takes reading them
    told = "".join("".join(capsys.readouterr()).split())
    assert f"{here}/models/aisnotthereanymore" in told


def test_paths_and_nothing_else_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "me"
    out = home / "out" / "merged"
    names = {key: home / key for key in ("base", "it's here", "stats")}
    foreign = tmp_path / "home" / "you" / "expert"
    for path in (*names.values(), foreign):
        path.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    told = {
        "source": str(names["base"]),
        f"anchor {names['stats']}": {"file": [str(names["it's here"]), "/not/there", "merge/slash", 3, None]},
        "map": f"Fisher(StatisticsFolder('{names['stats']}'), other='/not/there')",
        "alias": "a 'quoted' word, and \"another\"",
        "foreign": str(foreign),
    }
    made = portable(told, out)
    assert made == {
        "source": "../../base",
        "anchor ../../stats": {"file": ["../../it's here", "/not/there", "merge/slash", 3, None]},
        "map": "Fisher(StatisticsFolder('../../stats'), other='/not/there')",
        "alias": told["alias"],
        "foreign": "../expert",
    }
    assert resolved(made, out) == {**told, "foreign": str(out.parent / "expert")}
    assert resolved(portable(told, out / "member-000"), out / "member-000")["map"] == told["map"]


def test_a_snapshot_of_the_hub_is_its_id_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert portable([str(snapshot)], tmp_path / "out") == ["org/name@0123abc"]
    assert resolved(["org/name@0123abc"], tmp_path / "out") == ["org/name@0123abc"]
    monkeypatch.setattr("inference.models.places.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolved(["org/name@0123abc"], tmp_path / "out") == [str(snapshot)]
