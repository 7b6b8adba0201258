"""Hold a merging rule to the properties that a careful reader expects, on random and on real modules.

>>> def largest(updates):
...     norms = updates.flatten(1).norm(dim=1)
...     return updates[norms.argmax()]
>>> report = check(largest)
>>> report.broken
()
>>> print(check(lambda updates: updates.sum(0), properties=["permutation", "identical experts"]))
property            random modules
permutation         holds
identical experts   BROKEN: layers.0.weight: off by 3.0e+00 of the norm
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.method import About, MergingMethod, ModuleBatch
from poe_models.methods.properties import PROPERTIES
from poe_models.methods.subjects import RandomModules, RealModules, Subject
from poe_models.weights.task_vectors import ModuleUpdates

__all__ = ["PROPERTIES", "Outcome", "Report", "check"]

Rule = Callable[[Tensor], Tensor]
"""From the updates of a module ``(N, d_out, d_in)`` to a merged update ``(d_out, d_in)``."""
Progress = Callable[[int, int], None]
"""Called with the number of finished properties and of all."""


@dataclass(frozen=True)
class Outcome:
    """What became of one property on one kind of modules.

    Attributes:
        name: Name of the property.
        modules: Which modules it was tried on.
        status: Holds, does not hold and is not promised, does not hold and should.
        detail: By how much it fails, or the error; empty if it holds.
        reason: Why it is not promised; empty if it is.
    """

    name: str
    modules: Literal["random", "real"]
    status: Literal["holds", "not promised", "broken"]
    detail: str = ""
    reason: str = ""

    @override
    def __str__(self) -> str:
        if self.status == "holds":
            return "holds"
        if self.status == "broken":
            return f"BROKEN: {self.detail}"
        return f"not promised: {self.reason}"


@dataclass(frozen=True)
class Report:
    """All outcomes; its text is a table.

    Attributes:
        outcomes: One for each property and kind of modules.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """Properties that do not hold, although nobody said so."""
        return tuple(each for each in self.outcomes if each.status == "broken")

    @override
    def __str__(self) -> str:
        kinds = list(dict.fromkeys(each.modules for each in self.outcomes))
        names = list(dict.fromkeys(each.name for each in self.outcomes))
        found = {(each.name, each.modules): str(each) for each in self.outcomes}
        rows = [["property", *(f"{kind} modules" for kind in kinds)]]
        rows += [[name, *(found.get((name, kind), "-") for kind in kinds)] for name in names]
        widths = [max(len(row[i]) for row in rows) + 3 for i in range(len(rows[0]))]
        lines = ("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def check(
    method: MergingMethod | Rule,
    modules: Iterable[ModuleUpdates] | None = None,
    *,
    properties: Sequence[str] | None = None,
    not_promised: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Try the properties of :data:`PROPERTIES` on a rule.

    Random modules come with random statistics and data for the methods that need them. What a method does not promise
    is declared in its ``about.exceptions``; a property that holds all the same is reported as holding.

    Args:
        method: An instance, or a function from the updates of one module to the merged update.
        modules: Real modules to try it on as well, such as ``TaskVectors``; the first of each shape is taken, three
            shapes at most. Methods that learn from data run on random modules only.
        properties: Names of those to try; all by default.
        not_promised: Further properties that are not promised, with the reason.
        seed: Seed of the random modules.
        progress: Told how far it is.

    Returns:
        What holds, what the rule does not promise, and what is broken.

    Raises:
        ValueError: If a property is unknown, or there are no modules.
    """
    subject_of = method if isinstance(method, MergingMethod) else _Function(method)
    names = list(PROPERTIES) if properties is None else list(properties)
    exceptions = {**subject_of.about.exceptions, **(not_promised or {})}
    unknown = [name for name in (*names, *exceptions) if name not in PROPERTIES]
    if unknown:
        raise ValueError(f"`check(...)`: no property is called {unknown[0]!r}. Known: {', '.join(PROPERTIES)}.")
    subjects: list[Subject] = [RandomModules(subject_of, seed)]
    if modules is not None and not subject_of.needs_loaders:
        subjects.append(RealModules(subject_of, modules))
    outcomes = []
    for done, name in enumerate(names):
        outcomes += [_outcome(name, subject, exceptions.get(name)) for subject in subjects]
        if progress is not None:
            progress(done + 1, len(names))
    return Report(tuple(each for each in outcomes if each is not None))


def _outcome(name: str, subject: Subject, reason: str | None) -> Outcome | None:
    given = PROPERTIES[name]
    if given.random_only and subject.kind == "real":
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            detail = given.test(subject)
    except Exception as error:  # whatever a researcher's rule raises is an outcome
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if not detail:
        return Outcome(name, subject.kind, "holds")
    if reason is not None:
        return Outcome(name, subject.kind, "not promised", detail, reason)
    return Outcome(name, subject.kind, "broken", detail)


@dataclass(frozen=True)
class _Function(MergingMethod):
    """A function of the updates of one module as a method."""

    about: ClassVar[About] = About("a function", "")

    rule: Rule

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        return torch.stack([self.rule(updates) for updates in batch.updates])
