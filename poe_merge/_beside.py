"""Draws beside a merged folder: are they draws around this merge, and how far is their centre from it?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diagnostics.surround import ABOUT, surround_verdict
from diagnostics.verdicts import Level, Verdict
from inference.design import Design
from inference.model_draws import FullDraws, PosteriorDraws, SpanDraws
from inference.surrounding import distance_from_merge
from poe_models.checkpoints import CheckpointError
from poe_models.experts import ProductOfExperts
from poe_models.task_vectors import TaskVectors


def beside_verdict(
    draws: PosteriorDraws,
    run: Path,
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
    product: Callable[[Mapping[str, Any]], ProductOfExperts],
) -> Verdict:
    """Judge draws beside a merge.

    Args:
        draws: Of some of its modules.
        run: The merged folder.
        record: Its `poe_merge.json`.
        task_vectors: Opens base and experts as they were merged.
        product: Makes the experts of a recorded design.

    Returns:
        Where their centre is; a caution if they are around something else.
    """
    designs = {str(m["module"]): _design(record, t) for t in record["tensors"] for m in t.get("modules", ())}
    for name in draws.modules:
        if "experts" not in designs[name]:
            return Verdict(
                ABOUT, Level.CAUTION, f"{draws.about}: {name!r} was merged by a method, and has no posterior."
            )
        if designs[name]["coordinates"] != draws.surrounds:
            return _elsewhere(draws, run, designs, record, task_vectors, product)
    for index, name in enumerate(draws.modules):
        if not _same(draws, index, designs[name]):
            text = (
                f"{draws.about}: those of {name!r} were drawn under other experts, scales or anchor than this merge "
                "was made with, and are around another merge. Draw around this one: `poe-merge sample --merge`."
            )
            return Verdict(ABOUT, Level.CAUTION, text)
    return surround_verdict(draws)


def _elsewhere(
    draws: PosteriorDraws,
    run: Path,
    designs: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
    product: Callable[[Mapping[str, Any]], ProductOfExperts],
) -> Verdict:
    """Draws around the MAP of other coordinates than the merge's, with the distance where it can be measured."""
    merged = {"full": "Full", "span": "Span"}[str(designs[draws.modules[0]]["coordinates"])]
    what = f"the merge was solved in {merged} coordinates, and these draws are around another point"
    if isinstance(draws, SpanDraws) and all(designs[name]["anchor"]["center"] is None for name in draws.modules):
        try:
            tensors = {str(t["tensor"]): _design(record, t) for t in record["tensors"] if "design" in t}
            made = {name: Design(product(each), float(each["scaling"])) for name, each in tensors.items()}
            found = distance_from_merge(draws, task_vectors(), lambda tensor: made[tensor], run)
            away = replace(draws, from_merge=found)
            text = away.far_from_merge or f"{away.about}: {found}"
            return Verdict(ABOUT, Level.CAUTION if found.beyond else Level.NOTE, f"{what}. {text}")
        except (ValueError, CheckpointError, OSError) as error:
            what = f"{what} ({error})"
    return Verdict(ABOUT, Level.CAUTION, f"{draws.about}: {what}. Draw around it: `poe-merge sample --merge`.")


def _same(draws: PosteriorDraws, index: int, design: Mapping[str, Any]) -> bool:
    """Whether a module was drawn under the design that it was merged with."""
    if isinstance(draws, FullDraws):
        drawn = json.loads(draws.designs[index])
        anchors = [each["anchor"]["precision"] for each in (drawn, design)]
        return bool(drawn["experts"] == design["experts"] and anchors[0] == anchors[1])
    assert isinstance(draws, SpanDraws)
    return not draws.designs or draws.designs[index] == _label(design)


def _label(design: Mapping[str, Any]) -> str:
    """A recorded design as `merge_label` has it."""
    experts = (f"{e['name']} {e['energy']} {e['scale']} importance {e['importance']:g}" for e in design["experts"])
    return f"{', '.join(experts)}; anchor {design['anchor']['precision']}"


def _design(record: Mapping[str, Any], tensor: Mapping[str, Any]) -> Mapping[str, Any]:
    design: Mapping[str, Any] = record["designs"][tensor["design"]]
    return design
