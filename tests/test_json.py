"""`--json` against the tables for people, and `--quiet`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from poe_merge.cli import run
from poe_models.methods import METHODS


@pytest.fixture
def here(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji"):
        (tmp_path / name).mkdir()
        shapes = {"0.attn.qkv.weight": (12, 4), "0.mlp.weight": (8, 4), "0.bias": (8,)}
        save_file(
            {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()},
            tmp_path / name / "model.safetensors",
        )
    document = {"base_model": "base", "models": [{"model": "mnist"}, {"model": "emoji"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def test_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "config.yaml"]) == 0
    table = capsys.readouterr().out
    assert run(["plan", "config.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in found["tensors"]] == ["0.attn.qkv.weight", "0.bias", "0.mlp.weight"]
    for tensor in found["tensors"]:
        heading = f"{tensor['action']}{', ' + tensor['view'] if tensor['view'] else ''} ({tensor['reason']})\n"
        beneath = table.split(heading)[1]
        row = next(line for line in beneath.splitlines() if line.startswith(f"  {tensor['name']} "))
        assert "x".join(map(str, tensor["shape"])) in row
        assert (tensor["design"] is not None) == (tensor["action"] == "merge")
    count = found["count"]
    assert f"{count['merge']} merged, {count['average']} averaged, {count['base']} kept" in table
    assert f"{found['modules']} in " in table
    assert found["modules"] == sum(len(tensor["matrices"]) for tensor in found["tensors"]) == 4
    assert f"{found['share']['merge']:.1%} merged" in table
    assert found["write_bytes"] == (12 * 4 + 8 * 4 + 8) * 4
    assert found["experts"] == ["mnist", "emoji"]
    assert found["designs"][0]["experts"]


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "TaskArithmetic(0.3)"]) == 0
    table = capsys.readouterr().out
    assert run(["check", "TaskArithmetic(0.3)", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == 0
    held = [outcome for outcome in found["outcomes"] if outcome["status"] == "holds"]
    assert f"{len(held)} hold, {len(found['outcomes']) - len(held)} not promised." in table
    (first, *_) = [outcome for outcome in found["outcomes"] if outcome["status"] == "not promised"]
    assert f"not promised: {first['reason']}" in table


def test_a_broken_property_is_told_by_the_status_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(
        "from poe_models.methods import About, MergingMethod\n\n"
        "class Sum(MergingMethod):\n    about = About('sum', 'nobody')\n\n"
        "    def merged(self, batch):\n        return batch.updates.sum(1)\n"
    )
    assert run(["check", "mine.py:Sum", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == 1


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert {row["name"]: row["citation"] for row in rows} == {n: m.about.citation for n, m in METHODS.items()}


def test_quiet_prints_warnings_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "out", "--quiet", "--rule", "{match: nothing, action: base}"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("warning: the rule {match: nothing")
    assert (here / "out" / "model.safetensors").is_file()
    assert run(["--quiet", "merge", "config.yaml", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run(["plan", "config.yaml"]) == 0
    assert "merged" in capsys.readouterr().out


def test_quiet_leaves_the_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "config.yaml", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == 4
