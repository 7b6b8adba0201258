"""Untrusted regular expressions, matched in bounded time.

A pattern such as ``(a+)+b`` takes time exponential in the length of a name; the rules in a folder's record and an
adapter's ``rank_pattern`` may be anything. Every pattern has a budget over all names that it is tried on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from time import thread_time
from typing import Any

import regex

LONGEST = 10_000
"""Most characters of a pattern."""
SECONDS, PER_NAME = 1.0, 1e-4
"""Processor time that a pattern may take at first, and the further time that it earns with every name."""


class PatternError(ValueError):
    """A regular expression that cannot be read, or takes too long; the message says which and why."""


class Pattern:
    r"""A regular expression with a budget of time.

    Args:
        text: The expression, as :mod:`re` has it.

    Raises:
        PatternError: If it is none, or longer than 10,000 characters.

    >>> Pattern(r"mlp\.\d").search("layers.0.mlp.1.weight")
    True
    """

    def __init__(self, text: str) -> None:
        self._text, self._left = text, SECONDS
        if len(text) > LONGEST:
            raise PatternError(f"a regular expression of {len(text):,} characters. Write one of at most {LONGEST:,}.")
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise PatternError(f"{text!r}: not a regular expression ({error}).") from error

    def search(self, name: str) -> bool:
        """Return whether a name has a part that fits.

        Raises:
            PatternError: If the pattern has used up its time.
        """
        return self._tried(self._compiled.search, name) is not None

    def groups(self, name: str) -> tuple[str | None, ...] | None:
        r"""Texts of the groups where a part of a name fits; None where none does. For the error see :meth:`search`.

        >>> Pattern(r"layers\.(\d+)").groups("layers.11.mlp")
        ('11',)
        """
        found = self._tried(self._compiled.search, name)
        return None if found is None else found.groups()

    def match(self, name: str) -> bool:
        """Return whether the start of a name fits; for the error see :meth:`search`."""
        return self._tried(self._compiled.match, name) is not None

    def _tried(self, how: Callable[..., Any], name: str) -> Any:
        """The match, or None, within the budget."""
        began = thread_time()
        try:
            return how(name, timeout=self._left, concurrent=False)
        except (TimeoutError, MemoryError, RecursionError) as error:
            short = self._text if len(self._text) < 100 else f"{self._text[:100]}..."
            raise PatternError(
                f"the regular expression {short!r} takes too long on names such as {name[:100]!r}. Write it without "
                "nested repeats."
            ) from error
        finally:
            spent = thread_time() - began
            self._left = max(PER_NAME, min(SECONDS, self._left + PER_NAME - spent))


@lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """The pattern of a text, made once.

    Raises:
        PatternError: If it is no regular expression.
    """
    return Pattern(text)
