"""Disjoint splits of a pool of examples, and the tasks of a suite that can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import torch
from torch import Tensor

from benchmarks.archives import MissingSourceError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sizes:
    """How many examples each split may have.

    Args:
        test: At most this many, and at most a fifth of the pool.
        validation: At most this many, and at most a seventh of the pool.
        shots: Examples per class for the few-shot head, exactly.
        train: At most this many.
        seed: Seed of the permutation that everything is drawn from.
    """

    test: int
    validation: int
    shots: int
    train: int
    seed: int = 0


class Examples:
    """Base of the examples of one split, or of a whole task: a dataclass of tensors with a row for each."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def fields(cls) -> list[str]:
        """Names of the tensors."""
        return [each.name for each in fields(cls)]  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> Self:
        """The examples in these rows."""
        return type(self)(*(getattr(self, field)[rows] for field in self.fields()))


def split_rows(labels: Tensor, groups: Tensor, sizes: Sizes, official_test: Tensor | None = None) -> dict[str, Tensor]:
    """Rows of each split; whole groups go to one split.

    Groups are taken in a random order: the test set first, then validation, then the head's examples, then training.
    Other members of a group in the head set are left out.

    Args:
        labels: (n,) int64, each class at least once.
        groups: (n,) int64.
        sizes: How many.
        official_test: (n,) bool, the publisher's own test examples. Where there are any, tests are drawn from them
            alone and everything else from the others.

    Returns:
        Rows of the pool for each of `SPLITS`.

    Raises:
        ValueError: If a class has too few examples left for the head.
    """
    generator, n, classes = torch.Generator().manual_seed(sizes.seed), len(labels), int(labels.max()) + 1
    rank = torch.randperm(int(groups.max()) + 1, generator=generator)[groups]
    rest = torch.argsort(rank * n + torch.randperm(n, generator=generator))
    tests, others = rest, rest
    if official_test is not None and bool(official_test.any()):
        tests, others = rest[official_test[rest]], rest[~official_test[rest]]
    test = _whole_groups(groups, tests, min(sizes.test, n // 5))
    rest = _without_groups(groups, others, test)
    validation = _whole_groups(groups, rest, min(sizes.validation, n // 7))
    rest = _without_groups(groups, rest, validation)
    head = torch.cat([rest[labels[rest] == label][: sizes.shots] for label in range(classes)])
    if len(head) != sizes.shots * classes:
        raise ValueError(
            f"`split_rows`: {len(head)} examples left for {sizes.shots} of each of {classes} classes. "
            f"Lower `shots`, `test` or `validation`."
        )
    train = _without_groups(groups, rest, head)[: sizes.train]
    return {"test": test, "validation": validation, "head": head, "train": train}


def _whole_groups(groups: Tensor, rows: Tensor, count: int) -> Tensor:
    """The first `count` rows, less the group that would be cut."""
    if len(rows) <= count:
        return rows
    taken, following = rows[:count], groups[rows[count]]
    return taken[groups[taken] != following]


def _without_groups(groups: Tensor, rows: Tensor, taken: Tensor) -> Tensor:
    return rows[~torch.isin(groups[rows], groups[taken])]


def load_all(names: Iterable[str], load: Callable[[str], Made]) -> tuple[dict[str, Made], dict[str, str]]:
    """Every task that is in the cache, or whose archives are there or can be downloaded.

    Args:
        names: Of the tasks.
        load: One task by its name.

    Returns:
        The tasks by name, and for each skipped one the line that says why.
    """
    tasks, skipped = {}, {}
    for name in names:
        try:
            tasks[name] = load(name)
        except MissingSourceError as error:
            skipped[name] = f"task {name} is skipped: {error}"
    return tasks, skipped
