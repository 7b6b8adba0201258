"""The four tasks as disjoint splits of uint8 images, made once by seed and cached as safetensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.archives import fetch
from benchmarks.harness.splits import Examples, Sizes, load_all, split_rows
from benchmarks.harness.task_files import Task, read_task, save_task
from benchmarks.vision.pools import READERS, without_duplicates
from benchmarks.vision.sources import cache_folder

TASKS = tuple(READERS)
VERSION = 1  # raise it when the meaning of a cached file changes


@dataclass(frozen=True)
class SplitSizes(Sizes):
    """How many images each split may have."""

    test: int = 1000
    validation: int = 300
    shots: int = 5
    train: int = 4000


@dataclass(frozen=True)
class Split(Examples):
    """Images of one split.

    Args:
        images: (n, channels, side, side) uint8.
        labels: (n,) int64.
        index: (n,) int64, rows of the task's pool.
        groups: (n,) int64, what may not straddle splits.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    groups: Tensor


def load_task(name: str, sizes: SplitSizes | None = None, cache: Path | None = None) -> Task[Split]:
    """One task, from the cache or from its archive.

    Args:
        name: One of `TASKS`.
        sizes: How the pool is split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The task.
    """
    sizes, cache = sizes or SplitSizes(), cache or cache_folder()
    source, reader = READERS[name]
    recipe = json.dumps({"sha256": source.sha256, "version": VERSION, **asdict(sizes)}, sort_keys=True)
    key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    path = cache / "tasks" / f"{name}-{key}.safetensors"
    if not path.exists():
        pool = without_duplicates(reader(fetch(source, cache)))
        whole = Split(pool.images, pool.labels, torch.arange(len(pool.labels)), pool.groups)
        rows = split_rows(pool.labels, pool.groups, sizes, pool.official_test)
        splits = {split: whole.take(index) for split, index in rows.items()}
        save_task(path, Task(name, pool.classes, splits, pool.duplicates, key))
    return read_task(path, Split, name, key)


def load_tasks(
    sizes: SplitSizes | None = None, cache: Path | None = None
) -> tuple[dict[str, Task[Split]], dict[str, str]]:
    """Every task whose archive is in the cache or can be downloaded.

    Args:
        sizes: How pools are split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The tasks by name, and for each skipped one the line that says why.
    """
    return load_all(TASKS, lambda name: load_task(name, sizes, cache))
