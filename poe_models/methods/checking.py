"""Property checks of a merging rule, on random and on real modules.

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

from poe_models.methods.learned import WholeModel
from poe_models.methods.method import About, MergingMethod, ModuleBatch
from poe_models.methods.subjects import RandomModules, RealModules, Subject, Updates
from poe_models.weights.task_vectors import ModuleUpdates

Rule = Callable[[Tensor], Tensor]
"""From the updates of a module ``(N, d_out, d_in)`` to a merged update ``(d_out, d_in)``."""
Progress = Callable[[int, int], None]
"""Called with the number of finished properties and of all."""


@dataclass(frozen=True)
class Outcome:
    """Result of one property on one kind of modules.

    Attributes:
        name: Name of the property.
        modules: Kind of the modules.
        status: Holds, does not hold and is not promised, does not hold and should.
        detail: Size of the failure, or the error; empty if it holds.
        reason: Reason why it is not promised; empty if it is.
    """

    name: str
    modules: Literal["random", "real"]
    status: Literal["holds", "not promised", "broken"]
    detail: str = ""
    reason: str = ""

    @override
    def __str__(self) -> str:
        return {"holds": "holds", "broken": f"BROKEN: {self.detail}"}.get(self.status, f"not promised: {self.reason}")


@dataclass(frozen=True)
class Report:
    """All outcomes, one for each property and kind of modules; prints as a table."""

    outcomes: tuple[Outcome, ...]

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """Outcomes of promised properties that do not hold."""
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

    Random modules come with random moments and data for the methods that need them. Properties that a method does
    not promise are in its ``about.exceptions``; one that holds all the same is reported as holding.

    Args:
        method: An instance, or a function from the updates of one module to the merged update.
        modules: Real modules to try it on as well, such as ``TaskVectors``; the first of each shape is taken, three
            shapes at most. Methods that learn from data run on random modules only.
        properties: Names of those to try; all by default.
        not_promised: Further properties that are not promised, with the reason.
        seed: Seed of the random modules.
        progress: Called after each property.

    Returns:
        The report.

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


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_NOISE, _MOVED = 1e-7, 1e-3
_RANKS = (1, 2)


@dataclass(frozen=True)
class Property:
    """A property that merging rules promise, and its test.

    Attributes:
        says: The property in one line.
        test: Function from a subject to a description of the failure, empty if it holds.
        random_only: True if it needs modules of its own making.
    """

    says: str
    test: Callable[[Subject], str]
    random_only: bool = False


def _one_expert(subject: Subject) -> str:
    one = {name: updates[:1] for name, updates in subject.updates.items()}
    return _difference(subject.merge(one, subject.experts[:1]), {name: u[0] for name, u in one.items()})


def _identical_experts(subject: Subject) -> str:
    same = {n: u[:1].expand(len(subject.experts), -1, -1).contiguous() for n, u in subject.updates.items()}
    return _difference(subject.merge(same), {name: u[0] for name, u in same.items()})


def _permutation(subject: Subject) -> str:
    order = list(range(len(subject.experts)))[::-1]
    turned = {name: updates[order] for name, updates in subject.updates.items()}
    found = subject.merge(turned, [subject.experts[i] for i in order])
    return _difference(found, subject.merge(subject.updates))


def _scale_equivariance(subject: Subject) -> str:
    factor = 0.25  # a power of two changes no digit
    found = subject.merge({name: factor * updates for name, updates in subject.updates.items()})
    return _difference(found, {name: factor * merged for name, merged in subject.merge(subject.updates).items()})


def _dtype(subject: Subject) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {name: updates.to(dtype) for name, updates in subject.updates.items()}
        found = subject.merge(rounded)
        kept = {merged.dtype for merged in found.values()}
        if kept != {dtype}:
            return f"updates in {dtype} give {', '.join(map(str, kept))}"
        exact = subject.merge({name: updates.double() for name, updates in rounded.items()})
        problem = _difference({n: merged.double() for n, merged in found.items()}, exact, _TOLERANCE[dtype])
        if problem:
            return f"{dtype}: {problem}"
    return ""


def _zero_expert(subject: Subject) -> str:
    with_zero = {name: updates.clone() for name, updates in subject.updates.items()}
    for updates in with_zero.values():
        updates[0] = 0
    return _irregular(subject.merge(with_zero), with_zero)


def _zero_module(subject: Subject) -> str:
    first = next(iter(subject.updates))
    nothing = {name: 0 * updates if name == first else updates for name, updates in subject.updates.items()}
    found = subject.merge(nothing)
    return _irregular(found, nothing) or _difference({first: found[first]}, {first: nothing[first][0]})


def _more_experts_than_rank(subject: Subject) -> str:
    count = 2 + max(min(updates.shape[1:]) for updates in subject.updates.values())
    many = {
        name: torch.cat([(1 + 0.1 * i) * updates.roll(i, -1) for i in range(count)])[:count]
        for name, updates in subject.updates.items()
    }
    return _irregular(subject.merge(many, [f"e{i}" for i in range(count)]), many)


def _low_rank_stability(subject: Subject) -> str:
    generator = torch.Generator().manual_seed(1)
    for rank in _RANKS:
        low = {name: _truncated(updates, rank) for name, updates in subject.updates.items()}
        noisy = {}
        for name, updates in low.items():
            noise = torch.randn(updates.shape, generator=generator, dtype=updates.dtype)
            sizes = updates.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
            noisy[name] = updates + _NOISE * sizes[:, None, None] * noise
        problem = _difference(subject.merge(noisy), subject.merge(low), _MOVED)
        if problem:
            return f"rank {rank}: {problem}"
    return ""


def _inputs_unchanged(subject: Subject) -> str:
    given = {name: updates.clone() for name, updates in subject.updates.items()}
    subject.merge(given)
    changed = [name for name, updates in given.items() if not torch.equal(updates, subject.updates[name])]
    return f"it writes into the updates of {changed[0]}" if changed else ""


def _seed_determinism(subject: Subject) -> str:
    torch.manual_seed(1)
    first = subject.merge(subject.updates)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = subject.merge(subject.updates)
    if not torch.equal(before, torch.random.get_rng_state()):
        return "it draws from torch's global generator"
    same = all(torch.allclose(first[n], second[n], rtol=0, atol=0, equal_nan=True) for n in first)
    return "" if same else "two runs differ"


def _integer_buffers(subject: Subject) -> str:
    merged = _small_model(subject)
    return "an integer buffer was merged" if "steps" in merged else _irregular(merged, {})


def _tied_weights(subject: Subject) -> str:
    merged = _small_model(subject)
    names = [name for name in merged if name.endswith("weight")]
    return "" if len(names) == 1 else f"tied matrices were merged as {', '.join(names)}"


PROPERTIES: dict[str, Property] = {
    "one expert": Property("a single expert comes back unchanged", _one_expert),
    "identical experts": Property("copies of one expert come back unchanged", _identical_experts),
    "permutation": Property("the order of experts does not matter", _permutation),
    "scale equivariance": Property("scaled updates give the scaled merge", _scale_equivariance),
    "dtype": Property("the updates' dtype is kept, and half precision is computed in float32", _dtype),
    "zero expert": Property("an expert that changed nothing is legal", _zero_expert),
    "zero module": Property("a module that no expert changed stays unchanged", _zero_module),
    "more experts than rank": Property("more experts than a dimension are legal", _more_experts_than_rank, True),
    "low-rank stability": Property("noise of 1e-7 on low-rank updates hardly moves the merge", _low_rank_stability),
    "inputs unchanged": Property("the updates are not written to", _inputs_unchanged),
    "seed determinism": Property("two runs agree bit for bit and leave torch's generator alone", _seed_determinism),
    "integer buffers": Property("a model with integer buffers is merged without them", _integer_buffers, True),
    "tied weights": Property("tied matrices are merged once and stay tied", _tied_weights, True),
}
"""Name to property, in the order of the report."""


def _small_model(subject: Subject) -> Updates:
    assert isinstance(subject, RandomModules)
    vectors = subject.vectors()
    ready = subject.prepared({module.name: module.updates for module in vectors}, vectors.names)
    merged = {module.name: ready.merge(ModuleBatch.of_module(module)).squeeze(0) for module in vectors}
    return WholeModel("check", vectors).weights(merged)


def _truncated(updates: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(updates, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def _difference(found: Updates, expected: Updates, tolerance: float = _TOLERANCE[torch.float64]) -> str:
    """Description of the first matrix that is not the expected one, relative to its norm; empty if all are."""
    for name, value in expected.items():
        if tuple(found[name].shape) != tuple(value.shape):
            return f"{name}: shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        if not bool(found[name].isfinite().all()):
            return f"{name}: NaN or infinite values"
        error = float((found[name] - value).norm()) / (float(value.norm()) or 1.0)
        if error > tolerance:
            return f"{name}: off by {error:.1e} of the norm"
    return ""


def _irregular(found: Updates, updates: Updates) -> str:
    for name, value in found.items():
        if name in updates and tuple(value.shape) != tuple(updates[name].shape[1:]):
            return f"{name}: shape {tuple(value.shape)}, expected {tuple(updates[name].shape[1:])}"
        if not bool(value.isfinite().all()):
            return f"{name}: NaN or infinite values"
    return ""
