"""`poe-merge merge --output adapter`: the folder of `merge_adapters`, said in words, and what refuses it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.models.adapters import merge_adapters
from poe_merge.cli import run
from poe_merge.console import size
from poe_models import ProductOfExperts, TaskVectors
from tests.helpers import assert_close
from tests.test_factor_merge import TARGETS, built


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about choices that the tests make on purpose
        built("bert", tmp_path, TARGETS, {**TARGETS, "r": 3})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], command: str, *arguments: str, status: int = 0) -> str:
    given = ["--base-model", "base", "--model", "expert0", "--model", "expert1", "--dtype", "float64"]
    models = given if command != "diagnose" else []
    code = run([command, *models, *arguments])
    out, err = capsys.readouterr()
    assert code == status, err
    return out + err


def test_the_merge_is_that_of_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "merge", "--output", "adapter", "--out", "merged")
    assert "an adapter with factors of 4 modules, rank 5" in text
    experts = {f"expert{i}": folder / f"expert{i}" for i in range(2)}
    vectors = TaskVectors(folder / "base", experts, dtype=torch.float64)
    merge_adapters(vectors, ProductOfExperts.of(vectors.names), folder / "other")
    found, expected = (load_file(folder / each / "adapter_model.safetensors") for each in ("merged", "other"))
    assert found.keys() == expected.keys()
    for module in {name.partition(".lora_")[0] for name in found}:
        b, a, c, d = (side[f"{module}.lora_{key}.weight"] for side in (found, expected) for key in ("B", "A"))
        assert_close(b @ a, c @ d, 1e-9)


def test_a_rank_and_its_error_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "merge.yaml").write_text("output: adapter(rank=2)\nout_dtype: bfloat16\n")
    text = asked(capsys, "merge", "--out", "merged", "merge.yaml")
    record = json.loads((folder / "merged" / "poe_merge.json").read_text())
    assert "rank 2" in text
    assert f"from the rank: {record['error']:.3g}." in text
    assert record["settings"]["config"]["output"] == "adapter(rank=2)"
    dtypes = {str(tensor.dtype) for tensor in load_file(folder / "merged" / "adapter_model.safetensors").values()}
    assert dtypes == {"torch.bfloat16"}


def test_what_was_kept_of_each_adapter_is_said_and_warned_about(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "expert1" / "adapter_model.safetensors"
    state = load_file(path)
    save_file({name: 0.003 * value if ".lora_B." in name else value for name, value in state.items()}, path)
    whole = asked(capsys, "merge", "--scale", "Relative(1.0)", "--out", "whole")
    adapter = asked(capsys, "merge", "--scale", "Relative(1.0)", "--output", "adapter", "--out", "adapter")
    for text in (whole, adapter):
        assert "Kept of the experts' updates: expert0 " in text
        assert "Under Relative scales the shortest expert decides" in " ".join(text.split())
    vectors = TaskVectors(folder / "base", {f"expert{i}": folder / f"expert{i}" for i in range(2)})
    done = merge_adapters(vectors, ProductOfExperts.of(vectors.names), folder / "other")
    assert [expert.name for expert in done.experts] == ["expert0", "expert1"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("merge", ("--output", "adaptor", "--out", "x"), "unknown output `adaptor`; write model, adapter"),
        ("merge", ("--output", "adapter(0)", "--out", "x"), "unknown output"),
        ("merge", ("--output", "adapter", "--method", "ties", "--out", "x"), "with Ties"),
        ("plan", ("--output", "adapter", "--method", "ties"), "with Ties"),
        ("merge", ("--output", "adapter", "--model", "whole", "--out", "x"), "is no adapter"),
    ],
)
def test_refusals(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: tuple[str, ...], message: str
) -> None:
    asked(capsys, "merge", "--out", "whole")
    assert message in asked(capsys, command, *arguments, status=2)
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("output", "more"), [("adapter", ()), ("adapter(2)", ()), ("adapter", ("--out-dtype", "bfloat16"))]
)
def test_plan_says_what_will_be_written(
    output: str, more: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output.replace("(2)", "(rank=2)")
    said = asked(capsys, "plan", "--output", output, *more)
    asked(capsys, "merge", "--output", output, *more, "--out", "merged")
    weights = load_file(folder / "merged" / "adapter_model.safetensors").values()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in weights)
    assert f"Written as an adapter: {size(nbytes)} at most" in said


def test_plan_and_diagnose_know_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Written as an adapter" in asked(capsys, "plan", "--output", "adapter")
    asked(capsys, "merge", "--output", "adapter", "--out", "merged")
    assert "the merge is an adapter" in asked(capsys, "diagnose", "merged", status=2)
