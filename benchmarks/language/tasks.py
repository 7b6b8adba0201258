"""Four tasks: is a text positive or negative, in film reviews, product reviews, tweets and newspaper editorials.

Twenty people rated each text between -4 and 4 (Hutto and Gilbert, 2014, VADER, ICWSM); the label is the sign of their
mean. Texts of one review go to one split.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.archives import fetch, read_members
from benchmarks.language.sources import SENTIMENT, cache_folder

FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}
TASKS = tuple(FILES)
SPLITS = ("test", "head", "train")


@dataclass(frozen=True)
class SplitSizes:
    """How many texts each split has at most.

    Args:
        test: Texts to judge by.
        shots: Texts of each class that the frozen head is fitted to.
        train: Texts to fine-tune on.
        seed: Of the order that everything is drawn in.
    """

    test: int = 800
    shots: int = 32
    train: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """Texts and their labels.

    Args:
        texts: Of n texts.
        labels: (n,) int64, 1 for positive.
    """

    texts: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


def load_tasks(sizes: SplitSizes | None = None, cache: Path | None = None) -> dict[str, dict[str, Split]]:
    """Every task's splits.

    Args:
        sizes: How many texts; default `SplitSizes()`.
        cache: Cache folder; default `cache_folder()`.

    Returns:
        Task name to the split of each name in `SPLITS`.

    Raises:
        MissingSourceError: If the archive is not there and cannot be downloaded.
    """
    archive = fetch(SENTIMENT, cache or cache_folder())
    (inner,) = read_members(archive, "additional_resources/hutto_ICWSM_2014.tar.gz")
    tables = _tables(inner)
    return {task: split(*parsed(tables[file]), sizes or SplitSizes()) for task, file in FILES.items()}


def parsed(table: str) -> tuple[list[str], list[str], Tensor]:
    r"""Groups, texts and labels of a table: identifier, mean rating and text, separated by tabs.

    Args:
        table: Its contents.

    Returns:
        What each text was cut from, its text, and its label; ratings of exactly zero are left out.

    >>> parsed("1_1\t-0.9\tno picture\n1_2\t0.0\tbought it\n2\t3.1\tlove it\n")
    (['1', '2'], ['no picture', 'love it'], tensor([0, 1]))
    """
    rows = [line.split("\t", 2) for line in table.splitlines() if line.strip()]
    rated = [(key.split("_")[0], text.strip(), float(rating)) for key, rating, text in rows if float(rating)]
    groups, texts, ratings = zip(*rated, strict=True)
    return list(groups), list(texts), (torch.tensor(ratings) > 0).long()


def split(groups: list[str], texts: list[str], labels: Tensor, sizes: SplitSizes) -> dict[str, Split]:
    """Disjoint splits; whole groups are taken in a random order, the test set first.

    Args:
        groups: What may not straddle splits.
        texts: The texts.
        labels: Their labels.
        sizes: How many of each.

    Returns:
        The splits by name.

    Raises:
        ValueError: If a class has too few texts for the head.
    """
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(sizes.seed)).tolist()
    rank = {names[place]: position for position, place in enumerate(order)}
    rows = sorted(range(len(texts)), key=lambda row: (rank[groups[row]], row))
    test, rest = _cut(rows, groups, sizes.test)
    head = [row for label in (0, 1) for row in [r for r in rest if int(labels[r]) == label][: sizes.shots]]
    if len(head) < 2 * sizes.shots:
        raise ValueError(f"`split`: {len(head)} texts for {sizes.shots} of each class. Lower `shots` or `test`.")
    used = {groups[row] for row in head}
    train = [row for row in rest if groups[row] not in used][: sizes.train]
    chosen = {"test": test, "head": head, "train": train}
    return {name: Split(tuple(texts[row] for row in taken), labels[taken]) for name, taken in chosen.items()}


def _cut(rows: list[int], groups: list[str], count: int) -> tuple[list[int], list[int]]:
    """The first `count` rows, less the group that would be cut; and the rows of other groups."""
    following = {groups[row] for row in rows[count:]}
    taken = [row for row in rows[:count] if groups[row] not in following]
    left = {groups[row] for row in taken}
    return taken, [row for row in rows if groups[row] not in left]


def _tables(inner: bytes) -> dict[str, str]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is not None and Path(entry.name).name in FILES.values():
                found[Path(entry.name).name] = content.read().decode("utf-8", errors="replace")
    return found
