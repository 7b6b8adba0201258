"""Patterns that fit nothing, in all likelihood misspelt: warnings with the nearest name."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.rule import Rule
from poe_models.weights.rules import ALL_TENSORS, DEFAULT_RULES, NO_WEIGHTS, RuleTable, Treatment, unchangeable


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


Fitted = Sequence[tuple[Rule, Sequence[TensorInfo]]]
"""Rules, each with the tensors that it fits."""


def fitted_by(rules: RuleTable, base: Checkpoint, model_type: str | None) -> Fitted:
    """The user's rules of a table, each with the tensors of the base that it fits."""
    own = [rule for rule in rules.rules if rule not in (*DEFAULT_RULES.rules, *ALL_TENSORS.rules)]
    named = [(base.tied_names(name), info) for name, info in base.tensors.items() if own]
    return [(rule, [info for names, info in named if rule.applies(names, info, model_type)]) for rule in own]


def warn_of_rules(base: Checkpoint, fitted: Fitted, treatments: Mapping[str, Treatment]) -> None:
    """Warn of rules that change nothing, and where no matrix is merged.

    Args:
        base: The base.
        fitted: The user's rules with the tensors that they fit.
        treatments: The treatment of each tensor.
    """
    every = [name for tensor in base.tensors for name in base.tied_names(tensor)]
    for rule, tensors in fitted:
        text = f"the rule {{match: {rule.match}, action: {rule.action}}}"
        if not tensors:
            warnings.warn(
                f"{text} fits no tensor of the base. "
                f"{nearest_part(rule.match, every)}`poe-merge plan` and `treatments` list them.",
                stacklevel=4,
            )
        elif rule.action != "base" and all(map(unchangeable, tensors)):
            warnings.warn(
                f"{text} changes nothing: it fits {tensors[0].name!r}, {treatments[tensors[0].name].reason}, and no "
                "tensor that can be merged or averaged. Take it out, or match weights.",
                stacklevel=4,
            )
    weights = [name for name, info in base.tensors.items() if info.dtype.is_floating_point]
    about = [treatments[name] for name in weights if treatments[name].reason not in NO_WEIGHTS]
    averaged = [treatment for treatment in about if treatment.action == "average"]
    if not about or any(treatment.action == "merge" for treatment in about):
        return
    if averaged:
        text = (
            f"no matrix is merged: {len(averaged)} tensors are averaged, the first by '{averaged[0].reason}', and "
            f"{len(about) - len(averaged)} kept. `poe-merge plan` lists why."
        )
    else:
        text = (
            f"the rules keep all {len(about)} tensors of the base, the first by '{about[0].reason}', so that the merge "
            "is the base. Make them more specific."
        )
    warnings.warn(text, stacklevel=4)
