"""A check that the experts fit the base, from headers alone; all problems are one error."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from poe_models.weights.architectures import refuse_other_architecture
from poe_models.weights.checkpoint import Checkpoint, CheckpointError, TensorInfo
from poe_models.weights.loading import same_weights
from poe_models.weights.rules import RuleTable, Treatment

_SHOWN, _IN_A_RULE = 5, 100


def refuse_misfits(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    treatments: Mapping[str, Treatment],
    rules: RuleTable,
    model_type: str | None,
) -> None:
    """Refuse an expert that is the base, lacks a tensor, has one too many, or has one of another shape.

    Tensors that stay the base's may differ or be absent, and so may integer buffers. ``treatments`` are those of the
    base's tensors; the ``rules`` decide about tensors that only an expert has.
    """
    problems: list[tuple[str, str]] = []
    for expert, checkpoint in experts.items():
        _refuse_foreign_names(base, expert, checkpoint)
        refuse_other_architecture(base, expert, checkpoint)
        if same_weights(checkpoint, base):
            raise CheckpointError(
                f"`TaskVectors(base, experts)`: expert {expert!r} is the base itself ({base.source}), so that its "
                "update is zero. Give models that were fine-tuned from the base."
            )
        problems += [(f"expert {expert!r}: {text}", name) for text, name in _misfits(base, checkpoint, treatments)]
        problems += [
            (f"expert {expert!r}: tensor {name!r} {info.shape} is not in the base", name)
            for name, info in _extra(base, checkpoint)
            if (rule := rules.deciding(info, model_type)) is None or rule.action != "base"
        ]
    if problems:
        raise CheckpointError(
            f"`TaskVectors(base, experts)`: {len(problems)} {'tensor does' if len(problems) == 1 else 'tensors do'} "
            f"not fit {base.source}{f', the first {_SHOWN} are' if len(problems) > _SHOWN else ''}:\n"
            + "".join(f"  - {text}\n" for text, _ in problems[:_SHOWN])
            + "Every expert must be fine-tuned from this base. To keep the base's tensor, or leave out an expert's, "
            f"add a rule, here {suggested_rule(*dict.fromkeys(name for _, name in problems[:_IN_A_RULE]))}."
        )


def _refuse_foreign_names(base: Checkpoint, expert: str, checkpoint: Checkpoint) -> None:
    """Refuse an expert none of whose names is the base's: rules would only leave the base."""
    known = {*base.tensors, *base.aliases}
    if not known.isdisjoint({*checkpoint.tensors, *checkpoint.aliases}):
        return
    prefix = _prefix(known, checkpoint.tensors)
    if prefix is not None:
        ours, theirs = ("lack", "have") if prefix[1] else ("have", "lack")
        way = (
            f"its names {theirs} {prefix[0]!r} in front, which the base's {ours}: one of them was saved from a wrapped "
            f"or a bare model. Save it again with the base's names: {{{_renaming(*prefix)}: tensor for name, tensor in "
            "state_dict.items()}"
        )
    else:
        way = "give a model that was fine-tuned from this base"
    raise CheckpointError(
        f"`TaskVectors(base, experts)`: expert {expert!r}: none of its tensors ({next(iter(checkpoint.tensors))!r}, "
        f"...) has a name of {base.source} ({next(iter(base.tensors))!r}, ...); {way}."
    )


def _prefix(base: Collection[str], expert: Collection[str]) -> tuple[str, bool] | None:
    """The prefix by which most names differ (one may have a head more), and whether it is the expert's."""
    for short, long, of_expert in ((base, expert, True), (expert, base, False)):
        known = set(short)
        ends = ((name, dot.end()) for name in long for dot in re.finditer(r"\.", name))
        found = Counter(name[:end] for name, end in ends if name[end:] in known)
        if found:
            prefix, count = found.most_common(1)[0]
            if 2 * count > min(len(short), len(long)):
                return prefix, of_expert
    return None


def _renaming(prefix: str, of_expert: bool) -> str:
    return f"name.removeprefix({prefix!r})" if of_expert else f"{prefix!r} + name"


def suggested_rule(*names: str) -> str:
    r"""The rule that keeps some tensors at the base and no others, in YAML's inline form.

    >>> print(suggested_rule("embed_tokens.weight"))
    {match: '^embed_tokens\.weight$', action: base}
    """
    quoted = "|".join(map(re.escape, names))
    match = f"^({quoted})$" if len(names) > 1 else f"^{quoted}$"
    # only YAML's double quotes, which are JSON's, can write control characters
    text = "'" + match.replace("'", "''") + "'" if match.isprintable() else json.dumps(match)
    return f"{{match: {text}, action: base}}"


def _misfits(base: Checkpoint, expert: Checkpoint, treatments: Mapping[str, Treatment]) -> Iterator[tuple[str, str]]:
    for name, info in base.tensors.items():
        if treatments[name].action == "base":
            continue
        found = [expert.tensors[key] for key in keys_of(base, expert, name)]
        if not found:
            yield f"tensor {name!r} {info.shape} is missing", name
        for other in found:
            if other.shape != info.shape:
                yield f"tensor {other.name!r} is {other.shape}, the base's {info.shape}{_rows(info, other)}", name
            elif not other.dtype.is_floating_point:
                yield f"tensor {other.name!r} is {other.dtype}, the base's {info.dtype}", name


def _rows(info: TensorInfo, other: TensorInfo) -> str:
    """Advice about a vocabulary that was extended or cut: matrices that differ in the number of rows only."""
    if len(info.shape) != 2 or info.shape[1:] != other.shape[1:]:
        return ""
    return (
        f": {other.shape[0]:,} rows against {info.shape[0]:,}. If this is another vocabulary or another head, keep the "
        f"base's with the rule {suggested_rule(info.name)}"
    )


def _extra(base: Checkpoint, expert: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in expert.tensors.items():
        names = expert.tied_names(name)
        if info.dtype.is_floating_point and not any(n in base.tensors or n in base.aliases for n in names):
            yield name, info


def keys_of(base: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    """Canonical names in the expert of a tensor of the base, which it may hold under any of the tied names.

    None if it lacks the tensor, several if it stores tied names apart.
    """
    keys = (expert.aliases.get(tied, tied) for tied in base.tied_names(name))
    return list(dict.fromkeys(key for key in keys if key in expert.tensors))
