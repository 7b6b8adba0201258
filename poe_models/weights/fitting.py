"""Checks that experts fit the base and are no copies: names, shapes, architecture and tokenizer, then values."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from poe_models.weights.checkpoint import Checkpoint, CheckpointError, TensorInfo
from poe_models.weights.loading import same_weights
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import RuleTable, Treatment

_SHOWN, _IN_A_RULE, _DEEPEST = 5, 100, 12


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
        _refuse_foreign_names(base, expert, checkpoint, treatments)
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


def _refuse_foreign_names(
    base: Checkpoint, expert: str, checkpoint: Checkpoint, treatments: Mapping[str, Treatment]
) -> None:
    """Refuse an expert whose names differ from the base's by a part, or are all others: rules would leave the base.

    Some names may be shared, as a head that was never below the wrapper.
    """
    known, theirs = {*base.tensors, *base.aliases}, {*checkpoint.tensors, *checkpoint.aliases}
    missing, extra, shared = known - theirs, theirs - known, not known.isdisjoint(theirs)
    if shared:
        missing -= {name for name, treatment in treatments.items() if treatment.action == "base"}
    part = _part(missing, extra)
    if not missing or not extra or (part is None and shared):
        return
    if part is not None:
        text, of_expert = part
        has, lacks = ("have", "lack") if of_expert else ("lack", "have")
        way = (
            f"its names {has} {text!r} in them, which the base's {lacks}: one of them was saved from a wrapped or a "
            f"bare model. Save it again with the base's names, `base` being the base's state dict: "
            f"{_renaming(text, of_expert)}"
        )
    else:
        way = "give a model that was fine-tuned from this base"
    raise CheckpointError(
        f"`TaskVectors(base, experts)`: expert {expert!r}: {len(extra)} of its {len(theirs)} tensors ({min(extra)!r}, "
        f"...) have no name of {base.source} ({min(missing)!r}, ...); {way}."
    )


def _part(base: Collection[str], expert: Collection[str]) -> tuple[str, bool] | None:
    """The part of names, in front or in between, by which most of them differ, and whether the expert has it."""
    for short, long, of_expert in ((base, expert, True), (expert, base, False)):
        known, found = set(short), Counter[str]()
        for name in long:
            cuts = [0, *(dot.end() for dot in re.finditer(r"\.", name))][:_DEEPEST]
            found.update({name[i:j] for i, j in combinations(cuts, 2) if name[:i] + name[j:] in known})
        if found:
            part, count = found.most_common(1)[0]
            if 2 * count > min(len(short), len(long)):
                return part, of_expert
    return None


def _renaming(part: str, of_expert: bool) -> str:
    """Python that gives an expert's state dict the base's names."""
    if of_expert:
        return f"{{name if name in base else name.replace({part!r}, '', 1): state_dict[name] for name in state_dict}}"
    return f"{{name: state_dict[name if name in state_dict else name.replace({part!r}, '', 1)] for name in base}}"


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


# Settings that change what weights of the same shapes compute. Those that a fine-tune may change (lengths, labels,
# dropout, rotary bases) are not among them.
_SETTINGS = (
    "model_type",
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "encoder_attention_heads"),
    *("decoder_attention_heads", "hidden_act", "activation_function", "hidden_activation", "position_embedding_type"),
)


def refuse_other_architecture(base: Checkpoint, expert: str, checkpoint: Checkpoint) -> None:
    """Refuse an expert whose config or tokenizer says that its weights mean something else than the base's.

    Args:
        base: The base.
        expert: Name of the expert.
        checkpoint: The expert.

    Raises:
        CheckpointError: If a setting differs, or a token has another number.
    """
    one, other = base.config or {}, checkpoint.config or {}
    for key in _SETTINGS:
        ours, theirs = one.get(key), other.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"`TaskVectors(base, experts)`: expert {expert!r}: its config.json has `{key}` {theirs!r}, the base's "
                f"{ours!r}: weights of equal shapes that are another model. Give a model that was fine-tuned from "
                f"{base.source}; correct the config if it is one."
            )
    known, its = vocabulary(base), vocabulary(checkpoint)
    moved = [token for token in known.keys() & its.keys() if known[token] != its[token]]
    if moved:
        first = min(moved, key=lambda token: known[token])
        raise CheckpointError(
            f"`TaskVectors(base, experts)`: expert {expert!r}: its tokenizer gives {len(moved):,} tokens other numbers "
            f"than the base's ({first!r} is {its[first]}, the base's {known[first]}), so that rows of its embedding "
            f"are about other tokens. Give a model that was fine-tuned from {base.source} with its tokenizer; remove "
            "the tokenizer's files if they are another model's."
        )


def vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Token to number, of the tokenizer beside the weights; empty if there is none, or its format is not known.

    That of an adapter without one is its model's.
    """
    folder = Path(checkpoint.source)
    for name, read in (("tokenizer.json", _of_tokenizer), ("vocab.json", _plain), ("vocab.txt", _lines)):
        path = folder / name
        if checkpoint.files and path.is_file():
            try:
                return read(path)
            except (OSError, ValueError, RecursionError):  # another tool's file: it says nothing
                return {}
    return vocabulary(checkpoint.base) if isinstance(checkpoint, LoraCheckpoint) else {}


def _of_tokenizer(path: Path) -> dict[str, int]:
    parsed = json.loads(path.read_text(encoding="utf-8"))
    model = parsed.get("model") if isinstance(parsed, Mapping) else None
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # unigram: (token, log probability) in the order of the numbers
        return {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    return _numbers(vocab)


def _plain(path: Path) -> dict[str, int]:
    return _numbers(json.loads(path.read_text(encoding="utf-8")))


def _numbers(vocab: Any) -> dict[str, int]:
    pairs = vocab.items() if isinstance(vocab, Mapping) else ()
    return {token: number for token, number in pairs if type(number) is int}


def _lines(path: Path) -> dict[str, int]:
    return {token: number for number, token in enumerate(path.read_text(encoding="utf-8").splitlines())}


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
