"""Checks that experts fit the base and are no copies: names, shapes, settings and tokenizer, then values."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch

from poe_models.weights.checkpoint import Checkpoint, CheckpointError, TensorInfo
from poe_models.weights.loading import same_weights
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.meaning import Meaning, listed
from poe_models.weights.renamed import other_names
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
    meaning, said = Meaning.of(base), dict[str, list[str]]()
    kept = [name for name, treatment in treatments.items() if treatment.action == "base"]
    for expert, checkpoint in experts.items():
        others = other_names(base, checkpoint, kept)
        if others is not None:
            raise CheckpointError(f"`TaskVectors(base, experts)`: expert {expert!r}: {others}")
        said[expert] = _refuse_other_model(base, meaning, expert, checkpoint)
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
            + f"Every expert must be fine-tuned from this base. {_way(treatments, [name for _, name in problems])}"
        )
    _warn_of_settings(base, said)


def _refuse_other_model(base: Checkpoint, meaning: Meaning, expert: str, checkpoint: Checkpoint) -> list[str]:
    """Refuse an expert whose config or tokenizer makes it another model; returns what is only to be warned of."""
    found = list(meaning.differences(Meaning.of(checkpoint)))
    refused = [text for outcome, text in found if outcome == "refused"]
    if refused:
        raise CheckpointError(
            f"`TaskVectors(base, experts)`: expert {expert!r}: {listed(refused)}: weights of equal shapes that are "
            f"another model. Give a model that was fine-tuned from {base.source}, with its tokenizer; correct or "
            "remove these files if they are another model's."
        )
    return [text for outcome, text in found if outcome == "warned"]


def _warn_of_settings(base: Checkpoint, said: Mapping[str, Sequence[str]]) -> None:
    for expert, texts in said.items():
        if texts:
            warnings.warn(
                f"expert {expert!r}: {listed(texts)}. Its weights may mean something else there, and the merge has the "
                f"base's files. Give a model that was fine-tuned from {base.source} with the same ones, or try the "
                "merge on data of this expert.",
                stacklevel=5,
            )


def _way(treatments: Mapping[str, Treatment], names: Sequence[str]) -> str:
    """The rule that keeps tensors at the base, unless none would be left of what the merge is about."""
    used = _used(treatments)
    about = {treatments[name].action for name in used[:1]}
    if about <= {treatments[name].action for name in set(used).difference(names)}:
        rule = suggested_rule(*dict.fromkeys(names[:_IN_A_RULE]))
        return f"To keep the base's tensor, or leave out an expert's, add a rule, here {rule}."
    return "No rule helps: with the base's tensors kept in their place no matrix is left to merge."


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
            if not other.dtype.is_floating_point:
                packed = ": packed weights of a quantised model" if other.shape != info.shape else ""
                yield f"tensor {other.name!r} is {other.dtype}, the base's {info.dtype}{packed}", name
            elif other.shape != info.shape:
                yield f"tensor {other.name!r} is {other.shape}, the base's {info.shape}{_rows(info, other)}", name


def _rows(info: TensorInfo, other: TensorInfo) -> str:
    """Remark on matrices that differ in the number of rows only: a vocabulary was extended or cut."""
    if len(info.shape) != 2 or info.shape[1:] != other.shape[1:]:
        return ""
    return f": {other.shape[0]:,} rows against {info.shape[0]:,}, as of another vocabulary or another head"


def _extra(base: Checkpoint, expert: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    for name in [each for each in expert.tensors if each not in base.tensors]:
        info, names = expert.tensors[name], expert.tied_names(name)
        if info.dtype.is_floating_point and not any(n in base.tensors or n in base.aliases for n in names):
            yield name, info


def keys_of(base: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    """Canonical names in the expert of a tensor of the base, which it may hold under any of the tied names.

    None if it lacks the tensor, several if it stores tied names apart.
    """
    if not base.aliases and name in expert.tensors:
        return [name]
    keys = (expert.aliases.get(tied, tied) for tied in base.tied_names(name))
    return list(dict.fromkeys(key for key in keys if key in expert.tensors))


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
    """Return whether a tensor has the base's values, perhaps rounded to the expert's narrower dtype."""
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
