"""Modules of a batch by their names, in errors and warnings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from poe_models.precisions import NotPositiveDefiniteError

_SHOWN = 3


def module_label(modules: Sequence[str], module: int) -> str:
    """A module's name for messages, or its position where it has none.

    >>> module_label(["fc.weight"], 0), module_label([], 0)
    ("'fc.weight'", 'module 0 of the batch')
    """
    named = tuple(modules[module : module + 1]) not in ((), (str(module),))
    return repr(modules[module]) if named else f"module {module} of the batch"


def with_names(error: ValueError, names: Sequence[str]) -> ValueError:
    """An error about a module of a batch, its message with the module's name in the place of its position.

    Args:
        error: It may say "module 2 of the batch".
        names: Names of the modules of the batch.

    Returns:
        The same error about ``names[2]``.

    >>> with_names(ValueError("module 1 of the batch is not at a minimum"), ["a", "b"])
    ValueError("'b' is not at a minimum")
    """
    text = re.sub(r"module (\d+) of the batch", lambda found: module_label(names, int(found[1])), str(error))
    return ValueError(text)


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Name the module whose precision is not positive definite.

    Args:
        names: Names of the modules of the batch.

    Yields:
        Nothing.

    Raises:
        NotPositiveDefiniteError: If one is not.
    """
    try:
        yield
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(str(with_names(error, names))) from None


def not_drawn(modules: Sequence[str]) -> str:
    """Warning that some modules are left at the MAP, because no update changes them.

    Args:
        modules: Their names.

    >>> not_drawn(["fc.weight"])
    "nothing changes fc.weight: not drawn but left at the MAP, the anchor's centre."
    """
    return f"{_nothing_changes(modules)}: not drawn but left at the MAP, the anchor's centre."


def left_out(modules: Sequence[str]) -> str:
    """Warning that some modules are left out of an estimate, because no update changes them.

    Args:
        modules: Their names.

    >>> left_out(["fc.weight"])
    'nothing changes fc.weight: left out, since nothing is to be inferred there.'
    """
    return f"{_nothing_changes(modules)}: left out, since nothing is to be inferred there."


def _nothing_changes(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - _SHOWN} more modules" if len(modules) > _SHOWN else ""
    return f"nothing changes {', '.join(modules[:_SHOWN])}{more}"
