"""`poe-merge score`: the functional score of models without labels, and inputs of a fit that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

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
    return [Task("a", batches(0)), Task("b", batches(1))]

def held_out():
    return [Task("a", batches(10)), Task("b", batches(11))]

def batches(seed):
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(inputs.split(15))
"""
MERGE = """
base_model: base
models: [{model: a}, {model: b}]
dtype: float64
functional: {tasks: mine.py, steps: 5}
"""
SCORES = """
base_model: base
models: [{model: base}, {model: merged}, {model: ensemble}]
experts: {a: a, b: b}
num_resamples: 50
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("base", "a", "b", "ensemble/member-000", "ensemble/member-001")):
        (tmp_path / name).mkdir(parents=True)
        shapes = {"weight": (3, 4), "bias": (3,)}
        state = {k: torch.randn(v, generator=seeded(number), dtype=torch.float64) for k, v in shapes.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "ensemble" / "ensemble.json").write_text('{"format": "checkpoints"}')
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "merge.yaml").write_text(MERGE)
    (tmp_path / "scores.yaml").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_hand(folder: Path, model: list[str], seed: int, task: str) -> float:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def table(name: str) -> torch.Tensor:
        state = load_file(folder / name / "model.safetensors")
        return F.linear(x, state["weight"], state["bias"]).softmax(-1)

    mean = torch.stack([table(name) for name in model]).mean(0)
    return float(F.kl_div(mean.log(), table(task), reduction="none").sum(-1).mean())


def test_it_is_the_divergence_by_hand_on_inputs_that_no_fit_saw(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", "merge.yaml", "--allow-code", "--out", "merged"]) == 0
    assert run(["score", "scores.yaml", "--tasks", "mine.py:held_out", "--csv", "scores.csv"]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    frame = pd.read_csv("scores.csv").set_index("merge")
    members = {
        "base": ["base"],
        "merged": ["merged"],
        "ensemble": ["ensemble/member-000", "ensemble/member-001"],
    }
    assert run(["score", "scores.yaml", "--tasks", "mine.py:held_out", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["divergences"]}
    for model, parts in members.items():
        assert rows[model]["kl"] == pytest.approx(frame.loc[model, "kl"], rel=1e-12)
        assert rows[model]["tasks"]["a"]["kl"] == pytest.approx(by_hand(folder, parts, 10, "a"), rel=1e-9)
        expected = (by_hand(folder, parts, 10, "a") + by_hand(folder, parts, 11, "b")) / 2
        assert frame.loc[model, "kl"] == pytest.approx(expected, rel=1e-9)
    assert out.index("merged") < out.index("base") or frame.loc["base", "kl"] < frame.loc["merged", "kl"]
    assert run(["score", "scores.yaml", "--tasks", "mine.py"]) == 2
    assert "fitted on 40 of the inputs of 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ("tasks: mine.py", (), "is code of one's own"),
        ("reference: base", ("--tasks", "mine.py"), "`poe-merge score` has no use for it"),
        ("experts: {a: a}", ("--tasks", "mine.py"), "task 'b' has no expert to compare with"),
    ],
)
def test_one_message_for_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, arguments: tuple[str, ...], message: str
) -> None:
    key = line.partition(":")[0]
    kept = [each for each in SCORES.replace("{model: merged}, ", "").splitlines() if not each.startswith(key)]
    (folder / "scores.yaml").write_text("\n".join([*kept, line, ""]))
    assert run(["score", "scores.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_network_is_at_no_distance_from_itself() -> None:
    network = nn.Linear(4, 3)
    found = dx.divergence_of_models({"same": network}, [Task("a", [torch.ones(5, 4)])], {"a": network}, seed=0)
    assert found.mean("same").value == pytest.approx(0.0, abs=1e-12)
