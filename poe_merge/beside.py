"""Draws beside a merged folder: are they draws around this merge, and how far is their centre from it?"""

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
from poe_merge.recorded import merge_of
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
        draws: Of some of its modules.
        run: The merged folder.
        record: Its `poe_merge.json`.
        task_vectors: Opens base and experts as they were merged.

    Returns:
        Where their centre is; a caution if they are around something else.
    """
    designs = {str(m["module"]): _design(record, t) for t in record["tensors"] for m in t.get("modules", ())}
    modules = {str(m["module"]): m for t in record["tensors"] for m in t.get("modules", ())}
    lengths = {name: float(module["norm"]) for name, module in modules.items()}
    for name in draws.modules:
        if "experts" not in designs[name]:
            return Verdict(
                ABOUT, Level.CAUTION, f"{draws.about}: {name!r} was merged by a method, and has no posterior."
            )
        if designs[name]["coordinates"] != draws.surrounds:
            return _elsewhere(draws, str(designs[name]["coordinates"]), run, record, task_vectors)
    if isinstance(draws, SpanDraws) and not draws.through_merge:
        return _around_the_span(draws, lengths, run, record, task_vectors)
    for index, name in enumerate(draws.modules):
        if not _same(draws, index, designs[name], modules[name]):
            text = (
                f"{draws.about}: those of {name!r} were drawn under other experts, scales or anchor than this merge "
                "was made with, or from other updates, and are around another merge. Draw around this one: "
                "`poe-merge sample --merge`."
            )
            return Verdict(ABOUT, Level.CAUTION, text)
    return surround_verdict(draws)


def _elsewhere(
    draws: PosteriorDraws,
    coordinates: str,
    run: Path,
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
) -> Verdict:
    """Draws around the MAP of other coordinates than the merge's, with the distance where it can be measured."""
    merged = {"full": "Full", "span": "Span"}[coordinates]
    what = f"the merge was solved in {merged} coordinates, and these draws are around another point"
    if isinstance(draws, SpanDraws) and not draws.through_merge:
        try:
            away = _measured(draws, run, record, task_vectors)
        except (ValueError, CheckpointError, OSError) as error:
            what = f"{what} ({error})"
        else:
            level = Level.CAUTION if away.far_from_merge else Level.NOTE
            return Verdict(ABOUT, level, f"{what}. {surround_verdict(away).text}")
    return Verdict(ABOUT, Level.CAUTION, f"{draws.about}: {what}. {DRAW_AROUND_IT}")


def _around_the_span(
    draws: SpanDraws,
    lengths: Mapping[str, float],
    run: Path,
    record: Mapping[str, Any],
    task_vectors: Callable[[], TaskVectors],
) -> Verdict:
    """Draws and merge in Span coordinates: these draws do not say of which design they are, so the weights have to."""
    known = draws.from_merge
    if known is not None and all(
        _as_long(float(length), lengths[name]) for name, length in zip(known.modules, known.length, strict=True)
    ):
        return surround_verdict(draws)
    try:
        return surround_verdict(_measured(draws, run, record, task_vectors))
    except (ValueError, CheckpointError, OSError) as error:
        text = f"{draws.about}: it is not known whether they are around this merge ({error}). {DRAW_AROUND_IT}"
        return Verdict(ABOUT, Level.UNKNOWN, text)


def _measured(
    draws: SpanDraws, run: Path, record: Mapping[str, Any], task_vectors: Callable[[], TaskVectors]
) -> SpanDraws:
    """The draws with their distance from the merged weights."""
    vectors = task_vectors()
    made = merge_of(record, vectors.base)

    def design(tensor: str) -> Design:
        found = made[tensor]
        assert isinstance(found, Design)  # a method's modules have no draws
        return found

    return replace(draws, from_merge=distance_from_merge(draws, vectors, design, run))


def _same(draws: PosteriorDraws, index: int, design: Mapping[str, Any], module: Mapping[str, Any]) -> bool:
    """Whether a module was drawn around the merge of this design, of the same updates around the same centre."""
    if not _same_norms(draws.squared_norms[index], design, module):
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
    updates = module["retention"]["update_norms"]
    recorded = [updates.get(expert) for expert in lengths.values()] + [module.get("center_norm")]
    found = squared.sqrt().tolist()
    pairs = zip(found, recorded, strict=False)  # behind them is the merge, or zeros
    return all(known is None or _as_long(here, float(known)) for here, known in pairs)


def _same_center(drawn: str | None, merged: str | None) -> bool:
    """Whether two centres are alike, where a checkpoint is "checkpoint" to draws and a path to a merge."""
    if drawn == "checkpoint":
        return merged is not None and merged.partition("(")[0] not in METHODS
    return drawn == merged


def _as_long(one: float, other: float) -> bool:
    return abs(one - other) <= RESOLUTION * max(one, other)


def _label(design: Mapping[str, Any]) -> str:
    """A recorded design as `merge_label` has it."""
    experts = (f"{e['name']} {e['energy']} {e['scale']} importance {e['importance']:g}" for e in design["experts"])
    return f"{', '.join(experts)}; anchor {design['anchor']['precision']}"


def _design(record: Mapping[str, Any], tensor: Mapping[str, Any]) -> Mapping[str, Any]:
    design: Mapping[str, Any] = record["designs"][tensor["design"]]
    return design
