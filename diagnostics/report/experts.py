"""The sections of a report on single experts, and on the alignment of their updates with their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.alignment import Alignment
from diagnostics.experts import ExpertShares, expert_shares
from diagnostics.plots.experts import plot_alignment, plot_expert
from diagnostics.report.page import Block, Details, Facts, Plot, Section, Table
from inference.models.places import short_source
from inference.retention import totals_of

SHOWN = 3
"""Modules that are named as the least kept."""


def expert_sections(record: Mapping[str, Any]) -> list[Section]:
    """One section for each expert: its settings, what was kept of it, and every module.

    Args:
        record: The contents of ``poe_merge.json``.
    """
    modules = [module for tensor in record["tensors"] for module in tensor.get("modules", ())]
    return [_expert_section(record, shares) for shares in expert_shares(modules).values()]


def _expert_section(record: Mapping[str, Any], shares: ExpertShares) -> Section:
    total = next(each for each in totals_of(record) if each.name == shares.name)
    entry = record["inputs"].get(f"expert {shares.name}", {})
    least = [shares.modules[at] for at in np.argsort(shares.kept)[:SHOWN]]
    facts = [
        ("Source", short_source(str(entry.get("source", "in memory")))),
        *_settings(record, shares.name),
        ("Changed", f"{len(shares.modules)} modules"),
        ("Kept", f"{total.kept_percent} of its update; least in {', '.join(least)}"),
    ]
    caption = f"{shares.name} in every module: 1 is everything kept, nothing of the residual gone, a Gaussian's weight."
    blocks: list[Block] = [
        Facts(facts),
        Plot(plot_expert(shares), caption),
        Details(f"Every module of {shares.name}", [_table(shares)]),
    ]
    return Section(f"Expert {shares.name}", [], blocks)


def _settings(record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """Settings of an expert in each design that has it."""
    found = [each for design in record["designs"] for each in design.get("experts", ()) if each["name"] == name]
    texts = (f"{e['residual_map']}, {e['energy']}, {e['scale']}, importance {e['importance']:g}" for e in found)
    return [("Settings", text) for text in dict.fromkeys(texts)]


def _table(shares: ExpertShares) -> Table:
    rows = [[name, *(f"{n:.3g}" for n in numbers)] for name, *numbers in shares.to_dataframe().itertuples(index=False)]
    return Table("By module", ("module", "kept", "residual left", "weight"), rows)


def alignment_section(result: Alignment) -> Section:
    """Whether updates may stand for data: verdict, figure, and every module's numbers."""
    rows = [
        [name, *(f"{value:.3g}" for value in numbers), f"{p:.2g}"]
        for name, numbers, p in zip(
            result.modules,
            zip(result.own.nanmean(-1).tolist(), result.others.nanmean(-1).tolist(), strict=True),
            result.p_values.tolist(),
            strict=True,
        )
    ]
    caption = (
        "Mean cosine of the updates' Gram matrices with the second moments of their own and of the other tasks. "
        "Where they are alike, the likeness is the layer's, and a merge without data is not to be trusted."
    )
    table = Table("Alignment by module", ("module", "own task", "other tasks", "p"), rows)
    blocks: list[Block] = [Plot(plot_alignment(result), caption), Details("Every module's numbers", [table])]
    return Section("Alignment with the tasks", [result.verdict()], blocks)
