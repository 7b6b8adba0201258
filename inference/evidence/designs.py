"""Comparison of designs by log evidence: the density of the experts' updates under each design.

**The question.** ``compare_designs`` asks how probable the updates were under each design before any was seen: a log
density of all updates, prior and scales included, whose differences are log Bayes factors. ``az.compare`` asks another
one, how well each value is predicted by a model that was fitted to all others, and needs draws and a log likelihood for
every value; for one expert of a few its importance sampling fails
(:func:`~inference.evidence.estimate.leave_one_expert_out` answers that question exactly). A vague prior costs evidence
and hardly any leave-one-out density, so that the two may disagree with good reason. Neither is test accuracy.

**What can be compared.** Evidences are densities of what experts see of the updates; it has to be the same numbers.

- *Energies, scales, importances, temperatures, anchors:* comparable wherever the residual maps are the same. Operators,
  the units of scales and a relative ``eta`` are computed from the updates, and differences are log Bayes factors given
  these.
- *Maps and sides:* only where they see the same directions of every update, which means operators of full rank:
  densities of ``r d_out`` and of ``r d_in`` numbers have different units.
- *Several experts about one update* (both sides) are normalised one by one. That is a composite likelihood, in which
  the update counts more than once: comparable with others of its kind only.

The rest is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from inference.evidence.estimate import SAMPLES, Evidence, UntrustedEvidence, dimensions, log_evidence
from inference.evidence.module_batches import Updates, module_batches
from poe_models.experts import ProductOfExperts
from poe_models.module_names import with_names
from poe_models.operators import Diagonal, Gram, Operator, RankOne
from poe_models.posterior import Posterior
from poe_models.records import joined
from poe_models.sums import sum_of_squares


@dataclass(frozen=True, eq=False)
class DesignEvidence:
    """One row of :class:`EvidenceTable`: a design's name and the evidence of every module."""

    name: str
    evidence: Evidence


@dataclass(frozen=True, eq=False)
class EvidenceTable:
    """Designs by log evidence, the best first; prints as a table in nats.

    Attributes:
        rows: One per design.
        modules: Names of the modules, in the order of each row's evidence.
    """

    rows: tuple[DesignEvidence, ...]
    modules: tuple[str, ...]

    @override
    def __str__(self) -> str:
        width = max(len("design"), *(len(row.name) for row in self.rows))
        titles = ("log evidence", "s.e.", "below best", "least ESS", "largest k")
        lines = [f"{'design':<{width}}" + "".join(f"{title:>14}" for title in titles)]
        for row in self.rows:
            found = row.evidence
            below = self.rows[0].evidence.total - found.total
            least, largest = float(found.effective_samples.min()), float(found.pareto_k.max())
            lines.append(
                f"{row.name:<{width}}{found.total:>14.2f}{found.total_error:>14.2f}{below:>14.2f}"
                + (f"{'exact':>14}{'':>14}" if math.isinf(least) else f"{least:>14.0f}{largest:>14.2f}").rstrip()
            )
        return "\n".join(lines)


def compare_designs(
    designs: Mapping[str, ProductOfExperts],
    updates: Updates,
    *,
    generator: torch.Generator,
    samples: int = SAMPLES,
    progress: Callable[[str], None] | None = None,
) -> EvidenceTable:
    """Evidence of several designs of the same merge, the best first; see the module for what it answers.

    Args:
        designs: Name to design.
        updates: A tensor ``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)``, or modules, for instance a whole model's
            :class:`~poe_models.weights.task_vectors.TaskVectors`, which are read once and held a few at a time.
        generator: Source of all randomness.
        samples: Importance samples per module and design.
        progress: Called with the name of every module that is done.

    Returns:
        The table, in nats summed over modules.

    Raises:
        ValueError: If two designs cannot be compared, or one has no evidence; names design and module.

    >>> from poe_models import AbsolutePrecision, Absolute, Anchor, Gaussian, Identity
    >>> near, far = (Anchor(precision=AbsolutePrecision(eta)) for eta in (0.5, 50.0))
    >>> designs = {name: ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=anchor)
    ...            for name, anchor in (("far", far), ("near", near))}
    >>> updates = torch.ones(2, 1, 3, dtype=torch.float64)
    >>> print(compare_designs(designs, updates, generator=torch.Generator().manual_seed(0)))
    design  log evidence          s.e.    below best     least ESS     largest k
    near           -8.16          0.00          0.00         exact
    far            -8.48          0.00          0.32         exact
    """
    if not designs:
        raise ValueError("`compare_designs({})`: no designs. Give at least one.")
    found: dict[str, list[Evidence]] = {name: [] for name in designs}
    modules: list[str] = []
    for batch in module_batches(updates, designs.values()):
        posteriors = {name: poe.bind(batch.updates) for name, poe in designs.items()}
        _require_comparable(posteriors)
        for name, posterior in posteriors.items():
            try:
                found[name].append(log_evidence(posterior, generator=generator, samples=samples))
            except ValueError as error:
                raise _located(error, name, batch.names) from error
        modules += batch.names
        if progress is not None:
            for module in batch.names:
                progress(module)
    if not modules:
        raise ValueError("`compare_designs(updates=...)`: there are no modules. Give task vectors that merge some.")
    rows = [DesignEvidence(name, joined(*parts)) for name, parts in found.items()]
    return EvidenceTable(tuple(sorted(rows, key=lambda row: row.evidence.total, reverse=True)), tuple(modules))


def _located(error: ValueError, design: str, modules: tuple[str, ...]) -> ValueError:
    text = f"`compare_designs(...)`: design {design!r}: {with_names(error, modules)}"
    return UntrustedEvidence(text, error.evidence) if isinstance(error, UntrustedEvidence) else ValueError(text)


def _require_comparable(posteriors: Mapping[str, Posterior]) -> None:
    """Raise unless all evidences are densities of the same numbers: equal lengths of updates, ranks and ranges."""
    (first, reference), *others = posteriors.items()
    for name, posterior in others:
        reason = _difference(reference, posterior)
        if reason is not None:
            raise ValueError(
                f"`compare_designs(...)`: {first!r} and {name!r} cannot be compared, because their evidences are "
                f"densities of different numbers: {reason}. Compare designs whose experts see the same of every update."
            )


def _difference(one: Posterior, other: Posterior) -> str | None:
    """Reason why two evidences are densities of different numbers, or None."""
    pairs = [
        sorted(enumerate(each.experts), key=lambda pair: (pair[1].update_name, _kind(pair[1].operator)))
        for each in (one, other)
    ]
    if [e.update_name for _, e in pairs[0]] != [e.update_name for _, e in pairs[1]]:
        return "their experts are not about the same updates, one by one"
    ranks, other_ranks = dimensions(one), dimensions(other)
    for (i, a), (j, b) in zip(*pairs, strict=True):
        left, right = ranks[:, i], other_ranks[:, j]
        if not torch.allclose(sum_of_squares(a.update), sum_of_squares(b.update), rtol=1e-4):
            return f"the two updates {a.update_name!r} differ in length"
        if not torch.equal(left, right):
            return f"{a.name!r} sees {_range(left)} numbers of an update, {b.name!r} {_range(right)}"
        if bool((left < math.prod(one.event_shape)).any()) and not _same_directions(a.operator, b.operator):
            return f"{a.name!r} and {b.name!r} see different directions of {a.update_name!r}"
    return None


def _range(ranks: Tensor) -> str:
    least, most = int(ranks.min()), int(ranks.max())
    return str(least) if least == most else f"{least} to {most}"


def _kind(operator: Operator) -> tuple[str, str]:
    return type(operator).__name__, operator.side if isinstance(operator, Gram) else ""


def _same_directions(one: Operator, other: Operator) -> bool:
    """Whether two operators of equal ranks have the same range in every module of the batch."""
    if _kind(one) != _kind(other):
        return False
    if isinstance(one, Gram) and isinstance(other, Gram) and not torch.equal(one.factor, other.factor):
        both = torch.cat([_unit(one.narrow), _unit(other.narrow)], -1)
        return torch.equal(torch.linalg.matrix_rank(both), torch.linalg.matrix_rank(one.narrow))
    if isinstance(one, Diagonal) and isinstance(other, Diagonal):
        return torch.equal(one.values > 0, other.values > 0)
    if isinstance(one, RankOne) and isinstance(other, RankOne):
        across = (_unit(one.vector) * _unit(other.vector)).sum((-2, -1)).abs()
        lengths = sum_of_squares(_unit(one.vector))  # 1, or 0 of nothing
        return torch.allclose(across.double(), lengths, atol=1e-4)
    return True


def _unit(x: Tensor) -> Tensor:
    """Matrices ``(M, a, b)`` of Frobenius norm 1; zeros stay zeros."""
    return x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
