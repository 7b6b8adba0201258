"""Corruptions of a suite's inputs: what a comparison under shift shows to the merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Corruptions:
    """Kinds of corruption, each at three severities.

    Args:
        kinds: Names of the kinds.
        levels: The severities 1, 2 and 3 in words.
        about: What they are, with the source.
        corrupted: Maps a split, a kind, a severity and a seed to a split of as many examples.
    """

    kinds: tuple[str, ...]
    levels: tuple[str, str, str]
    about: str
    corrupted: Callable[[Any, Any, int, int], Any]
