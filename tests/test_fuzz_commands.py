"""A bounded fuzzer of the commands that judge and search, and of the arrays and tables that they read."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from poe_merge.cli import run

MODULE = """
import torch
from inference import Task

def network(base):
    return torch.nn.Linear(4, 3)

def tasks():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)
    return [Task(name, [batch]) for name in ("one", "two")]
"""
SCORED = "base_model: base\nmodels:\n- {model: base, name: base}\n- {model: merged}\nexperts: {one: one, two: two}\n"
SEARCHED = "base_model: base\nmodels: [{model: one}, {model: two}]\nparameters:\n  scaling: {low: 0.5, high: 1.5}\n"
MODELS = ("--base-model", "base", "--model", "one", "--model", "two")
TASKS = ("--tasks", "mine.py")
CASES = 8
Complaint = Callable[[list[str]], str | None]


@pytest.fixture
def complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], generator: torch.Generator
) -> Complaint:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "one", "two"):
        Path(name).mkdir()
        state = {"weight": torch.randn(3, 4, generator=generator), "bias": torch.randn(3, generator=generator)}
        save_file(state, f"{name}/model.safetensors")
    Path("mine.py").write_text(MODULE)
    assert run(["merge", *MODELS, "--out", "merged"]) == 0
    capsys.readouterr()

    def found(arguments: list[str]) -> str | None:
        try:
            status = run(arguments)
        except BaseException as error:
            return f"{arguments}: {type(error).__name__} came through: {error}"
        err = capsys.readouterr().err
        fine = status == 0 or (status == 2 and err.count("error:") == 1)
        harmless = all(line.isprintable() for line in err.split("\n")) and "Traceback" not in err
        return None if fine and harmless else f"{arguments}: status {status}: {err[-300:]}"

    return found


def flipped(content: bytes, chosen: random.Random) -> bytes:
    """Some bytes changed, or the end cut off."""
    changed = bytearray(content)
    for _ in range(chosen.choice([1, 3, 9])):
        changed[chosen.randrange(len(changed))] = chosen.randrange(256)
    return bytes(changed[: chosen.randrange(len(changed))] if chosen.random() < 0.2 else changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("text", "command"),
    [
        (SCORED + "num_resamples: 20\n", ("evaluate", "c.yaml", *TASKS)),
        (SCORED, ("score", "c.yaml", *TASKS)),
        (SEARCHED, ("search", "c.yaml", *TASKS, "--trials", "1", "--sampler", "random", "--out", "OUT")),
        (SEARCHED, ("activations", "c.yaml", *TASKS, "--out", "OUT")),
    ],
    ids=["evaluate", "score", "search", "activations"],
)
def test_damaged_configurations(text: str, command: tuple[str, ...], complaint: Complaint) -> None:
    chosen = random.Random(0)
    texts = [flipped(text.encode(), chosen) for _ in range(CASES)]
    texts += [text.replace(old, new).encode() for old, new in (("base", "[]"), ("one", "{}"), ("two", ".nan"))]
    found = []
    for number, content in enumerate([b"", b"\xff", b"[" * 5000, b"a: &a\n  b: *a\n", *texts]):
        Path("c.yaml").write_bytes(content)
        found.append(complaint([word.replace("OUT", f"out{number}") for word in command]))
    assert not any(found), "\n".join(filter(None, found))


LABELS, TABLE = np.arange(12) % 2, np.full((12, 2), 0.5)
ODD = {
    **{
        f"labels {kind}": (LABELS.astype(kind), TABLE) for kind in ("u2", "u8", "U1", "S1", "M8[s]", "c16", "f2", ">i8")
    },
    **{f"table {kind}": (LABELS, TABLE.astype(kind)) for kind in ("f2", "g", "c16", "U3", "O", ">f8", "M8[s]", "?")},
    "no rows": (LABELS[:0], TABLE[:0]),
    "one axis": (LABELS, TABLE[:, 0]),
    "no class": (LABELS, TABLE[:, :0]),
    "other rows": (LABELS, TABLE[:5]),
    "huge labels": (LABELS.astype(np.uint64) + np.uint64(2**63), TABLE),
    "objects": (np.array([{}] * 12, dtype=object), TABLE),
    "not finite": (LABELS, TABLE * np.nan),
}


@pytest.mark.filterwarnings("ignore")
def test_odd_predictions(complaint: Complaint) -> None:
    command = ["diagnose", "merged", "--no-tails", "--surrogates", "0", "--predictions", "p.npz", "--out", "r.html"]
    files = []
    for labels, table in [*ODD.values(), (LABELS, TABLE)]:
        file = io.BytesIO()
        np.savez(file, **{"labels/task": labels, "probabilities/task/method": table})
        files.append(file.getvalue())
    chosen, found = random.Random(0), []
    for content in [*files, b"", b"PK\3\4", *(flipped(files[-1], chosen) for _ in range(CASES))]:
        Path("p.npz").write_bytes(content)
        found.append(complaint(command))
    assert not any(found), "\n".join(filter(None, found))
