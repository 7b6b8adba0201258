"""`poe-merge evaluate`: the numbers of `dx.evaluate`, by name; a user's module that runs only where it was allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diagnostics as dx
from inference import Task
from poe_merge.cli import run
from tests.seeds import seeded

MODULE = """
import torch
from inference import Task

def network(base):
    return torch.nn.Linear(4, 3).double()

def tasks():
    return [Task("one", batches(0)), Task("two", batches(1), metrics=("accuracy",))]

def few():
    return [Task("one", batches(0)[:1])]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs.split(30), torch.randint(3, (80,), generator=generator).split(30)))

def broken():
    raise RuntimeError("no data here")

def wrong():
    return ["one"]
"""
CONFIG = """
base_model: base
models:
  - {model: base, name: base}
  - model: merged
  - {model: ensemble, name: mean of members}
experts: {one: merged}
reference: base
num_resamples: 50
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("base", "merged", "ensemble/member-000", "ensemble/member-001")):
        (tmp_path / name).mkdir(parents=True)
        shapes = {"weight": (3, 4), "bias": (3,)}
        state = {
            key: torch.randn(shape, generator=seeded(number), dtype=torch.float64) for key, shape in shapes.items()
        }
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "ensemble" / "ensemble.json").write_text('{"format": "checkpoints"}')
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "scores.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    code = run(["evaluate", "scores.yaml", *arguments])
    out, err = capsys.readouterr()
    assert code == status, err
    return out + err


def test_the_table_is_that_of_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "--tasks", "mine.py", "--csv", "out/scores.csv")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    loader = [(inputs, torch.randint(3, (80,), generator=generator))]
    states = {name: load_file(folder / name / "model.safetensors") for name in ("base", "merged")}
    expected = dx.evaluate(
        states,
        [Task("one", loader)],
        seed=0,
        network=nn.Linear(4, 3).double(),
        reference="base",
        num_resamples=50,
    )
    frame = pd.read_csv(folder / "out" / "scores.csv").set_index(["model", "task", "metric"])
    for metric in ("accuracy", "nll", "brier", "ece"):
        row = frame.loc["merged", "one", metric]
        assert row["value"] == pytest.approx(expected.score("merged", metric, "one").value, rel=1e-12)
        assert row["difference_low"] == pytest.approx(expected.difference("merged", metric, "one").low, abs=1e-12)
    assert frame.loc["merged", "one", "accuracy"]["normalised"] == 1.0
    assert "mean of members" in text
    assert frame.loc["base", "mean", "accuracy"]["examples"] == 160


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ("tasks: mine.py", (), "`tasks: mine.py` is code of one's own"),
        ("", (), "`tasks` is missing"),
        ("tasks: other.py", ("--allow-code",), "there is no file"),
        ("tasks: mine.py:fw", ("--allow-code",), "has no function `fw`; did you mean `few`?"),
        ("tasks: mine.py:broken", ("--allow-code",), "`broken()` failed: RuntimeError: no data here"),
        ("tasks: mine.py:wrong", ("--allow-code",), "`wrong()` gave str"),
        ("metrcs: [ece]", ("--tasks", "mine.py"), "unknown key `metrcs`; did you mean `metrics`?"),
        ("metrics: [eec]", ("--tasks", "mine.py"), "unknown metric 'eec'; did you mean 'ece'?"),
        ("submodule: body", ("--tasks", "mine.py"), "no such submodule with tensors"),
    ],
)
def test_one_message_for_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, arguments: tuple[str, ...], message: str
) -> None:
    with (folder / "scores.yaml").open("a") as file:
        file.write(line + "\n")
    text = asked(capsys, *arguments, status=2)
    assert message in text
    assert text.startswith("error:")


def test_another_function_and_deltas(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\none " in asked(capsys, "--tasks", "mine.py:few")
    (folder / "ensemble" / "ensemble.json").write_text('{"format": "deltas"}')
    assert "--format checkpoints" in asked(capsys, "--tasks", "mine.py", status=2)


def test_the_document_is_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "--tasks", "mine.py", "--csv", "scores.csv")
    assert run(["evaluate", "scores.yaml", "--tasks", "mine.py", "--json"]) == 0
    found, frame = json.loads(capsys.readouterr().out), pd.read_csv("scores.csv")
    assert len(found["scores"]) == len(frame)
    for row, (_, expected) in zip(found["scores"], frame.iterrows(), strict=True):
        for key, value in row.items():
            assert pd.isna(expected[key]) if value is None else expected[key] == pytest.approx(value)
