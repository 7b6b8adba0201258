"""Comparison of an expert's architecture and tokenizer with the base's: equal shapes do not make equal models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poe_models.weights.checkpoint import Checkpoint, CheckpointError

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
    """Token to number, of the tokenizer beside the weights; empty if there is none, or its format is not known."""
    folder = Path(checkpoint.source)
    for name, read in (("tokenizer.json", _of_tokenizer), ("vocab.json", _plain), ("vocab.txt", _lines)):
        path = folder / name
        if checkpoint.files and path.is_file():
            try:
                return read(path)
            except (OSError, ValueError, RecursionError):  # another tool's file: it says nothing
                return {}
    return {}


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
