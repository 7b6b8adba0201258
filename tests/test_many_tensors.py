"""Checkpoints of very many small tensors: the work for each does not grow with their number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from inference.models import folder
from poe_merge.cli import run

WORDS = ["--base-model", "base", "--model", "a=a", "--model", "b=b", "--method", "ties"]


def save(where: Path, count: int, generator: torch.Generator, ties: int = 0) -> None:
    """A base with further names of `ties` of its tensors, and two experts."""
    base = {f"layers.{i}.fc.weight": torch.eye(2) * (1 + i % 7) for i in range(count)}
    for name in ("base", "a", "b"):
        state = {k: w if name == "base" else w + 0.1 * torch.randn(2, 2, generator=generator) for k, w in base.items()}
        (where / name).mkdir()
        tied = {f"head.{i}.weight": f"layers.{i}.fc.weight" for i in range(ties)}
        save_file(state, where / name / "model.safetensors", metadata={"format": "pt", **tied})


def calls_of(work: Callable[[], object]) -> int:
    """Number of calls of Python functions."""
    count = 0

    def counted(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_the_work_for_a_tensor_does_not_grow_with_their_number(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    opened: list[str] = []

    def counted(path: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *args, **options)

    real = safetensors.safe_open
    for module in ("poe_models.weights.weight_files", "inference.models.staging"):
        monkeypatch.setattr(f"{module}.safe_open", counted)
    found, files = {}, {}
    for count in (100, 400, 1600):
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        save(Path.cwd(), count, generator, ties=count // 2)
        out = ["--out", "merged"] if command == "merge" else []
        opened.clear()
        found[count] = calls_of(lambda out=out: run([command, *WORDS, *out]))  # type: ignore[misc]
        files[count] = len(opened)
        assert not out or len(load_file("merged/model.safetensors")) == count
    assert len(set(files.values())) == 1
    assert files[100] < 30
    more, many_more = found[400] - found[100], found[1600] - found[400]  # what 300 and what 1200 tensors take
    assert many_more < 4.2 * more


def test_files_of_too_many_tensors_are_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    save(tmp_path, 40, generator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "_HEADER_BYTES", 20 * 125)  # a tensor takes 100 and its name
    assert run(["merge", *WORDS, "--out", "merged"]) == 0
    parts = sorted(Path("merged").glob("*.safetensors"))
    assert [len(load_file(part)) for part in parts] == [20, 20]
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    assert run(["merge", "--base-model", "merged", "--model", "a=a", "--out", "again"]) == 0
