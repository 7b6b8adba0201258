"""Verdicts of diagnostics: a level and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from typing_extensions import override


class Level(IntEnum):
    """Severity of a verdict; a larger one is worse. A note is a finding that is neither good nor bad."""

    NOTE = 0
    GOOD = 1
    UNKNOWN = 2
    CAUTION = 3
    BAD = 4


@dataclass(frozen=True)
class Verdict:
    """A judgement of one diagnostic.

    Attributes:
        about: Name of the diagnostic.
        level: Severity.
        text: Sentence with the numbers behind it, and advice if it is not good.

    >>> print(Verdict("divergences", Level.GOOD, "No divergent transitions."))
    good: divergences: No divergent transitions.
    """

    about: str
    level: Level
    text: str

    @override
    def __str__(self) -> str:
        return f"{self.level.name.lower()}: {self.about}: {self.text}"
