"""The base given again as an expert: recognised by its values, whatever its files, shards and dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from poe_models.weights.checkpoint import Checkpoint, CheckpointError
from poe_models.weights.fitting import keys_of
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import Treatment


def refuse_copies(base: Checkpoint, experts: Mapping[str, Checkpoint], treatments: Mapping[str, Treatment]) -> None:
    """Refuse an expert whose tensors all have the base's values; the first that differs ends the reading.

    Raises:
        CheckpointError: If there is one; names it.
    """
    used = [name for name, treatment in treatments.items() if treatment.action != "base"]
    used.sort(key=lambda name: treatments[name].action != "merge")  # fine-tuning changed these in all likelihood
    for expert, checkpoint in experts.items():
        changed = used
        if isinstance(checkpoint, LoraCheckpoint):
            changed = [name for name in used if checkpoint.changes(name)]
        if used and all(_same(base, checkpoint, name) for name in changed):
            raise CheckpointError(
                f"expert {expert}: {checkpoint.source} holds the same weights as the base {base.source}, so that its "
                "update is zero. Give models that were fine-tuned from the base."
            )


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
