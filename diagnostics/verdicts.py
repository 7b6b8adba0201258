"""What a diagnostic comes to, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from typing_extensions import override

__all__ = ["Level", "Verdict", "worst"]


class Level(IntEnum):
    """How much a verdict worries; a larger one is worse."""

    GOOD = 0
    UNKNOWN = 1
    CAUTION = 2
    BAD = 3


@dataclass(frozen=True)
class Verdict:
    """A judgement of one diagnostic.

    Attributes:
        about: what was judged.
        level: how it came out.
        text: a sentence with the numbers behind it, and what to do if it is not good.

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
