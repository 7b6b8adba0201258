"""Several processes at draws, activations, a search and an evaluation: what one process gives, or says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inference.models import ensemble_files
from inference.models.disk import OutputError
from inference.models.ranks import ALONE, Ranks, require_same_state
from poe_merge.cli import run
from poe_merge.search import Budget, search
from tests.seeds import seeded
from tests.test_ranks import contents, together

TASKS = """
import torch
from inference import Task

def network(base):
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

def tasks():
    return [Task(name, batches(seed)) for seed, name in enumerate("abc")]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(24, 5, generator=generator)
    return [(each, torch.randint(3, (len(each),), generator=generator)) for each in inputs.split(8)]
"""
SCORES = """
base_model: base
models: [{model: a}, {model: b}, {model: base, name: untouched}]
experts: {a: a, b: b, c: c}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shapes = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    base = {name: torch.randn(shape, generator=seeded(0)) for name, shape in shapes.items()}
    for number, name in enumerate(("base", "a", "b", "c")):
        (tmp_path / name).mkdir()
        state = {k: v + 0.1 * number * torch.randn(v.shape, generator=seeded(number)) for k, v in base.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(TASKS)
    (tmp_path / "scores.yaml").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> list[str]:
    return [*words, "--base-model", "base", *(f"--model={name}" for name in "abc")]


@pytest.mark.parametrize(
    "how",
    [
        ["--coordinates", "full", "--warmup", "4", "--chains", "2", "--draws", "3", "-n", "5"],
        ["--format", "deltas", "--chains", "2", "--draws", "4", "--warmup", "2", "-n", "4"],
    ],
    ids=["full", "span"],
)
def test_members_are_those_of_one_process(how: list[str], folder: Path) -> None:
    assert run(command("sample", *how, "--temperature", "0.01", "--out", "alone")) == 0
    done = together(2, command("sample", *how, "--temperature", "0.01", "--out", "shared"))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "shared") == contents(folder / "alone")
    assert not (folder / "shared.partial").exists()


def test_activations_are_those_of_one_process(folder: Path) -> None:
    assert run(command("activations", "--tasks", "mine.py", "--out", "alone")) == 0
    done = together(2, command("activations", "--tasks", "mine.py", "--out", "shared"))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "shared") == contents(folder / "alone")
    assert run(command("activations", "--tasks", "mine.py", "--out", "shared", "--resume")) == 0  # all are known again


@pytest.mark.parametrize(("scoring", "processes"), [("evaluate", 2), ("score", 3)])
def test_scores_are_those_of_one_process(
    scoring: str, processes: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [scoring, "scores.yaml", "--tasks", "mine.py", "--json"]
    assert run([*arguments, "--csv", "alone.csv"]) == 0
    alone = json.loads(capsys.readouterr().out)
    done = together(processes, [*arguments, "--csv", "shared.csv"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone
    assert (folder / "shared.csv").read_bytes() == (folder / "alone.csv").read_bytes()


def test_a_search_is_shared_by_as_many_workers(folder: Path) -> None:
    (folder / "space.yaml").write_text("parameters: {energy: Gaussian, eta: {low: 0.001, high: 10, log: true}}\n")
    arguments = command("search", "space.yaml", "--tasks", "mine.py", "--score", "nll", "--trials", "9")
    arguments += ["--sampler", "random", "--out", "best"]
    budget: Any = Budget(trials=9, sampler="random", storage=None, study="poe-merge", worker=0, seed=0)
    some: Any = None
    with pytest.raises(ValueError, match="2 processes share a study by a database. Name one: --storage"):
        search(some, some, some, folder / "best", budget, some, ranks=Ranks(0, 2))
    done = together(2, [*arguments, "--storage", "sqlite:///study.db", "--csv", "trials.csv"])
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "best" / "poe_merge.json").read_text())["settings"]
    trials = record["search"]["trials"]
    assert len(trials) in (9, 10)  # the other worker's last one was on its way
    assert record["search"]["score"] == min(each["score"] for each in trials)
    assert len((folder / "trials.csv").read_text().splitlines()) == len(trials) + 1
    eta = record["search"]["values"]["eta"]
    assert run(command("merge", "--energy", "Gaussian", "--eta", str(eta), "--out", "again")) == 0
    best, again = (contents(folder / name)["model.safetensors"] for name in ("best", "again"))
    assert best == again


def test_results_come_in_order_and_are_told() -> None:
    told: list[tuple[int, int]] = []
    assert ALONE.results([lambda: "a", lambda: "b"], lambda done, total: told.append((done, total))) == ["a", "b"]
    assert told == [(1, 2), (2, 2)]
    assert ALONE.results([]) == []
    assert Ranks(1, 3).share([1.0] * 7) == {1, 4}


def test_more_processes_go_on_with_an_interrupted_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = [
        "--coordinates",
        "full",
        "--warmup",
        "2",
        "--chains",
        "1",
        "--draws",
        "2",
        "-n",
        "2",
        "--temperature",
        "0.01",
    ]
    assert run(command("sample", *how, "--out", "alone")) == 0
    write = ensemble_files._Writer._member

    def interrupted(writer: Any, index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(writer, index)

    monkeypatch.setattr(ensemble_files._Writer, "_member", interrupted)
    assert run(command("sample", *how, "--out", "shared")) == 130
    done = together(3, command("sample", *how, "--out", "shared", "--resume"))  # one of them has no member to write
    assert done.returncode == 0, done.stderr
    assert contents(folder / "shared") == contents(folder / "alone")


def test_processes_that_would_write_different_things_are_refused() -> None:
    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [{**value, "seed": 1}, value]

    with pytest.raises(OutputError, match="`seed` is not the same in all"):
        require_same_state(Two(1, 2), {"seed": 2, "inputs": {}})
    require_same_state(Two(1, 2), {"seed": 1, "inputs": {"base": 1}})
