"""The six tasks as disjoint splits of tokens, made once by seed and cached as safetensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from benchmarks.archives import fetch
from benchmarks.folders import key_of
from benchmarks.harness.splits import Examples, Sizes, load_all, split_rows
from benchmarks.harness.task_files import Task, read_task, save_task
from benchmarks.language.sources import MINILM, cache_folder
from benchmarks.language.texts import READERS
from benchmarks.language.tokens import MOST_TOKENS, published_tokenizer, tokenized

TASKS = tuple(READERS)
VERSION = 1  # raise it when the meaning of a cached file changes


@dataclass(frozen=True)
class SplitSizes(Sizes):
    """How many texts each split may have."""

    test: int = 800
    validation: int = 300
    shots: int = 24
    train: int = 2000


@dataclass(frozen=True)
class Split(Examples):
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

    def without_duplicates(self) -> Self:
        """The first of texts that are the same to the network, whatever their labels: no split can hold a copy."""
        first: dict[bytes, int] = {}
        for row, tokens in enumerate(self.tokens.numpy()):
            first.setdefault(tokens.tobytes(), row)
        return self.take(torch.tensor(sorted(first.values())))


def load_task(name: str, sizes: SplitSizes | None = None, cache: Path | None = None) -> Task[Split]:
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
        save_task(path, Task(name, found.classes, splits, len(whole) - len(kept), key))
    return read_task(path, Split, name, key)


def load_tasks(
    sizes: SplitSizes | None = None, cache: Path | None = None
) -> tuple[dict[str, Task[Split]], dict[str, str]]:
    """Every task that is in the cache, or whose archives are there or can be downloaded.

    Args:
        sizes: How texts are split; default `SplitSizes()`.
        cache: Cache folder; default `sources.cache_folder()`.

    Returns:
        The tasks by name, and for each skipped one the line that says why.
    """
    return load_all(TASKS, lambda name: load_task(name, sizes, cache))
