"""Experts on predictions in `poe-merge merge` and `plan`: the same weights as in Python, resumed, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference.functional import SpanModel, fit, functional
from poe_merge.cli import run
from poe_models import Cauchy, InputGram, ProductOfExperts, TaskVectors
from tests.seeds import seeded

MODULE = """
import torch
from inference import Task

def network(base):
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).double()

def tasks():
    return [Task("a", batches(0), head=lambda logits: logits[:, :2]), Task("b", batches(1))]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return [(each, torch.zeros(len(each), dtype=torch.int64)) for each in inputs.split(8)]

def empty():
    return [Task("a", [])]

def stranger():
    return [Task("z", batches(0))]

def blind():
    return [Task("a", batches(0), forward=lambda model, batch: batch[:, :4])]
"""
CONFIG = """
base_model: base
models: [{model: a}, {model: b}]
dtype: float64
functional: {tasks: mine.py, steps: 20, batch_size: 8, importance: 2.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        shapes = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,)}
        draw = {k: torch.randn(v, generator=seeded(number), dtype=torch.float64) for k, v in shapes.items()}
        base = load_file(tmp_path / "base" / "model.safetensors") if number else draw
        state = {key: base[key] + 0.3 * draw[key] for key in shapes} if number else draw
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_python() -> dict[str, Tensor]:
    """The same fit without the command line."""
    vectors = TaskVectors("base", {"a": "a", "b": "b"}, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model = SpanModel(network, vectors, ProductOfExperts.of(vectors.names, InputGram(), Cauchy()))

    def head(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net(x)[:, :2]
        return found

    def whole(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net(x)
        return found

    inputs = [torch.randn(20, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)]
    experts = [
        functional(name, model, x, forward, importance=2.0)
        for name, x, forward in zip(("a", "b"), inputs, (head, whole), strict=True)
    ]
    posterior = model.posterior(*experts)
    generator = torch.Generator().manual_seed(0)
    found = fit(posterior, model.start(), generator=generator, steps=20, batch_size=8)
    return model.weights(posterior.coefficients(found.value))


def test_the_merge_is_that_of_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code"]) == 0, capsys.readouterr().err
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, value in in_python().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-8, atol=1e-10)
    record = json.loads((folder / "merged" / "poe_merge.json").read_text())
    assert record["settings"]["config"]["functional"]["tasks"] == "../mine.py"
    assert [Path(path).name for path in record["inputs"]["code"]["sha256"]] == ["mine.py"]
    assert record["designs"][0]["title"] == "functional experts"
    assert not (folder / "merged.fit").exists()
    assert run(["sample", "--merge", "merged", "-n", "2", "--out", "drawn", "--allow-code"]) == 2
    assert "this command knows only experts in weight space" in capsys.readouterr().err
    assert run(["diagnose", "merged", "--no-tails", "--out", "page.html"]) == 0


def test_an_interrupted_fit_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.functional.fit_state import FitState

    save, calls = FitState.save, iter(range(9))

    def interrupted(self: FitState, file: Path, key: str) -> None:
        save(self, file, key)
        if next(calls) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(FitState, "save", interrupted)
    command = ["merge", "config.yaml", "--allow-code", "--out"]
    assert run([*command, "one"]) == 130
    assert (folder / "one.fit").exists()
    assert run([*command, "one", "--resume"]) == 0
    assert run([*command, "two"]) == 0
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_plan_says_what_memory_it_takes_and_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("raise RuntimeError('imported')\n")
    assert run(["plan", "config.yaml", "--allow-code"]) == 0
    out = capsys.readouterr().out
    basis = 8 * (4 * (30 + 24) + 2 * (6 + 4))  # updates, centre and merge of matrices; updates of biases
    assert f"fit with experts on predictions: {basis / 1e6:.3g} MB of updates and merges" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is code of one's own, which would be run. If you trust it, add --allow-code"),
        (["--tasks", "mine.py:empty"], "the loader of 'a' has no batches"),
        (["--tasks", "mine.py:stranger"], "no model is called 'z'"),
        (["--tasks", "mine.py:blind"], "do not depend on the merged weights"),
        (["--tasks", "nowhere.py"], "there is no file"),
        (["--tasks", "mine.py", "--tied", "conv"], "finds none of 2 modules"),
        (["--tasks", "mine.py", "--submodule", "body"], "the network has no tensor 'body."),
        (["--tasks", "mine.py", "--energy", "[{filter: '2', value: Gaussian}, {value: Cauchy}]"], "one design of all"),
        (["--tasks", "mine.py", "--method", "ties"], "`tasks` belongs to a product of experts"),
        (["--tasks", "mine.py", "--steps", "0"], "steps"),
    ],
)
def test_one_message_for_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "merged").exists()


def test_settings_of_no_tasks_and_other_commands_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bare.yaml").write_text(CONFIG.split("functional")[0])
    assert run(["merge", "bare.yaml", "--steps", "5", "--out", "merged"]) == 2
    assert "functional.steps: it is about experts on predictions" in capsys.readouterr().err
    assert run(["stats", "config.yaml", "--out", "stats", "--allow-code"]) == 2
    assert "this command knows only experts in weight space" in capsys.readouterr().err
