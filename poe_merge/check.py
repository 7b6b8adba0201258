"""`poe-merge check`: hold a merging method to its properties, and say which hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from poe_merge.console import Bars
from poe_merge.specs import METHOD, canonical_method, nearest, parse_spec
from poe_models.methods.checking import PROPERTIES, Report, check
from poe_models.weights.task_vectors import TaskVectors

_WORDS = {"holds": "hold", "not promised": "not promised", "broken": "broken"}


def check_method(method: str, modules: TaskVectors | None, not_promised: Sequence[str], seed: int) -> Report:
    """Check a method that is given as text.

    Args:
        method: Its spec, such as ``Ties(density=0.1)``, ``dare-ties`` or ``my_module:MyMethod``.
        modules: Real modules to try it on, too.
        not_promised: Names of further properties that it need not have.
        seed: Of the random modules.

    Returns:
        The report.

    Raises:
        ValueError: If the method cannot be built, or no property has such a name.
    """
    for name in not_promised:
        if name not in PROPERTIES:
            raise ValueError(
                f"--not-promised {name!r}: no such property; {nearest(name, PROPERTIES)}Known: {', '.join(PROPERTIES)}."
            )
    built = parse_spec(canonical_method(method, [Path.cwd()]), METHOD)
    with Bars() as bars:
        return check(
            built,
            modules,
            not_promised=dict.fromkeys(not_promised, "as you say"),
            seed=seed,
            progress=bars.steps("checking"),
        )


def summary(report: Report) -> str:
    """The report with what its properties say, and how many hold."""
    named = {each.name for each in report.outcomes}
    width = max(map(len, named)) + 3
    meanings = "\n".join(f"{name.ljust(width)}{PROPERTIES[name].says}" for name in PROPERTIES if name in named)
    counts = Counter[str](each.status for each in report.outcomes)
    parts = ", ".join(f"{counts[status]} {word}" for status, word in _WORDS.items() if counts[status])
    return f"{meanings}\n\n{report}\n\n{parts}."
