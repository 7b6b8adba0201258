"""The four tasks as disjoint splits of uint8 images, made once by seed and cached as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.archives import fetch
from benchmarks.harness.splits import load_all, split_rows
from benchmarks.harness.suite import SPLITS
from benchmarks.vision.pools import READERS, Pool, without_duplicates
from benchmarks.vision.sources import cache_folder

TASKS = tuple(READERS)
VERSION = 1  # raise it when the meaning of a cached file changes


@dataclass(frozen=True)
class SplitSizes:
    """How many images each split may have.

    Args:
        test: At most this many, and at most a fifth of the pool.
        validation: At most this many, and at most a seventh of the pool.
        shots: Images per class for the few-shot head, exactly.
        train: At most this many.
        seed: Seed of the permutation that everything is drawn from.
    """

    test: int = 1000
    validation: int = 300
    shots: int = 5
    train: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class Split:
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

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """The images in these rows."""
        return Split(self.images[rows], self.labels[rows], self.index[rows], self.groups[rows])


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: One of `TASKS`.
        classes: Names of the classes.
        splits: One `Split` for each of `SPLITS`.
        duplicates: Exact copies left out of the pool.
        key: Hash of the archive's digest and the sizes; changes when the examples may change.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    duplicates: int
    key: str


def load_task(name: str, sizes: SplitSizes | None = None, cache: Path | None = None) -> Task:
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
        _save(path, pool, split_rows(pool.labels, pool.groups, sizes, pool.official_test))
    return _load(path, name, key)


def _save(path: Path, pool: Pool, rows: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    for split, index in rows.items():
        fields = {"images": pool.images[index], "labels": pool.labels[index], "groups": pool.groups[index]}
        tensors |= {f"{split}.{field}": value for field, value in {**fields, "index": index}.items()}
    metadata = {"classes": json.dumps(pool.classes), "duplicates": str(pool.duplicates)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".split-") as temporary:
        save_file(tensors, Path(temporary) / "task.safetensors", metadata=metadata)
        os.replace(Path(temporary) / "task.safetensors", path)


def _load(path: Path, name: str, key: str) -> Task:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        splits = {
            split: Split(*(file.get_tensor(f"{split}.{field}") for field in ("images", "labels", "index", "groups")))
            for split in SPLITS
        }
    return Task(name, tuple(json.loads(metadata["classes"])), splits, int(metadata["duplicates"]), key)


def load_tasks(sizes: SplitSizes | None = None, cache: Path | None = None) -> tuple[dict[str, Task], dict[str, str]]:
    """Every task whose archive is in the cache or can be downloaded.

    Args:
        sizes: How pools are split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The tasks by name, and for each skipped one the line that says why.
    """
    return load_all(TASKS, lambda name: load_task(name, sizes, cache))
