"""Retention of every expert by the merge that draws surround: from Span statistics, or solved for."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.map import fixed_point
from inference.models.design import Design
from inference.models.modules import merged_update, module_names, read_modules
from inference.models.ranks import ALONE, Ranks
from inference.retention import ExpertRetention, retention, totals
from inference.tempering import temperature_range
from poe_merge.stats import Table
from poe_models.experts import ProductOfExperts
from poe_models.posterior import Posterior
from poe_models.span import SpanStatistics
from poe_models.weights.task_vectors import TaskVectors


def bound(product: ProductOfExperts, statistics: SpanStatistics) -> Posterior:
    """The posterior from statistics; the modules that it leaves out are the caller's to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return product.bind(statistics)


def merge_in_span(posterior: Posterior, design: Design) -> Tensor:
    """Latents of the merge in Span coordinates: the merge that the span goes through, else the MAP of the span.

    Args:
        posterior: In Span coordinates.
        design: Of all its modules.

    Returns:
        ``(M, K, 1)``.
    """
    assert posterior.span is not None
    statistics = posterior.span.statistics
    if statistics.through is not None:
        last = torch.eye(len(statistics.basis), dtype=torch.float64, device=statistics.gram.device)[-1]
        return posterior.span.latents(last.expand(len(statistics.modules), -1))
    solution = fixed_point(posterior, **vars(design.options))
    for name, status in zip(statistics.modules, solution.status, strict=True):
        if not status.converged:
            warnings.warn(f"the MAP of {name!r}: {status}", stacklevel=2)
    return solution.value


def kept_in_statistics(groups: Sequence[tuple[Design, SpanStatistics]]) -> tuple[ExpertRetention, ...]:
    """Retention of each expert, from each design with the statistics of its modules."""
    records: list[Mapping[str, Any]] = []
    for design, statistics in groups:
        posterior = bound(design.span_product, statistics)
        merge = merge_in_span(posterior, design)
        found = retention(posterior, merge, posterior.residuals(merge))
        written = found.scaled(design.scaling)
        records += [written.record(module) for module in range(posterior.num_modules)]
    return totals(records)


def kept_when_solved(
    task_vectors: TaskVectors, designs: Table, drawn: Collection[str], ranks: Ranks = ALONE
) -> tuple[tuple[ExpertRetention, ...], float]:
    """Retention of each expert by solving some modules, and the highest temperature at which experts hold one."""
    records: dict[str, Mapping[str, Any]] = {}
    highest = 0.0
    tensors = [t for t in task_vectors.treatments if not set(drawn).isdisjoint(module_names(task_vectors, t))]
    own = ranks.share([task_vectors.base.tensors[tensor].nbytes for tensor in tensors])
    for tensor in (tensors[place] for place in sorted(own)):
        design = designs(tensor)
        for module in read_modules(task_vectors, tensor, design):
            if module.name not in drawn:
                continue
            posterior, merge = module.posterior, merged_update(module, design).unsqueeze(0)
            found = retention(posterior, merge, posterior.residuals(merge))
            records[module.name] = found.scaled(design.scaling).record(0)
            if bool(posterior.active.any()):
                highest = max(highest, temperature_range(posterior)[1])
    everyones = ranks.gather((records, highest))
    known = {name: record for each, _ in everyones for name, record in each.items()}
    names = [name for tensor in tensors for name in module_names(task_vectors, tensor) if name in known]
    return totals([known[name] for name in names]), max(most for _, most in everyones)
