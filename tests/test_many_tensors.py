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
from torch import Tensor

from inference.models import folder
from poe_merge.cli import run
from poe_models import CheckpointError, TaskVectors
from poe_models.methods.selection import joined, magnitude_thresholds
from poe_models.weights.together import averages_of, modules_of

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
    for module in ("poe_models.weights.weight_files", "inference.models.parts"):
        monkeypatch.setattr(f"{module}.safe_open", counted)
    found, files = {}, {}
    for count in (20, 100, 400, 1600):  # the first imports what the command needs
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        save(Path.cwd(), count, generator, ties=count // 2)
        out = ["--out", "merged"] if command == "merge" else []
        opened.clear()
        found[count] = calls_of(lambda out=out: run([command, *WORDS, *out]))  # type: ignore[misc]
        files[count] = len(opened)
        assert not out or len(load_file("merged/model.safetensors")) == count
    assert len({files[count] for count in (100, 400, 1600)}) == 1
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_tensors_read_together_are_those_read_one_by_one(dtype: torch.dtype, generator: torch.Generator) -> None:
    def models(shift: float) -> dict[str, Tensor]:
        shapes = {"fc.weight": (4, 6), "in_proj_weight": (12, 4), "conv.weight": (4, 2, 3, 3), "norm.weight": (5,)}
        made = {
            f"{i}.{name}": torch.randn(shape, generator=generator) for i in range(3) for name, shape in shapes.items()
        }
        return {name: (each + shift).to(dtype) for name, each in made.items()}

    vectors = TaskVectors(models(0.0), {"a": models(0.1), "b": models(0.2)}, dtype=torch.float64)
    merged = sorted(
        (n for n, t in vectors.treatments.items() if t.action == "merge"), key=lambda n: n.partition(".")[2]
    )
    for name, read in zip(merged, modules_of(vectors, merged), strict=True):
        for one, other in zip(vectors.modules(name), read, strict=True):
            assert (one.name, one.tensor, one.names) == (other.name, other.tensor, other.names)
            assert torch.equal(one.base, other.base)
            assert torch.equal(one.updates, other.updates)
    names = [n for n, t in vectors.treatments.items() if t.action == "average"]
    for name, value in zip(names, averages_of(vectors, names, (0.3, 0.7), 0.9), strict=True):
        assert torch.equal(value, vectors.average(name, (0.3, 0.7), 0.9))


def test_a_value_that_is_not_finite_among_many_is_named(generator: torch.Generator) -> None:
    base = {f"{i}.weight": torch.randn(4, 4, generator=generator) for i in range(5)}
    tuned = {name: each + 0.1 for name, each in base.items()}
    tuned["3.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"expert 'a': tensor '3\.weight' has 1 values"):
        list(modules_of(TaskVectors(base, {"a": tuned}), list(base)))


def test_thresholds_of_many_small_modules_are_those_of_one(generator: torch.Generator) -> None:
    whole = torch.randn(3, 200_000, generator=generator)
    for density in (0.1, 0.5, 1.0):
        apart = magnitude_thresholds(lambda: whole.split(7, dim=1), density)
        assert apart == magnitude_thresholds(lambda: [whole], density)
    assert torch.equal(torch.cat(list(joined(whole.split(7, dim=1))), 1), whole)
    assert sum(1 for _ in joined(whole.split(7, dim=1))) < 5
