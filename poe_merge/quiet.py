"""``--quiet``: errors and warnings only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar

_QUIET = ContextVar("quiet", default=False)


@contextmanager
def quietly(quiet: bool, *, but_stdout: bool) -> Iterator[None]:
    """Print errors and warnings only, without progress bars.

    Args:
        quiet: Whether to.
        but_stdout: Leave standard output as it is.

    Yields:
        Nothing.
    """
    token = _QUIET.set(quiet)
    try:
        with redirect_stdout(io.StringIO()) if quiet and not but_stdout else nullcontext():
            yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether nothing but errors and warnings is printed."""
    return _QUIET.get()
