"""``poe-merge check``: test the properties of a merging method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from inference.models.method_design import MethodDesign
from inference.models.one_row import require_matrices
from poe_merge.progress import Bars
from poe_merge.specs import METHOD, canonical_method, meant, parse_spec, same_name
from poe_models.methods.checking import PROPERTIES, Report, check
from poe_models.weights.task_vectors import TaskVectors

_WORDS = {"holds": "hold", "not promised": "not promised", "broken": "broken"}


def check_method(method: str, modules: TaskVectors | None, not_promised: Sequence[str], seed: int) -> Report:
    """Check a method given as text on random modules, made from ``seed``, and on real ones if there are any.

    Raises:
        ValueError: If the method cannot be built or needs matrices where there are none, or no property is called like
            one of ``not_promised``.
    """
    exempt = [same_name(name, PROPERTIES) for name in not_promised]
    for name, known in zip(not_promised, exempt, strict=True):
        if known is None:
            raise ValueError(
                f"--not-promised {name!r}: no such property{meant(name, PROPERTIES)}Known: {', '.join(PROPERTIES)}."
            )
    built = parse_spec(canonical_method(method, [Path.cwd()]), METHOD)
    for name, view in modules.views.items() if modules is not None else ():
        require_matrices(name, view, MethodDesign(built))
    with Bars() as bars:
        return check(
            built,
            modules,
            not_promised={name: "as you say" for name in exempt if name is not None},
            seed=seed,
            progress=bars.steps("checking"),
        )


def summary(report: Report) -> str:
    """Text of the report: the properties and their meanings, the outcomes, and how many hold."""
    named = {each.name for each in report.outcomes}
    width = max(map(len, named)) + 3
    meanings = "\n".join(f"{name.ljust(width)}{PROPERTIES[name].says}" for name in PROPERTIES if name in named)
    counts = Counter[str](each.status for each in report.outcomes)
    parts = ", ".join(f"{counts[status]} {word}" for status, word in _WORDS.items() if counts[status])
    return f"{meanings}\n\n{report}\n\n{parts}."
