"""Records of what Span statistics are about: written beside them, and compared before they are used again."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from inference.models.design import Design, Designs, as_function, design_text
from inference.models.digest import difference
from inference.models.modules import checked_names, merged_tensors
from poe_models.span_labels import center_label
from poe_models.weights.loading import CheckpointError
from poe_models.weights.task_vectors import TaskVectors

_CONFIG = "config.json"
"""Says how tensors are treated, which is compared by itself."""
_Kind = tuple[tuple[str, ...], tuple[str, ...], str, str]
"""Names of the task vectors, residual maps, centre, and the coordinates that the merge is solved in."""


def families(task_vectors: TaskVectors, designs: Designs) -> list[list[str]]:
    """Group merged tensors by updates, maps and centre of their designs: each group has one set of statistics.

    Raises:
        ValueError: If nothing is merged, or a design does not fit the task vectors.
    """
    found: dict[_Kind, list[str]] = {}
    for name, kind in _kinds(task_vectors, _designs(task_vectors, designs)).items():
        found.setdefault(kind, []).append(name)
    return list(found.values())


def family_of(task_vectors: TaskVectors, designs: Designs, tensors: Collection[str] | None = None) -> dict[str, Design]:
    """The design of each merged tensor by its name, once all are known to be about the same updates, maps and centre.

    Raises:
        ValueError: If nothing is merged, or the designs do not fit the task vectors or each other.
    """
    found = _designs(task_vectors, designs)
    found = {name: design for name, design in found.items() if tensors is None or name in tensors}
    kinds = _kinds(task_vectors, found)
    first = next(iter(found))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise ValueError(
                f"`collect_statistics(...)`: tensor {name!r} has {_shown(kind)}; tensor {first!r} has "
                f"{_shown(kinds[first])}. One set of statistics has one kind of expert: give all tensors the same, or "
                "make two sets, each with a rule that keeps the other tensors. `poe-merge sample` without --stats "
                "makes them on the way."
            )
    return found


def describe(task_vectors: TaskVectors, designs: Designs) -> dict[str, Any]:
    """Describe from headers what decides statistics besides the contents of the checkpoints, as plain data.

    That is task vectors, maps, centre, the merge that the span goes through (None where the merge itself is solved in
    Span coordinates), the dtype of the updates, and each tensor's matrices.
    """
    family = family_of(task_vectors, designs)
    tensor, design = next(iter(family.items()))
    updates, maps, center, coordinates = _kind(task_vectors, tensor, design)
    return {
        "updates": list(updates),
        "residual_maps": list(maps),
        "center": center,
        "coordinates": coordinates,
        "dtype": str(task_vectors.dtype).removeprefix("torch."),
        "tensors": {name: str(task_vectors.treatments[name].view) for name in family},
        "merge": _merges(family) if coordinates == "full" else None,
    }


def require_same(path: object, record: Mapping[str, Any], about: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse statistics at a path if their record is not about these inputs and this description of a design.

    Raises:
        CheckpointError: If something differs, or nothing was recorded; names it.
    """
    if record.get("about") is None or record.get("inputs") is None:
        raise CheckpointError(
            f"{path}: nothing is recorded about what these statistics were made from. Make them with `poe-merge stats`."
        )
    if found := difference(record["about"], about):
        place, before, now = found[0]
        raise CheckpointError(
            f"{path}: these statistics are about another design: {place} was {before}, now it is {now}. Make "
            "the statistics again with `poe-merge stats`, or give the settings that they were made with."
        )
    changed = changed_input(record["inputs"], inputs)
    if changed is not None:
        raise CheckpointError(
            f"{path}: these statistics were made from other checkpoints: {changed}. Make the statistics again with "
            "`poe-merge stats`, or give the checkpoints that they were made from."
        )


def changed_input(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first checkpoint whose digests differ, in words; None if all are the same."""
    old, new = _contents(before), _contents(now)
    differing = (role for role in dict.fromkeys([*old, *new]) if old.get(role) != new.get(role))
    role = next(differing, None)
    return None if role is None else _changed(role, old, new)


def _designs(task_vectors: TaskVectors, designs: Designs) -> dict[str, Design]:
    """The design of each merged tensor."""
    for_tensor = as_function(designs)
    return {name: for_tensor(name) for name in merged_tensors(task_vectors)}


def _kinds(task_vectors: TaskVectors, designs: Mapping[str, Design]) -> dict[str, _Kind]:
    return {name: _kind(task_vectors, name, each) for name, each in designs.items()}


def _kind(task_vectors: TaskVectors, tensor: str, design: Design) -> _Kind:
    names = checked_names(task_vectors, tensor, design)
    maps = tuple(repr(expert.residual_map) for expert in design.poe.experts)
    return names, maps, center_label(design.span_product.anchor.center), design.coordinates


def _merges(family: Mapping[str, Design]) -> list[dict[str, Any]]:
    """Designs that decide the merge in Full coordinates, each with its tensors."""
    found: dict[str, list[str]] = {}
    for name, design in family.items():
        found.setdefault(design_text(design, solver=True), []).append(name)
    return [{**json.loads(text), "tensors": names} for text, names in found.items()]


def _shown(kind: _Kind) -> str:
    return f"{', '.join(kind[1])} on {', '.join(kind[0])} around the centre {kind[2]}, merged in {kind[3]} coordinates"


def _contents(inputs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Digests of the files that decide statistics, by role; anchors by number, for their role has their path."""
    anchors = [role for role in inputs if role.startswith("anchor ")]
    return {
        f"anchor {anchors.index(role) + 1}" if role in anchors else role: {
            name: digest for name, digest in entry["sha256"].items() if name != _CONFIG
        }
        for role, entry in inputs.items()
        if role != "code"
    }


def _changed(role: str, before: Mapping[str, dict[str, str]], now: Mapping[str, dict[str, str]]) -> str:
    if role not in before or role not in now:
        return f"the {role} {'is new' if role in now else 'is not there any more'}"
    old, new = before[role], now[role]
    file = next(name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name))
    shown = [f"{each[file][:12]}..." if file in each else "missing" for each in (old, new)]
    return f"{file} of the {role} has the sha256 {shown[1]} and had {shown[0]}"
