"""`poe-merge activations`: the moments that `collect_activations` gives, and a merge that uses them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poe_merge.cli import run

MODULE = """
import torch
from inference import Task

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()

    def forward(self, x):
        return self.body(x)

def network(base):
    return Net()

def tasks():
    return [Task(name, batches(seed)) for seed, name in enumerate(("one", "two"))]

def few():
    return tasks()[:1]

def empty():
    return [Task("one", []), Task("two", [])]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(90, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs.split(30), torch.randint(3, (90,), generator=generator).split(30)))
"""
MODELS = ("--base-model", "base", "--model", "one=one", "--model", "two=two", "--dtype", "float64")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        state = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_moments_are_those_of_each_expert_on_its_own_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["activations", *MODELS, "--tasks", "mine.py", "--submodule", "body", "--out", "moments"]) == 0
    told = capsys.readouterr().out
    assert "activations of one, two" in told
    for seed, name in enumerate(("one", "two")):
        x = torch.randn(90, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        state = load_file(folder / name / "model.safetensors")
        hidden = (x @ state["0.weight"].mT + state["0.bias"]).tanh()
        found = load_file(folder / "moments" / f"{name}.safetensors")
        torch.testing.assert_close(found["0.weight"].double(), x.mT @ x / 90, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["2.weight"].double(), hidden.mT @ hidden / 90, rtol=1e-5, atol=1e-6)
    assert run(["merge", *MODELS, "--residual-map", "Activation('moments')", "--out", "merged"]) == 0


def test_what_is_there_is_kept_on_request_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["activations", *MODELS, "--tasks", "mine.py", "--submodule", "body", "--out", "moments"]
    assert run(arguments) == 0
    (folder / "moments" / "two.safetensors").unlink()
    before = (folder / "moments" / "one.safetensors").stat().st_mtime_ns
    assert run(arguments) == 2
    assert "go on with it: --resume" in capsys.readouterr().err.replace("\n", " ")
    assert run([*arguments, "--resume"]) == 0
    assert "activations of two; from before: one" in capsys.readouterr().out
    assert (folder / "moments" / "one.safetensors").stat().st_mtime_ns == before
    (folder / "moments" / "two.safetensors").unlink()
    state = load_file(folder / "one" / "model.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, folder / "one" / "model.safetensors")
    assert run([*arguments, "--resume"]) == 2
    assert "the activations of 'one' there are of other weights, batches" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("tasks", "error"),
    [("mine.py:few", "expert 'two' has no task; there are one"), ("mine.py:empty", "no batches")],
)
def test_bad_tasks_are_one_error(tasks: str, error: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["activations", *MODELS, "--tasks", tasks, "--submodule", "body", "--out", "moments"]) == 2
    assert error in capsys.readouterr().err.replace("\n", " ")


def test_a_limit_of_files_is_one_error_and_the_run_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["activations", *MODELS, "--tasks", "mine.py", "--submodule", "body", "--out", "moments"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        assert run(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "one.safetensors would be larger than files may be here" in capsys.readouterr().err
    assert [path.name for path in Path("moments").iterdir()] == ["activations.json"]
    assert run([*command, "--resume"]) == 0
