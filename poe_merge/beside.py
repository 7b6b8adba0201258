"""Draws beside a merged folder: whether they are draws around this merge, and how far their centre is from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diagnostics.chains import ABOUT, surround_verdict
from diagnostics.verdicts import Level, Verdict
from inference.merge_distance import RESOLUTION
from inference.models.design import Design
from inference.models.model_draws import FullDraws, PosteriorDraws, SpanDraws
from inference.models.surrounding import distance_from_merge
from poe_merge.record import design_of, merge_of
from poe_models.methods import METHODS
from poe_models.weights.loading import CheckpointError
from poe_models.weights.task_vectors import TaskVectors

DRAW_AROUND_IT = "Draw around it: `poe-merge sample --merge`."


def beside_verdict(
    draws: PosteriorDraws,
    run: Path,
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
) -> Verdict:
    """Judge draws beside a merge.

    Args:
        draws: Draws of some of its modules.
        run: The merged folder.
        record: Its ``poe_merge.json``.
        task_vectors: Opens base and experts as they were merged.

    Returns:
        The distance of their centre; a caution if they are around something else.
    """
    designs = {str(m["module"]): design_of(record, t) for t in record["tensors"] for m in t.get("modules", ())}
    modules = {str(m["module"]): m for t in record["tensors"] for m in t.get("modules", ())}
    lengths = {name: float(module["norm"]) for name, module in modules.items()}
    foreign = next((name for name in draws.modules if "experts" not in designs[name]), None)
    if foreign is not None:
        return _caution(draws, f"{foreign!r} was merged by a method, and has no posterior.")
    others = sorted({str(designs[name]["coordinates"]) for name in draws.modules} - {draws.surrounds})
    where = others[0].capitalize() if others else ""
    what = f"the merge was solved in {where} coordinates, and these draws are around another point" if where else ""
    if isinstance(draws, SpanDraws) and not draws.through_merge:
        return _around_the_span(draws, lengths, what, lambda: _measured(draws, run, record, task_vectors()))
    if what:
        return _caution(draws, f"{what}. {DRAW_AROUND_IT}")
    for index, name in enumerate(draws.modules):
        if not _same(draws, index, designs[name], modules[name]):
            return _caution(
                draws,
                f"those of {name!r} were drawn under other experts, scales or anchor than this merge was made with, or "
                "from other updates, and are around another merge. Draw around this one: `poe-merge sample --merge`.",
            )
    return surround_verdict(draws)


def _caution(draws: PosteriorDraws, text: str) -> Verdict:
    return Verdict(ABOUT, Level.CAUTION, f"{draws.about}: {text}")


def _around_the_span(
    draws: SpanDraws, lengths: Mapping[str, float], what: str, measured: Callable[[], SpanDraws]
) -> Verdict:
    """Judge draws around the MAP of the updates' span by the merged weights: such draws do not name their design.

    Args:
        draws: The draws.
        lengths: Of the merged update of each module.
        what: What the merge is instead, if it was not solved in the span.
        measured: The draws with their distance from the merged weights, which takes reading them.
    """
    known = draws.from_merge
    if not what and known is not None:
        pairs = zip(known.length.tolist(), (lengths[name] for name in known.modules), strict=True)
        if all(_as_long(drawn, merged) for drawn, merged in pairs):
            return surround_verdict(draws)
    try:
        away = measured()
    except (ValueError, CheckpointError, OSError) as error:
        if what:
            return _caution(draws, f"{what} ({error}). {DRAW_AROUND_IT}")
        text = f"{draws.about}: it is not known whether they are around this merge ({error}). {DRAW_AROUND_IT}"
        return Verdict(ABOUT, Level.UNKNOWN, text)
    if not what:
        return surround_verdict(away)
    level = Level.CAUTION if away.far_from_merge else Level.NOTE
    return Verdict(ABOUT, level, f"{what}. {surround_verdict(away).text}")


def _measured(draws: SpanDraws, run: Path, record: Mapping[str, Any], task_vectors: TaskVectors) -> SpanDraws:
    """The draws with their distance from the merged weights."""
    made = merge_of(record, task_vectors.base)

    def design(tensor: str) -> Design:
        found = made[tensor]
        assert isinstance(found, Design)  # a method's modules have no draws
        return found

    return replace(draws, from_merge=distance_from_merge(draws, task_vectors, design, run))


def _same(draws: PosteriorDraws, index: int, design: Mapping[str, Any], module: Mapping[str, Any]) -> bool:
    """Whether a module was drawn around the merge of this design, of the same updates around the same centre."""
    if not _same_norms(draws.squared_norms[index], design, module) or not _around_as_long(draws, index, module):
        return False
    if isinstance(draws, FullDraws):
        drawn = json.loads(draws.designs[index])
        anchors = [each["anchor"]["precision"] for each in (drawn, design)]
        centers = [each["anchor"]["center"] for each in (drawn, design)]
        return bool(drawn["experts"] == design["experts"] and anchors[0] == anchors[1] and _same_center(*centers))
    # The text leaves out residual maps, the centre and the data that they are made of. The merge's length does not.
    found = float(draws.squared_norms[index, -1].sqrt())
    return draws.designs[index] == _label(design) and _as_long(found, float(module["norm"]))


def _same_norms(squared: Tensor, design: Mapping[str, Any], module: Mapping[str, Any]) -> bool:
    """Whether updates and centre of a module have the lengths that the merge recorded, in the order of the draws."""
    lengths = {each["update"] or each["name"]: each["name"] for each in design["experts"]}
    updates = module.get("retention", {}).get("update_norms", {})
    recorded = [updates.get(expert) for expert in lengths.values()] + [module.get("center_norm")]
    found = squared.sqrt().tolist()
    pairs = zip(found, recorded, strict=False)  # behind them is the merge, or zeros
    return all(known is None or _as_long(here, float(known)) for here, known in pairs)


def _around_as_long(draws: PosteriorDraws, index: int, module: Mapping[str, Any]) -> bool:
    """Whether the merge that the draws were measured from has this one's length, which tells unnamed centres apart.

    True where they were not measured.
    """
    known, name = draws.from_merge, draws.modules[index]
    if known is None or name not in known.modules:
        return True
    return _as_long(float(known.length[known.modules.index(name)]), float(module["norm"]))


def _same_center(drawn: str | None, merged: str | None) -> bool:
    """Whether two centres are alike, where a checkpoint is "checkpoint" to draws and a path to a merge."""
    if drawn == "checkpoint":
        return merged is not None and merged.partition("(")[0] not in METHODS
    return drawn == merged


def _as_long(one: float, other: float) -> bool:
    return abs(one - other) <= RESOLUTION * max(one, other)


def _label(design: Mapping[str, Any]) -> str:
    """A recorded design as ``merge_label`` has it."""
    experts = (f"{e['name']} {e['energy']} {e['scale']} importance {e['importance']:g}" for e in design["experts"])
    return f"{', '.join(experts)}; anchor {design['anchor']['precision']}"
