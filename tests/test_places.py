"""Paths in published records: none of this machine's, and inputs are found again by them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference import MergedEnsemble, load_draws, load_statistics
from inference.models.places import portable, resolved
from poe_merge.cli import run
from poe_models import Activation, Anchor, Balanced, ProductOfExperts, RelativePrecision, TaskVectors
from poe_models.span import SpanStatistics
from poe_models.weights.loading import CheckpointError
from poe_models.weights.moments import ModuleMoments, MomentsFolder

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


ENERGY = "from poe_models import Energy\n\nclass Mine(Energy):\n    def rho(self, q):\n        return q / (1 + q)\n"


def test_code_of_ones_own_has_no_path_of_this_machine_and_is_found_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("code").mkdir()
    Path("code/mine.py").write_text(ENERGY)
    own, words = ["--energy", "code/mine.py:Mine"], ["-n", "1", "--draws", "9", "--warmup", "2", "--sampler", "slice"]
    assert run(["merge", *MODELS, *own, "--out", "out/merged"]) == 0
    assert run(["sample", *MODELS, *own, *words, "--out", "out/drawn"]) == 0
    for file in [*(here / "out").rglob("*.json"), *(here / "out").rglob("*.md")]:
        assert str(here.parent) not in file.read_text(), file
    record = json.loads((here / "out/merged/poe_merge.json").read_text())
    assert record["settings"]["config"]["parameters"]["energy"] == "../../code/mine.py:Mine()"
    digest = hashlib.sha256(ENERGY.encode()).hexdigest()
    assert record["inputs"]["code"]["sha256"] == {"../../code/mine.py": digest}
    moved = here.parent / "elsewhere"
    here.rename(moved)
    monkeypatch.chdir(here.parent)
    again = ["--allow-code", *words, "--out", "again"]
    assert run(["sample", "--merge", "elsewhere/out/merged", *again]) == 0
    assert run(["diagnose", "elsewhere/out/merged", "--allow-code", "--surrogates", "1", "--out", "r.html"]) == 0
    (moved / "code/mine.py").write_text(ENERGY + "\n")
    assert run(["diagnose", "elsewhere/out/merged", "--allow-code", "--surrogates", "1", "--out", "r.html"]) == 0
    assert "is not the code that the merge was made with" in Path("r.html").read_text()


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
        "map": f"Fisher(MomentsFolder('{names['stats']}'), other='/not/there')",
        "alias": "a 'quoted' word, and \"another\"",
        "foreign": str(foreign),
    }
    made = portable(told, out)
    assert made == {
        "source": "../../base",
        "anchor ../../stats": {"file": ["../../it's here", "/not/there", "merge/slash", 3, None]},
        "map": "Fisher(MomentsFolder('../../stats'), other='/not/there')",
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


def moments(folder: Path) -> None:
    """Input moments of both experts, as ``Activation`` takes them."""
    means = {name: {"fc.weight": torch.eye(4)} for name in "ab"}
    ModuleMoments("activations", means).save(folder)


def test_statistics_and_draws_go_with_what_they_refer_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments(here / "moments")
    design = [*MODELS, "--residual-map", "Activation('moments')"]
    words = ["-n", "2", "--draws", "20", "--warmup", "5"]
    assert run(["stats", *design, "--out", "out/stats"]) == 0
    assert run(["sample", *design, "--coordinates", "full", *words, "--out", "out/full"]) == 0
    assert run(["sample", *design, "--stats", "out/stats", *words, "--out", "out/drawn"]) == 0
    for record in [here / "out/stats/statistics.json", *(here / "out").glob("*/draws/draws.json")]:
        assert str(here.parent) not in record.read_text(), record
    moved = here.parent / "elsewhere"
    here.rename(moved)
    monkeypatch.chdir(moved)
    assert run(["sample", *design, "--stats", "out/stats", *words, "--out", "again"]) == 0
    statistics = load_statistics("out/stats")
    assert statistics.residual_maps == (f"Activation(moments='{moved / 'moments'}', off_diagonal=1.0)",) * 2
    assert load_draws("out/drawn/draws", statistics).kind == "span"
    full = load_draws("out/full/draws")
    vectors = TaskVectors("models/base", {"a": "models/a", "b": "models/b"})
    poe = ProductOfExperts.of(vectors.names, Activation(MomentsFolder(moved / "moments")), scale=Balanced(1.0))
    poe = replace(poe, anchor=Anchor(precision=RelativePrecision(0.1)))
    member = next(MergedEnsemble(vectors, poe, full).members())
    known = load_file("out/full/member-000/model.safetensors")
    assert full.designs[0].count(str(moved)) == 2
    assert member["fc.weight"].shape == known["fc.weight"].shape


def test_records_with_absolute_paths_are_still_read(here: Path) -> None:
    moments(here / "moments")
    assert run(["stats", *MODELS, "--residual-map", "Activation('moments')", "--out", "stats"]) == 0
    file = here / "stats/statistics.json"
    record = json.loads(file.read_text())
    before = SpanStatistics(**{**vars(load_statistics("stats"))})
    record = resolved(record, here / "stats")
    names = (before.modules, before.updates, before.residual_maps, before.through)
    digest = hashlib.sha256(repr(names).encode())  # as it was made when places counted
    for name in ("gram", "forms", "mean_curvature", "dimension"):
        values = getattr(before, name)
        digest.update(f"{name}{tuple(values.shape)}".encode() + values.numpy().astype("<f8").tobytes())
    assert digest.hexdigest() != record["digest"]
    file.write_text(json.dumps({**record, "digest": digest.hexdigest()}))
    assert load_statistics("stats").residual_maps == before.residual_maps
    file.write_text(json.dumps({**record, "digest": "0" * 64}))
    with pytest.raises(CheckpointError, match="not about these numbers"):
        load_statistics("stats")


def test_a_path_that_shares_no_folder_stays_absolute_where_it_must_be_found(tmp_path: Path) -> None:
    assert portable(["/usr", "/usr/bin"], tmp_path / "out", foreign=False) == ["/usr", "/usr/bin"]


def test_the_folder_its_parent_and_what_is_in_it_are_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "base").mkdir(parents=True)
    record = {
        "parent": str(tmp_path),
        "itself": str(out),
        "inside": f"Fisher('{out / 'base'}')",
        "child": str(out / "base"),
    }
    kept = portable(record, out)
    assert kept == {"parent": "../", "itself": "./", "inside": "Fisher('./base')", "child": "./base"}
    assert resolved(kept, out) == record


def test_two_places_of_one_name_stay_two(tmp_path: Path) -> None:
    record = {"/usr/bin": 1, "/usr/local/bin": 2}
    assert portable(record, tmp_path) == record


def test_a_long_text_that_begins_like_a_path_is_left_alone(tmp_path: Path) -> None:
    record = {"text": "/" + "x" * 300}
    assert portable(record, tmp_path) == record
