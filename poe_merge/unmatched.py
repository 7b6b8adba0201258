"""Words and patterns of a configuration that fit no tensor: in all likelihood misspelt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from poe_merge.config import MergeConfig, ModelParameters
from poe_merge.specs import nearest

if TYPE_CHECKING:
    from poe_models.weights.task_vectors import TaskVectors


def unmatched(settings: MergeConfig, task_vectors: TaskVectors) -> Iterator[str]:
    """Rules that fit no tensor of the base, and filters that fit none that is merged or averaged.

    Args:
        settings: The configuration.
        task_vectors: Base and experts.

    Yields:
        A sentence about each, with the nearest name.
    """
    base = task_vectors.base
    every = [name for tensor in base.tensors for name in base.tied_names(tensor)]
    for rule in task_vectors.unused_rules:
        if rule.to_dict() in settings.rules:
            yield (
                f"the rule {{match: {rule.match}, action: {rule.action}}} fits no tensor of the base. "
                f"{nearest_part(rule.match, every)}`poe-merge plan` lists them."
            )
    changed = [name for name, treatment in task_vectors.treatments.items() if treatment.action != "base"]
    for word, where in _filters(settings).items():
        if not any(word in name for name in changed):
            yield (
                f"the filter {word!r} of {where} fits no tensor that is merged or averaged. "
                f"{nearest_part(word, changed)}`poe-merge plan` lists them."
            )


def nearest_part(word: str, names: Iterable[str]) -> str:
    r"""Hint for a misspelt pattern: the nearest part of a tensor's name, or nothing.

    >>> nearest_part(r"layers\.0\.atn", ["layers.0.attn.weight"])
    'Did you mean `attn`? '
    """
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for piece in reversed(re.findall(r"[A-Za-z_]\w+", word.replace("\\", " "))):
        if piece not in parts and (hint := nearest(piece, parts)):
            return hint[0].upper() + hint[1:]
    return ""


def _filters(settings: MergeConfig) -> dict[str, str]:
    """Words of filters, each with the key that it is written at."""
    sections: list[tuple[str, ModelParameters]] = [("parameters", settings.parameters)]
    sections += [(f"models.{entry.label}", entry.parameters) for entry in settings.models]
    return {
        word: f"{section}.{key}"
        for section, parameters in sections
        for key, setting in parameters.settings().items()
        for word, _ in setting.cases
        if word is not None
    }
