"""Tied embeddings: output heads that a model's config makes one tensor with the input embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from poe_models.weights.checkpoint import Checkpoint

# Input embeddings of tokens, and output heads, by the end of their names in the model types that tie them.
_TOKENS = r"(embed_tokens|wte|word_embeddings?|tokens_embed|token_embedding|tok_embeddings|shared|embed_in|embeddings)"
_HEADS = r"(lm_head|embed_out|output_projection|predictions\.decoder|generator_lm_head|lm_head\.decoder)"
_EMBEDDING = re.compile(rf"(^|\.){_TOKENS}\.weight$")
_TIED = re.compile(rf"(^|\.)({_TOKENS}|{_HEADS})\.weight$")
_LANGUAGE_MODEL = re.compile(r"LM|Generation|PreTraining")


def ties_embeddings(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config ties output head and input embedding; without an entry they are, as in transformers."""
    if config is None:
        return False
    parts = [config, *(config[key] for key in ("text_config", "decoder") if isinstance(config.get(key), Mapping))]
    stated = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(stated[0]) if stated else True


def tied_copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Further names of tied embeddings that the files store apart, to the first name; their values are compared.

    Args:
        checkpoint: Its config must tie them; copies that differ are not tied.
    """
    if not ties_embeddings(checkpoint.config):
        return {}
    names = [n for n, info in checkpoint.tensors.items() if _TIED.search(n) and len(info.shape) == 2]
    names.sort(key=lambda name: (_EMBEDDING.search(name) is None, name))  # the embedding is the canonical one
    aliases: dict[str, str] = {}
    for place, name in enumerate(names):
        for first in (n for n in names[:place] if n not in aliases):
            if _same(checkpoint, first, name):
                aliases[name] = first
                break
    return aliases


def untied_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Aliases of embeddings and heads that the config does not tie: a reader expects each under its own name."""
    if checkpoint.config is None or ties_embeddings(checkpoint.config):
        return frozenset()
    return frozenset(name for name in checkpoint.aliases if _TIED.search(name))


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return alike and torch.equal(checkpoint.read(one), checkpoint.read(other))


def head_is_tied_to(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is an embedding or a head that the config of a language model ties to the other."""
    config = checkpoint.config
    if config is None or not _TIED.search(name) or not ties_embeddings(config):
        return False
    return any(_LANGUAGE_MODEL.search(str(each)) for each in config.get("architectures") or ())
