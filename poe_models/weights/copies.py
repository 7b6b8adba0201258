"""A model given twice: recognised by its values, whatever its files, shards and dtype."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations

import torch

from poe_models.weights.checkpoint import Checkpoint, CheckpointError
from poe_models.weights.fitting import keys_of
from poe_models.weights.loading import same_weights
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import Treatment


def refuse_copies(base: Checkpoint, experts: Mapping[str, Checkpoint], treatments: Mapping[str, Treatment]) -> None:
    """Refuse an expert whose tensors all have the base's values; the first that differs ends the reading.

    Raises:
        CheckpointError: If there is one; names it.
    """
    used = _used(treatments)
    for expert, checkpoint in experts.items():
        changed = used
        if isinstance(checkpoint, LoraCheckpoint):
            changed = [name for name in used if checkpoint.changes(name)]
        if used and all(_same(base, checkpoint, name) for name in changed):
            raise CheckpointError(
                f"expert {expert}: {checkpoint.source} holds the same weights as the base {base.source}, so that its "
                "update is zero. Give models that were fine-tuned from the base."
            )


def warn_of_one_model(experts: Mapping[str, Checkpoint]) -> None:
    """Warn of experts that are the same files."""
    for (one, first), (other, second) in combinations(experts.items(), 2):
        if first.files and same_weights(first, second):
            _warn(one, other, second)


def warn_of_copies(base: Checkpoint, experts: Mapping[str, Checkpoint], treatments: Mapping[str, Treatment]) -> None:
    """Warn of experts of other files with the same values; the first tensor that differs ends the reading."""
    used = _used(treatments)
    for (one, first), (other, second) in combinations(experts.items(), 2):
        kinds = {isinstance(each, LoraCheckpoint) for each in (first, second)}
        apart = not first.files or not second.files or same_weights(first, second) or len(kinds) > 1
        if used and not apart and all(_equal(base, first, second, name) for name in used):
            _warn(one, other, second)


def _warn(one: str, other: str, checkpoint: Checkpoint) -> None:
    warnings.warn(
        f"the experts {one!r} and {other!r} are the same model ({checkpoint.source}), which counts twice. Leave one "
        "out, or give it once with weight 2.",
        stacklevel=4,
    )


def _used(treatments: Mapping[str, Treatment]) -> list[str]:
    """Tensors that are merged or averaged; first those that fine-tuning changed in all likelihood."""
    used = [name for name, treatment in treatments.items() if treatment.action != "base"]
    return sorted(used, key=lambda name: treatments[name].action != "merge")


def _equal(base: Checkpoint, first: Checkpoint, second: Checkpoint, name: str) -> bool:
    pairs = zip(keys_of(base, first, name), keys_of(base, second, name), strict=False)
    return all(torch.equal(first.read(one), second.read(other)) for one, other in pairs)


def _same(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    """Return whether a tensor has the base's values, or what rounding to the expert's narrower dtype makes of them."""
    ours = base.read(name)
    for key in keys_of(base, expert, name):
        theirs = expert.read(key)
        if theirs.dtype.itemsize < ours.dtype.itemsize:
            alike = torch.equal(ours.to(theirs.dtype), theirs)
        else:
            wide = torch.promote_types(ours.dtype, theirs.dtype)
            alike = torch.equal(ours.to(wide), theirs.to(wide))
        if not alike:
            return False
    return True
