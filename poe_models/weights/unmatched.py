"""Patterns that fit nothing, in all likelihood misspelt: warnings with the nearest name."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping

from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.rule import Rule
from poe_models.weights.rules import NO_WEIGHTS, Treatment


def nearest_part(word: str, names: Iterable[str]) -> str:
    r"""Hint for a misspelt pattern: the nearest part of a tensor's name, or nothing.

    >>> nearest_part(r"layers\.0\.atn", ["layers.0.attn.weight"])
    'Did you mean `attn`? '
    """
    parts = {part.lower(): part for name in names for part in name.split(".") if not part.isdigit()}
    for piece in reversed(re.findall(r"[A-Za-z_]\w+", word.replace("\\", " "))):
        close = difflib.get_close_matches(piece.lower(), parts, n=1, cutoff=0.5)
        if close and piece not in parts.values():
            return f"Did you mean `{parts[close[0]]}`? "
    return ""


def warn_of_rules(base: Checkpoint, unused: Iterable[Rule], treatments: Mapping[str, Treatment]) -> None:
    """Warn of rules that fit no tensor of the base, and of rules that keep all of them."""
    every = [name for tensor in base.tensors for name in base.tied_names(tensor)]
    for rule in unused:
        warnings.warn(
            f"the rule {{match: {rule.match}, action: {rule.action}}} fits no tensor of the base. "
            f"{nearest_part(rule.match, every)}`poe-merge plan` and `treatments` list them.",
            stacklevel=4,
        )
    weights = [name for name, info in base.tensors.items() if info.dtype.is_floating_point]
    kept = [treatments[name] for name in weights if treatments[name].reason not in NO_WEIGHTS]
    if kept and all(treatment.action == "base" for treatment in kept):
        warnings.warn(
            f"the rules keep all {len(kept)} tensors of the base, the first by '{kept[0].reason}', so that the merge "
            "is the base. Make them more specific.",
            stacklevel=4,
        )
