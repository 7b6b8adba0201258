"""`poe-merge search`: ranges in a configuration, tied groups, studies that go on, and one error for each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from poe_merge.cli import run

MODULE = """
import torch
from inference import Task

def network(base):
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()

def tasks():
    return [Task(name, batches(seed)) for seed, name in enumerate(("one", "two"))]

def nothing():
    return [Task("one", [])]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(90, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs.split(30), torch.randint(3, (90,), generator=generator).split(30)))

def closeness(state):
    return -float(sum((value - 0.5).square().sum() for value in state.values()))

def broken(state):
    raise RuntimeError("no such thing")

def constant(state):
    return 1.0
"""
CONFIG = """
base_model: base
dtype: float64
models: [{model: one}, {model: two}]
parameters:
  energy: {choices: [Gaussian, Cauchy]}
  eta: {low: 1e-3, high: 1, log: true, groups: {first: "^0", second: "^2"}}
  scaling: {low: 0.5, high: 1.5}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        state = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "space.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert run(["search", *arguments]) == status
    told = capsys.readouterr()
    return told.out if status == 0 else told.err.replace("\n", " ")


def test_the_best_settings_are_merged_as_an_ordinary_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("space.yaml", "--score", "mine.py:closeness", "--trials", "12", "--sampler", "random")
    told = asked(capsys, *arguments, "--out", "merged", "--csv", "trials.csv")
    assert "12 trials; best mine.py:closeness" in told
    record = json.loads((folder / "merged" / "poe_merge.json").read_text())
    found, values = record["settings"]["search"], record["settings"]["search"]["values"]
    assert set(values) == {"energy", "eta/first", "eta/second", "scaling"}
    table = pd.read_csv(folder / "trials.csv")
    assert found["score"] == pytest.approx(table["score"].max())
    state = load_file(folder / "merged" / "model.safetensors")
    assert -float(sum((v - 0.5).square().sum() for v in state.values())) == pytest.approx(found["score"], rel=1e-6)
    # And the record's configuration makes the same merge again.
    best = record["settings"]["config"]
    (folder / "merged" / "best.yaml").write_text(json.dumps(best))  # paths are as seen from the record
    assert run(["merge", "merged/best.yaml", "--out", "again"]) == 0
    again = load_file(folder / "again" / "model.safetensors")
    for name, value in state.items():
        assert torch.equal(value, again[name])


@pytest.mark.parametrize("score", ["accuracy", "nll", "functional"])
def test_scores_of_a_users_tasks(score: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = f"sqlite:///{folder}/study.db"
    arguments = ("space.yaml", "--tasks", "mine.py", "--score", score, "--sampler", "random", "--storage", storage)
    asked(capsys, *arguments, "--trials", "4", "--out", "a", "--fraction", "0.6")
    asked(capsys, *arguments, "--trials", "9", "--out", "b", "--fraction", "0.6", "--csv", "b.csv")
    table = pd.read_csv(folder / "b.csv")
    assert len(table) == 9
    best = json.loads((folder / "b" / "poe_merge.json").read_text())["settings"]["search"]["score"]
    assert best == pytest.approx(table["score"].max() if score == "accuracy" else table["score"].min())
    assert "is of another score" in asked(capsys, *arguments, "--trials", "9", "--out", "c", status=2)


BAD = {
    "low: 2, high: 1": "low < high",
    "low: 0, high: 1, log: true": "positive low",
    "low: 1": "give `low` and `high`, or `choices`",
    "high: 1": "give `low` and `high`, or `choices`",
    "low: 0.1, high: 1, hgih: 2": "unknown key `hgih`",
    "low: 0.1, high: 1, groups: {all: atn}": "'atn' fits no tensor",
    "low: 0.1, high: 1, groups: {a: weight, b: '^0'}": "overlap",
    "low: 0.1, high: 1, groups: bmm": "none of 4 tensors has a name of a known architecture",
    "low: 0.1, high: 1, groups: layers": "write bmm, blocks",
    "low: 0.1, high: 1, as: RelativePrecision": "has no $",
    "choices: [0.1]": "at least two values",
    "choices: [0.1, atn]": "atn",
}


@pytest.mark.parametrize(("text", "error"), BAD.items())
def test_bad_ranges_are_one_error_with_their_place(
    text: str, error: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "space.yaml").write_text(CONFIG.partition("  eta:")[0] + f"  eta: {{{text}}}\n")
    told = asked(capsys, "space.yaml", "--score", "mine.py:closeness", "--trials", "4", "--out", "m", status=2)
    assert error in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--score", "mine.py:broken"), "all 3 trials failed; the first one: SpecError: score `mine.py:broken`"),
        (("--score", "mine.py:constant"), "all 3 trials have the score 1"),
        (("--score", "mine.py:closenes"), "did you mean `closeness`"),
        (("--score", "acuracy", "--tasks", "mine.py"), "did you mean 'accuracy'"),
        (("--score", "accuracy"), "Give --tasks FILE.py"),
        (("--score", "nll", "--tasks", "mine.py:nothing"), "the loader has no batches"),
        (("--score", "mine.py:closeness", "--storage", "sqlite:////no/where.db"), "the storage sqlite:////no/where.db"),
        (("--score", "mine.py:closeness", "--sampler", "tpe"), "known are 'gp', 'random' and 'grid'"),
        (("--score", "nll", "--tasks", "mine.py", "--fraction", "0"), "a share of the batches"),
    ],
)
def test_bad_scores_and_storages_are_one_error(
    arguments: tuple[str, ...], error: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = asked(capsys, "space.yaml", "--trials", "3", "--out", "m", *arguments, status=2)
    assert error in told
    assert not (folder / "m").exists()


def test_a_configuration_without_ranges_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "space.yaml").write_text(CONFIG.partition("parameters:")[0])
    assert "no parameter is a range" in asked(capsys, "space.yaml", "--score", "nll", "--out", "m", status=2)


def test_an_output_that_exists_is_refused_before_the_search(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = asked(capsys, "space.yaml", "--score", "mine.py:broken", "--out", "base", status=2)
    assert "exists" in told


def test_what_would_be_ignored_or_lost_is_refused_before_the_search(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("space.yaml", "--score", "mine.py:closeness", "--trials", "3", "--sampler", "random")
    told = asked(capsys, *arguments, "--tasks", "mine.py", "--out", "m", status=2)
    assert "has no use for --tasks" in told
    left = folder / "m.partial"
    (left / "output").mkdir(parents=True)
    for name in ("state.json", "output/config.json"):
        (left / name).write_text("{}")
    assert "--resume" in asked(capsys, *arguments, "--out", "m", "--storage", "sqlite:///study.db", status=2)
    assert not (folder / "study.db").exists()


def test_a_rule_that_sees_the_whole_model_is_the_anchor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace("parameters:", 'parameters:\n  anchor: "Ties(density=0.5)"')
    (folder / "space.yaml").write_text(text)
    asked(capsys, "space.yaml", "--score", "mine.py:closeness", "--trials", "3", "--sampler", "random", "--out", "m")
    found = json.loads((folder / "m" / "poe_merge.json").read_text())["settings"]["search"]
    state = load_file(folder / "m" / "model.safetensors")
    assert -float(sum((v - 0.5).square().sum() for v in state.values())) == pytest.approx(found["score"], rel=1e-6)


def test_numbers_are_written_into_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.partition("  eta:")[0] + "  eta: {low: 0.5, high: 2, as: AbsolutePrecision($)}\n"
    (folder / "space.yaml").write_text(text)
    asked(capsys, "space.yaml", "--score", "mine.py:closeness", "--trials", "5", "--sampler", "grid", "--out", "m")
    record = json.loads((folder / "m" / "poe_merge.json").read_text())
    assert record["designs"][0]["anchor"]["precision"].startswith("AbsolutePrecision(")
