"""What a diagnostic comes to, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from typing_extensions import override

__all__ = ["Level", "Verdict", "worst"]


class Level(IntEnum):
    """How much a verdict worries; a larger one is worse. A note says what was found, which is neither good nor bad."""

    NOTE = 0
    GOOD = 1
    UNKNOWN = 2
    CAUTION = 3
    BAD = 4


@dataclass(frozen=True)
class Verdict:
    """A judgement of one diagnostic.

    Attributes:
        about: What was judged.
        level: How it came out.
        text: A sentence with the numbers behind it, and what to do if it is not good.

    >>> print(Verdict("divergences", Level.GOOD, "No divergent transitions."))
    good: divergences: No divergent transitions.
    """

    about: str
    level: Level
    text: str

    @override
    def __str__(self) -> str:
        return f"{self.level.name.lower()}: {self.about}: {self.text}"


def worst(verdicts: Iterable[Verdict]) -> Level:
    """The worst level among verdicts; good if there are none.

    >>> worst([Verdict("a", Level.GOOD, ""), Verdict("b", Level.CAUTION, "")]).name
    'CAUTION'
    """
    return max((verdict.level for verdict in verdicts), default=Level.GOOD)
