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
from inference.models.method_design import AnyDesign
from inference.models.model_draws import FullDraws, PosteriorDraws
from inference.models.surrounding import distance_from_merge
from poe_merge.record import design_of
from poe_models.methods import METHODS
from poe_models.weights.loading import Checkpoint, CheckpointError
from poe_models.weights.task_vectors import TaskVectors

DRAW_AROUND_IT = "Draw around it: `poe-merge sample --merge`."
_UNDER_OTHERS = (
    "were drawn under other experts, scales or anchor than this merge was made with, or from other updates, and are "
    "around another merge. Draw around this one: `poe-merge sample --merge`."
)


def beside_verdict(
    draws: PosteriorDraws,
    run: Path,
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
    designs: Callable[[Checkpoint], Mapping[str, AnyDesign]],
    *,
    as_written: bool,
) -> Verdict:
    """Judge draws beside a merge.

    Args:
        draws: Draws of some of its modules.
        run: The merged folder.
        record: Its ``poe_merge.json``.
        task_vectors: Opens base and experts as they were merged.
        designs: The design of each merged tensor, with which the merge can be done again, from the open base.
        as_written: Whether the folder's weights are known to be those that the merge wrote. Otherwise the distance that
            draws keep from then says nothing of them, and is measured again, which takes about as long as the merge.

    Returns:
        The distance of their centre; a caution if they are around something else.
    """
    recorded = {str(m["module"]): design_of(record, t) for t in record["tensors"] for m in t.get("modules", ())}
    modules = {str(m["module"]): m for t in record["tensors"] for m in t.get("modules", ())}
    foreign = next((name for name in draws.modules if "experts" not in recorded[name]), None)
    if foreign is not None:
        return _caution(draws, f"{foreign!r} was merged by a method, and has no posterior.")
    others = sorted({str(recorded[name]["coordinates"]) for name in draws.modules} - {draws.surrounds})
    where = others[0].capitalize() if others else ""
    what = f"the merge was solved in {where} coordinates, and these draws are around another point" if where else ""
    if isinstance(draws, FullDraws) or draws.through_merge:  # those around the MAP of the span do not name their design
        if what:
            return _caution(draws, f"{what}. {DRAW_AROUND_IT}")
        strange = _strange(draws, recorded, modules)
        if strange is not None:
            return _caution(draws, f"those of {strange!r} {_UNDER_OTHERS}")
    lengths = all(_around_as_long(draws, index, modules[name]) for index, name in enumerate(draws.modules))
    if as_written and lengths and draws.from_merge is not None and not what:
        return surround_verdict(draws)
    try:
        away = _measured(draws, run, task_vectors(), designs)
    except (ValueError, CheckpointError, OSError) as error:
        if what:
            return _caution(draws, f"{what} ({error}). {DRAW_AROUND_IT}")
        text = f"{draws.about}: it is not known whether they are around this merge ({error}). {DRAW_AROUND_IT}"
        return Verdict(ABOUT, Level.UNKNOWN, text)
    if not what:
        return surround_verdict(away)
    level = Level.CAUTION if away.far_from_merge else Level.NOTE
    return Verdict(ABOUT, level, f"{what}. {surround_verdict(away).text}")


def _caution(draws: PosteriorDraws, text: str) -> Verdict:
    return Verdict(ABOUT, Level.CAUTION, f"{draws.about}: {text}")


def _measured(
    draws: PosteriorDraws,
    run: Path,
    task_vectors: TaskVectors,
    designs: Callable[[Checkpoint], Mapping[str, AnyDesign]],
) -> PosteriorDraws:
    """The draws with their distance from the merged weights."""
    made = designs(task_vectors.base)

    def design(tensor: str) -> Design:
        found = made[tensor]
        assert isinstance(found, Design)  # a method's modules have no draws
        return found

    return replace(draws, from_merge=distance_from_merge(draws, task_vectors, design, run))


def _strange(
    draws: PosteriorDraws, designs: Mapping[str, Mapping[str, Any]], modules: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Name of the first module that was not drawn around the merge of its design."""
    names = enumerate(draws.modules)
    return next((name for place, name in names if not _same(draws, place, designs[name], modules[name])), None)


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
