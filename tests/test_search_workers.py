"""Two processes on one study at the same time, and one that dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import save_file

from inference.models.design import Design
from inference.search import DesignSpace, ModelMerges, Range, Searched, search
from poe_models import Anchor, Gaussian, InputGram, ProductOfExperts, RelativePrecision, TaskVectors
from tests.seeds import seeded

ROOT = Path(__file__).parent.parent
TRIALS = 16
WORKER = """
import json, os, signal, sys, time
from inference.models.design import Design
from inference.search import DesignSpace, ModelMerges, Range, Searched, search
from poe_models import Anchor, Gaussian, InputGram, ProductOfExperts, RelativePrecision, TaskVectors

folder, number, dies = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
vectors = TaskVectors(f"{folder}/base.safetensors", {name: f"{folder}/{name}.safetensors" for name in "ab"})

def make(eta):
    anchor = Anchor(precision=RelativePrecision(eta))
    return Design(ProductOfExperts.of(vectors.names, InputGram(), Gaussian(), anchor=anchor))

def score(state):
    time.sleep(0.1)
    calls.append(1)
    if dies and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return float((state["layers.0.weight"] - 1).square().sum())

calls = []
space = DesignSpace(make, {"eta": Searched(Range(1e-3, 1e2, log=True))})
storage = f"sqlite:///{folder}/study.db"
print("ready", flush=True)
sys.stdin.readline()
found = search(
    space, score, ModelMerges(vectors), trials=16, minimize=True, sampler="random", storage=storage, worker=number
)
told = {"best": found.values, "score": found.score, "etas": [t.values["eta"] for t in found.trials], "own": len(calls)}
print(json.dumps(told))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = torch.randn(5, 4, generator=seeded(0))
    save_file({"layers.0.weight": base}, tmp_path / "base.safetensors")
    for number, name in enumerate("ab", start=1):
        save_file(
            {"layers.0.weight": base + 0.1 * torch.randn(5, 4, generator=seeded(number))},
            tmp_path / f"{name}.safetensors",
        )
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A worker that has everything imported and waits for a line."""
    command = [sys.executable, str(folder / "worker.py"), str(folder), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_workers_share_one_study(folder: Path) -> None:
    workers = [started(folder, number) for number in ("0", "1")]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    ended = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [errors for _, errors in ended]
    found = [json.loads(out) for out, _ in ended]
    assert min(each["own"] for each in found) >= 3  # both took their part
    last = max(found, key=lambda each: len(each["etas"]))
    assert TRIALS <= len(last["etas"]) <= TRIALS + 1  # the other worker's last trial was on its way
    assert sum(each["own"] for each in found) == len(last["etas"])
    assert len(set(last["etas"])) >= len(last["etas"]) - 1  # proposals differ, but for the first, of both


def test_a_worker_that_dies_leaves_the_study_to_the_other(folder: Path) -> None:
    dying, other = started(folder, "0", "dies"), started(folder, "1")
    for worker in (dying, other):
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    out, errors = other.communicate(timeout=120)
    dying.communicate(timeout=120)
    assert dying.returncode == -9
    assert other.returncode == 0, errors
    found = json.loads(out)
    assert TRIALS <= len(found["etas"]) <= TRIALS + 1
    assert found["own"] >= TRIALS - 2


@pytest.mark.parametrize("moment", ["user_attrs", "get_trials"])
def test_a_study_that_another_worker_begins_meanwhile_is_the_same(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = TaskVectors(f"{folder}/base.safetensors", {name: f"{folder}/{name}.safetensors" for name in "ab"})

    def make(eta: float) -> Design:
        return Design(
            ProductOfExperts.of("ab", InputGram(), Gaussian(), anchor=Anchor(precision=RelativePrecision(eta)))
        )

    def found(trials: int, worker: int) -> int:
        space = DesignSpace(make, {"eta": Searched(Range(1e-3, 1e2, log=True))})
        storage = f"sqlite:///{folder}/study.db"
        return len(search(space, size, ModelMerges(vectors), trials=trials, storage=storage, worker=worker).trials)

    def size(state: dict[str, torch.Tensor]) -> float:
        return float(state["layers.0.weight"].square().sum())

    read = getattr(optuna.Study, moment)
    read = read.fget if isinstance(read, property) else read

    def and_another_begins(study: optuna.Study, *arguments: object, **named: object) -> object:
        """The first answer is of a moment at which the other worker had not begun; it has when the second is given."""
        answer = read(study, *arguments, **named)
        monkeypatch.setattr(optuna.Study, moment, property(read) if moment == "user_attrs" else read)
        assert found(2, worker=0) == 2
        return answer

    replaced = property(and_another_begins) if moment == "user_attrs" else and_another_begins
    monkeypatch.setattr(optuna.Study, moment, replaced)
    assert found(4, worker=1) == 4
