"""Disks that are full, or fail otherwise, while a merge writes."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from inference.models import staging as output_module
from inference.models import staging as staging_module
from inference.models.merge import OutputError, merge_checkpoint, plan
from poe_models import TaskVectors
from tests.streaming.toys import State, contents, poe


def test_too_little_space_is_found_before_anything_is_written(models: Any, out: Path, monkeypatch: Any) -> None:
    vectors = models()
    needed = plan(vectors, poe(vectors)).disk_bytes
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage)
    before = contents(out.parent)
    with pytest.raises(
        OutputError, match="the merge needs .* (bytes|.B) in .*, where .* (bytes|.B) are free. Free some space"
    ):
        merge_checkpoint(vectors, poe(vectors), out)
    assert contents(out.parent) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_disk_that_fills_up(error: Exception, at: int, uninterrupted: Any, out: Path, monkeypatch: Any) -> None:
    vectors, whole = uninterrupted
    saved = 0

    def save(tensors: State, path: Path, metadata: Any = None) -> None:
        nonlocal saved
        saved += 1
        if saved == at + 1:
            Path(path).write_bytes(b"half a file")
            raise error
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "save_file", save)
        with pytest.raises(
            OutputError, match="the disk of .*out.partial.* is full. Free some space and go on with `--resume`"
        ):
            merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000)
    assert not out.exists()
    assert not list(out.with_name("out.partial").rglob("*.tmp"))
    merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True)
    assert contents(out) == whole


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(models: Any, out: Path, monkeypatch: Any) -> None:
    def save(tensors: State, path: Path, metadata: Any = None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    vectors = models()
    monkeypatch.setattr(staging_module, "save_file", save)
    with pytest.raises(OutputError, match=r"out.partial.* may not be written by this user. Make it writable and go on"):
        merge_checkpoint(vectors, poe(vectors), out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_fills_up(small_disk: Path, tmp_path: Path, monkeypatch: Any, generator: Any) -> None:
    base = {f"{i}.weight": torch.randn(50, 50, generator=generator) for i in range(6)}
    vectors = TaskVectors(base, {"a": {k: w + torch.randn(50, 50, generator=generator) for k, w in base.items()}})
    with pytest.raises(OutputError, match="the merge needs"):
        merge_checkpoint(vectors, poe(vectors), small_disk / "out", batch_bytes=1)
    assert list(small_disk.iterdir()) == []
    monkeypatch.setattr("inference.models.merge.check_space", lambda folder, needed: None)
    with pytest.raises(OutputError, match="is full"):
        merge_checkpoint(vectors, poe(vectors), small_disk / "out", batch_bytes=1)
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    report = merge_checkpoint(vectors, poe(vectors), small_disk / "out", batch_bytes=1, resume=True)
    assert report.resumed_batches > 0
    merge_checkpoint(vectors, poe(vectors), tmp_path / "whole", batch_bytes=1)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")
