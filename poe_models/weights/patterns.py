"""Untrusted regular expressions, compiled in bounded memory and matched in bounded time.

A pattern such as ``(a+)+b`` takes time exponential in the length of a name, and to compile ``a{1000000000}`` takes all
memory; the rules in a folder's record and an adapter's ``rank_pattern`` may be anything. Every pattern has a budget
over all names that it is tried on, and a longest length with its repeats written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from time import thread_time
from typing import Any

import regex

LONGEST = 10_000
"""Most characters of a pattern, also with its repeats written out."""
SECONDS, PER_NAME = 1.0, 1e-4
"""Processor time that a pattern may take at first, and the further time that it earns with every name."""
_REPEAT = re.compile(r"([)}]?)\s*\{((?:[0-9\s]|#[^\n]*\n)*)")  # in verbose patterns with spaces and comments in it
_COMMENT = re.compile(r"#[^\n]*\n|\s")


class PatternError(ValueError):
    """A regular expression that cannot be read, or takes too long; the message says which and why."""


class Pattern:
    r"""A regular expression with a budget of time.

    Args:
        text: The expression, as :mod:`re` has it.
        frame: What it is compiled in, with ``{}`` in its place; messages have the expression alone.

    Raises:
        PatternError: If it is none, or longer than 10,000 characters with its repeats written out.

    >>> Pattern(r"mlp\.\d").search("layers.0.mlp.1.weight")
    True
    """

    def __init__(self, text: str, frame: str = "{}") -> None:
        self._text, self._left = text, SECONDS
        if len(text) > LONGEST:
            raise PatternError(f"a regular expression of {len(text):,} characters. Write one of at most {LONGEST:,}.")
        if _written_out(text) > LONGEST:
            raise PatternError(
                f"the regular expression {self._short()!r} has more than {LONGEST:,} characters with its repeats, such "
                "as {1000}, written out. Write smaller numbers, or an open repeat such as + or {1,}."
            )
        try:
            self._compiled = regex.compile(frame.replace("{}", text))
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            reason = error.msg if isinstance(error, regex.error) else error  # without a place, which is the frame's
            raise PatternError(f"{text!r}: not a regular expression ({reason}).") from error

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
            raise PatternError(
                f"the regular expression {self._short()!r} takes too long on names such as {name[:100]!r}. Write it "
                "without nested repeats."
            ) from error
        finally:
            spent = thread_time() - began
            self._left = max(PER_NAME, min(SECONDS, self._left + PER_NAME - spent))

    def _short(self) -> str:
        return self._text if len(self._text) < 100 else f"{self._text[:100]}..."


def _written_out(text: str) -> float:
    r"""At least as many characters as a pattern has when every repeat stands there as often as it must fit.

    Repeats of groups may be nested, and multiply; other repeats are of one character or class, and add up. Whatever
    looks like a repeat counts as one, in classes, comments and after a backslash too, so that none can be hidden.

    >>> _written_out(r"ab{3}"), _written_out("(?:(?:ab){2}c){3}"), _written_out(r"\d{1,9}")
    (8.0, 102.0, 8.0)
    """
    groups, others = [1.0], [float(len(text))]
    for before, count in _REPEAT.findall(text):
        grouped = before or "#" in text  # a comment may stand between a group and its repeat
        (groups if grouped else others).append(max(1.0, float(_COMMENT.sub("", count) or 0)))
    return sum(others) * math.prod(groups)


@lru_cache(maxsize=1024)
def pattern(text: str, frame: str = "{}") -> Pattern:
    """The pattern of a text, made once; for the frame see :class:`Pattern`.

    Raises:
        PatternError: If it is no regular expression.
    """
    return Pattern(text, frame)
