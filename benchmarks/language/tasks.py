"""The six tasks as disjoint splits of tokens, made once by seed and cached as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.archives import fetch
from benchmarks.folders import key_of
from benchmarks.harness.splits import load_all, split_rows
from benchmarks.harness.suite import SPLITS
from benchmarks.language.sources import MINILM, cache_folder
from benchmarks.language.texts import READERS
from benchmarks.language.tokens import MOST_TOKENS, published_tokenizer, tokenized

TASKS = tuple(READERS)
FIELDS = ("tokens", "lengths", "labels", "index", "groups")
VERSION = 1  # raise it when the meaning of a cached file changes


@dataclass(frozen=True)
class SplitSizes:
    """How many texts each split may have.

    Args:
        test: At most this many, and at most a fifth of the pool.
        validation: At most this many, and at most a seventh of the pool.
        shots: Texts per class for the few-shot head, exactly.
        train: At most this many.
        seed: Seed of the permutation that everything is drawn from.
    """

    test: int = 800
    validation: int = 300
    shots: int = 24
    train: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """Texts of one split, or of a whole task.

    Args:
        tokens: (n, longest) int16, zero behind a text's end.
        lengths: (n,) int64, in tokens.
        labels: (n,) int64.
        index: (n,) int64, rows of what the archive holds.
        groups: (n,) int64, what may not straddle splits.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    index: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Self:
        """The texts in these rows."""
        return type(self)(*(getattr(self, field)[rows] for field in FIELDS))

    def without_duplicates(self) -> Self:
        """The first of texts that are the same to the network, whatever their labels: no split can hold a copy."""
        first: dict[bytes, int] = {}
        for row, tokens in enumerate(self.tokens.numpy()):
            first.setdefault(tokens.tobytes(), row)
        return self.take(torch.tensor(sorted(first.values())))


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: One of `TASKS`.
        classes: Names of the classes.
        splits: One `Split` for each of `SPLITS`.
        duplicates: Copies left out.
        key: Hash of the archives' digests and the sizes; changes when the examples may change.
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
        sizes: How its texts are split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The task.

    Raises:
        MissingSourceError: If neither its splits nor the archives are there, and these cannot be downloaded.
    """
    sizes, cache = sizes or SplitSizes(), cache or cache_folder()
    source, reader = READERS[name]
    key = key_of(VERSION, name, MOST_TOKENS, MINILM.sha256, source.sha256, asdict(sizes))
    path = cache / "tasks" / f"{name}-{key}.safetensors"
    if not path.exists():
        found = reader(fetch(source, cache))
        whole = Split(
            *tokenized(published_tokenizer(cache), found.texts),
            found.labels,
            torch.arange(len(found.labels)),
            found.groups,
        )
        kept = whole.without_duplicates()
        splits = {split: kept.take(rows) for split, rows in split_rows(kept.labels, kept.groups, sizes).items()}
        _save(path, Task(name, found.classes, splits, len(whole) - len(kept), key))
    return _load(path, name, key)


def _save(path: Path, task: Task) -> None:
    tensors: dict[str, Tensor] = {}
    for name, split in task.splits.items():
        tensors |= {f"{name}.{field}": getattr(split, field) for field in FIELDS}
    metadata = {"classes": json.dumps(task.classes), "duplicates": str(task.duplicates)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".split-") as temporary:
        save_file(tensors, Path(temporary) / "task.safetensors", metadata=metadata)
        os.replace(Path(temporary) / "task.safetensors", path)


def _load(path: Path, name: str, key: str) -> Task:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    splits = {split: Split(*(tensors[f"{split}.{field}"] for field in FIELDS)) for split in SPLITS}
    return Task(name, tuple(json.loads(metadata["classes"])), splits, int(metadata["duplicates"]), key)


def load_tasks(sizes: SplitSizes | None = None, cache: Path | None = None) -> tuple[dict[str, Task], dict[str, str]]:
    """Every task that is in the cache, or whose archives are there or can be downloaded.

    Args:
        sizes: How texts are split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The tasks by name, and for each skipped one the line that says why.
    """
    return load_all(TASKS, lambda name: load_task(name, sizes, cache))
