"""The section of a report on the inputs, the designs and the tensors of a merge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diagnostics.report.page import Block, Details, Facts, Section, Table
from diagnostics.verdicts import Level, Verdict
from inference.models.folder import rounding_of
from inference.models.places import short_source
from inference.models.record_shapes import require_merge
from inference.retention import ExpertRetention, concerns, totals_of

__all__ = ["merge_section"]

EXPERT = "expert "
ROUNDED_BACK = 0.1
"""Share of the changed weights that rounding may take back before it is worth a warning."""
ACTIONS = {"merge": "merged", "average": "averaged", "base": "the base's"}


def merge_section(record: Mapping[str, Any]) -> Section:
    """Inputs, designs, treatments, and the share that the merge kept of each expert.

    Args:
        record: The contents of ``poe_merge.json``.

    Raises:
        ValueError: If the record is not one of a merge.
    """
    try:
        require_merge(record, "`merge_section(...)`: not the record of a merge")
    except ValueError as error:
        raise ValueError(f"{error} Give the contents of a `poe_merge.json`.") from error
    tensors, inputs = record["tensors"], record["inputs"]
    experts = {role.removeprefix(EXPERT): entry for role, entry in inputs.items() if role.startswith(EXPERT)}
    actions = Counter(ACTIONS[tensor["action"]] for tensor in tensors)
    entries = {word: sum(int(t["numel"]) for t in tensors if ACTIONS[t["action"]] == word) for word in actions}
    facts = [
        ("Base", short_source(str(inputs["base"]["source"]))),
        *((f"Expert {name}", text) for name, text in zip(experts, _sources(experts.values()), strict=True)),
        ("Tensors", ", ".join(f"{n} {action}" for action, n in actions.items())),
        ("Parameters", ", ".join(f"{n:,} {action}" for action, n in entries.items())),
        ("Computed in", f"{record['compute_dtype']} on {record['device']}, seed {record['seed']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    experts_kept = totals_of(record)
    blocks: list[Block] = [
        Facts(facts),
        *(_design_table(index, design, len(record["designs"])) for index, design in enumerate(record["designs"])),
        *_kept_table(experts_kept),
        Details("Treatment of each tensor", [_treatments(tensors)]),
        Details("Digests of the inputs", [_digests(inputs)]),
    ]
    return Section("What was merged", [*_kept(experts_kept), *_rounding(tensors)], blocks)


def _sources(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Short names of the experts' sources, with the folder where they would be the same."""
    sources = [str(entry["source"]) for entry in entries]
    short = [short_source(source) for source in sources]
    if len(set(short)) == len(short):
        return short
    return ["/".join(Path(source).parts[-2:]) for source in sources]


def _design_table(index: int, design: Mapping[str, Any], count: int) -> Table:
    name = "Design" if count == 1 else f"Design {index + 1}"
    if "method" in design:
        caption = f"{name}: {design['title']}, scaling {design['scaling']:g}"
        return Table(caption, ("method", "to be cited"), [[str(design["method"]), str(design["citation"])]])
    anchor = design["anchor"]
    center = "the base" if anchor["center"] is None else short_source(str(anchor["center"]))
    caption = (
        f"{name}: anchor {anchor['precision']} around {center}, temperature {design['temperature']:g}, scaling "
        f"{design['scaling']:g}, {design['coordinates']} coordinates"
    )
    rows = [
        [str(expert[key]) for key in ("name", "residual_map", "energy", "scale")] + [f"{expert['importance']:g}"]
        for expert in design["experts"]
    ]
    return Table(caption, ("expert", "residual map", "energy", "scale", "importance"), rows)


def _treatments(tensors: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            str(t["tensor"]),
            "x".join(map(str, t["shape"])),
            ACTIONS[t["action"]],
            str(t["view"] or ""),
            str(t["reason"]),
        ]
        for t in tensors
    ]
    return Table("Tensors", ("tensor", "shape", "treatment", "seen as", "reason"), rows)


def _digests(inputs: Mapping[str, Any]) -> Table:
    rows = [
        [str(role), str(file), str(digest)]
        for role, entry in inputs.items()
        for file, digest in entry.get("sha256", {}).items()
    ]
    return Table("Sha256 of the inputs", ("input", "file", "sha256"), rows)


def _kept(experts: Sequence[ExpertRetention]) -> list[Verdict]:
    """Experts that the merge passed by, and merges that are little more than the base or one expert."""
    if not any(math.isfinite(each.kept) for each in experts):
        return []
    found = [Verdict("experts", Level.CAUTION, text) for text in concerns(experts)]
    least = min((each for each in experts if math.isfinite(each.kept)), key=lambda each: each.kept)
    text = f"every expert has its share; the least kept is {least.name!r}, with {least.kept_percent} of its update."
    return found or [Verdict("experts", Level.GOOD, text)]


def _kept_table(experts: Sequence[ExpertRetention]) -> list[Block]:
    rows = [[each.name, *map(_share, (each.kept, each.residual_left, each.length))] for each in experts]
    header = ("expert", "of its update kept", "of its squared residual left", "length of the merge over its own")
    return [Table("What the merge kept of each expert", header, rows)] if rows else []


def _share(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "unknown"


def _rounding(tensors: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    updated, back = rounding_of(tensors)
    if not updated:
        return []
    share = back / updated
    text = f"rounding to the output's dtype left {share:.1%} of the {updated:,} changed weights at the base's value"
    if share <= ROUNDED_BACK:
        return [Verdict("rounding", Level.GOOD, f"{text}.")]
    return [Verdict("rounding", Level.CAUTION, f"{text}: write float32, or raise the scaling.")]
