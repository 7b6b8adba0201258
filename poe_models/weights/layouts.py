"""Layout of matrices in checkpoints, also of unknown model types: (out, in) as linear layers have it, or (in, out).

A bias is as long as the output: of a matrix that is not square it says which axis that is. Of square ones and those
without a bias, the names of GPT-2's layers and the other matrices of the same role or block do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.fitting import suggested_rule
from poe_models.weights.rules import ALL_TENSORS, DEFAULT_RULES, RuleTable, Treatment

_NAMED = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_SHOWN = 3


def stored_in_out(checkpoint: Checkpoint) -> Mapping[str, bool]:
    """Matrices that are not plainly (out, in), whatever the model type.

    Returns:
        True for those that are (in, out), False where nothing tells and names or neighbours give reason to ask.
    """
    matrices = {
        name: info
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype.is_floating_point
    }
    known = {name: side for name, info in matrices.items() if (side := _side(checkpoint, info)) is not None}
    found = {name: True for name, turned in known.items() if turned}
    if not found and not any(map(_NAMED.search, matrices)):
        return {}
    groups = _sides(known)
    for name in matrices.keys() - known.keys():
        named, biased = _NAMED.search(name) is not None, _bias(checkpoint, name) is not None
        if not (named or biased):
            continue  # heads and projections, which are linear layers in models of either kind
        sides = next((groups[key] for key in _keys(name) if len(groups.get(key, ())) == 1), None)
        if sides != {False}:
            found[name] = sides == {True}
    return found


def _bias(checkpoint: Checkpoint, name: str) -> int | None:
    """Length of the bias beside a matrix, or None."""
    info = checkpoint.tensors.get(f"{name.removesuffix('weight')}bias")
    return info.shape[0] if info is not None and len(info.shape) == 1 else None


def _side(checkpoint: Checkpoint, info: TensorInfo) -> bool | None:
    """Whether a matrix is (in, out), by its bias or else by its name and shape; None if they do not tell."""
    rows, columns = info.shape
    bias = _bias(checkpoint, info.name)
    if rows == columns:
        return None
    if bias in (rows, columns):
        return bias == columns
    if info.name.endswith(".c_attn.weight") and 3 in (rows / columns, columns / rows):
        return columns > rows
    return columns > rows if info.name.endswith(".mlp.c_fc.weight") else None


def _sides(known: Mapping[str, bool]) -> Mapping[str, set[bool]]:
    """The layouts of matrices of each role, block and model."""
    groups: dict[str, set[bool]] = {}
    for name, side in known.items():
        for key in _keys(name):
            groups.setdefault(key, set()).add(side)
    return groups


def _keys(name: str) -> tuple[str, str, str]:
    """Role, block and model of a matrix: its siblings agree with it, the nearest first."""
    module = name.removesuffix(".weight")
    return f"role {module.rpartition('.')[2]}", f"block {module.rpartition('.')[0]}", "model"


def turned(rules: RuleTable, info: TensorInfo, model_type: str | None, treatment: Treatment) -> Treatment:
    """The treatment of a matrix that is (in, out): that of its transpose, unless a user's rule says how it is seen.

    Args:
        rules: The table.
        info: Header of the matrix.
        model_type: As of ``RuleTable.treat``.
        treatment: What the table says of it as it is stored.

    Returns:
        A treatment that is merged as the transpose would be, or the one given.
    """
    view = treatment.view
    if view is None or view.vector or view.transpose or viewed_by_user(rules, info, model_type):
        return treatment
    other = rules.treat(replace(info, shape=info.shape[::-1]), model_type)
    if other.view is None:
        return treatment
    reason = f"{other.reason}, stored (in, out) as biases or neighbours say"
    return Treatment("merge", replace(other.view, transpose=True).fitted(info.shape), reason)


def viewed_by_user(rules: RuleTable, info: TensorInfo, model_type: str | None) -> bool:
    """Return whether a rule of the user's says how a matrix is seen."""
    rule = rules.deciding(info, model_type)
    return rule is not None and rule.view is not None and rule not in (*DEFAULT_RULES.rules, *ALL_TENSORS.rules)


def warn_of_unclear(names: Iterable[str]) -> None:
    """Warn of matrices of which nothing says how they lie, and say how to."""
    unclear = list(names)
    if not unclear:
        return
    shown = ", ".join(map(repr, unclear[:_SHOWN])) + (", ..." if len(unclear) > _SHOWN else "")
    rule = suggested_rule(*unclear).removesuffix("base}") + "merge, view: {transpose: true}}"
    warnings.warn(
        f"{len(unclear)} matrices may be stored (in, out), and neither a bias nor a neighbour tells: {shown}. They are "
        f"taken for (out, in). If they are (in, out), say so by the rule {rule}; if not, with `view: {{}}` in it.",
        stacklevel=4,
    )
