"""A task as disjoint splits of its examples, and its file in the cache."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.harness.splits import Examples
from benchmarks.harness.suite import SPLITS

Split = TypeVar("Split", bound=Examples, covariant=True)


@dataclass(frozen=True)
class Task(Generic[Split]):
    """One task.

    Args:
        name: One of its suite's.
        classes: Names of the classes.
        splits: Examples of each of `SPLITS`.
        duplicates: Copies left out.
        key: Hash of the archives' digests and the sizes; changes when the examples may change.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    duplicates: int
    key: str


def save_task(path: Path, task: Task[Examples]) -> None:
    """Write the splits of a task, whole or not at all."""
    tensors = {f"{name}.{field}": getattr(s, field) for name, s in task.splits.items() for field in s.fields()}
    metadata = {"classes": json.dumps(task.classes), "duplicates": str(task.duplicates)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".split-") as temporary:
        save_file(tensors, Path(temporary) / "task.safetensors", metadata=metadata)
        os.replace(Path(temporary) / "task.safetensors", path)


def read_task(path: Path, kind: type[Split], name: str, key: str) -> Task[Split]:
    """Read the file that ``save_task`` wrote, with splits of a kind."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    splits = {split: kind(*(tensors[f"{split}.{field}"] for field in kind.fields())) for split in SPLITS}
    return Task(name, tuple(json.loads(metadata["classes"])), splits, int(metadata["duplicates"]), key)
