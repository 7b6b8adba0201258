"""The meaning of weights beyond their shapes: settings of config, tokenizer and preprocessor beside them."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.json_files import read_object
from poe_models.weights.lora import LoraCheckpoint

Outcome = Literal["refused", "warned"]
CONFIG = "config.json"
_OTHER_MODEL = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "n_head_kv"),
    *("num_kv_heads", "head_dim", "encoder_attention_heads", "decoder_attention_heads", "multi_query"),
    *("hidden_act", "activation_function", "hidden_activation", "activation", "activation_fn", "dense_act_fn"),
    *("feed_forward_proj", "projector_hidden_act", "position_embedding_type", "alibi", "parallel_attn"),
)
_OTHER_RESULT = (
    *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types"),
    *("attention_types", "window_size", "attention_window", "attention_chunk_size", "no_rope_layers"),
    *(
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_parameters",
        "rotary_emb_base",
        "rotary_pct",
        "rotary_dim",
    ),
    *("global_rope_theta", "local_rope_theta", "partial_rotary_factor", "rope_ratio"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "scale_embedding", "scale_attn_weights"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "norm_epsilon", "batch_norm_eps", "eps"),
    *("scale_attn_by_inverse_layer_idx", "do_layer_norm_before", "is_decoder", "relative_attention_max_distance"),
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "norm_topk_prob", "routed_scaling_factor"),
    *("scoring_func", "topk_method", "n_group", "topk_group", "vision_feature_layer", "vision_feature_select_strategy"),
    *("apply_residual_connection_post_layernorm", "use_parallel_residual", "time_step_min", "time_step_max"),
)
_TOKENIZER = (
    *("tokenizer_class", "do_lower_case", "lowercase", "strip_accents", "tokenize_chinese_chars", "add_prefix_space"),
    *("add_bos_token", "add_eos_token", "legacy", "split_special_tokens", "byte_fallback"),
)
_IMAGES_AND_SOUND = (
    *("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "do_convert_rgb"),
    *("sampling_rate", "feature_size", "hop_length", "n_fft"),
)
FIELDS: Mapping[str, Mapping[str, Outcome]] = {
    CONFIG: {**dict.fromkeys(_OTHER_MODEL, "refused"), **dict.fromkeys(_OTHER_RESULT, "warned")},
    "tokenizer_config.json": dict.fromkeys(_TOKENIZER, "warned"),
    "tokenizer.json": dict.fromkeys(("normalizer", "pre_tokenizer", "model.type", "model.merges"), "warned"),
    "preprocessor_config.json": dict.fromkeys(_IMAGES_AND_SOUND, "warned"),
    "processor_config.json": dict.fromkeys(_IMAGES_AND_SOUND, "warned"),
}
"""Files beside weights, and what happens where a field of theirs differs: by its name, at any depth, or its path.

Refused are those by which weights of equal shapes are another model. What a fine-tune may change (lengths, labels,
dropout, special tokens, templates) is not among them, and a field that one side lacks is no difference: versions of
libraries write more or fewer.
"""
_WHOLE = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm"),
    "tekken.json",
)
"""Vocabularies in formats that are compared as bytes: refused, or warned of where another file has the vocabulary."""
_NUMBERED = ("tokenizer.json", "vocab.json", "vocab.txt")
_READERS: Mapping[str, Callable[[Path], Any]] = {
    **{name: read_object for name in FIELDS if name != CONFIG},
    **dict.fromkeys(("vocab.json", "added_tokens.json"), read_object),
    "vocab.txt": lambda path: _lines(path),
    "merges.txt": lambda path: [line for line in _lines(path) if not line.startswith("#version")],
    **dict.fromkeys(_WHOLE, lambda path: hashlib.sha256(path.read_bytes()).hexdigest()),
}
_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "tokenizer_class": lambda value: str(value).removesuffix("Fast"),
    "model.merges": lambda value: [_joined(each) for each in value] if isinstance(value, list) else value,
}
"""Fields that different versions write in different forms."""


def _joined(merge: Any) -> Any:
    return " ".join(map(str, merge)) if isinstance(merge, list) else merge


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Meaning:
    """The config and the other files beside weights.

    Args:
        config: The config, or nothing.
        files: The other files, by their names: parsed, or a digest.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Meaning:
        """Read what is beside a checkpoint; an adapter without files of its own has its model's."""
        return cls(checkpoint.config or {}, _beside(checkpoint))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token to number; empty if there is none, or its format is not known."""
        parsed, settings = (self.files.get(name, {}) for name in ("tokenizer.json", "tokenizer_config.json"))
        numbers = [_numbers(_inner(parsed, "model").get("vocab")), _numbers(self.files.get("vocab.json"))]
        numbers.append({token: number for number, token in enumerate(self.files.get("vocab.txt", ()))})
        known = next(filter(None, numbers), {})
        added = parsed.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, Mapping):
                known |= _numbers({str(entry.get("content")): entry.get("id")})
        for number, entry in _inner(settings, "added_tokens_decoder").items():
            if isinstance(entry, Mapping) and number.isdecimal() and len(number) < 20:
                known[str(entry.get("content"))] = int(number)
        return known | _numbers(self.files.get("added_tokens.json"))

    def differences(self, other: Meaning) -> Iterator[tuple[Outcome, str]]:
        """Compare with another model, for which this one is the base.

        Yields:
            What happens, and what the other has that is not as here.
        """
        for name, fields in FIELDS.items():
            ours, theirs = (each.config if name == CONFIG else each.files.get(name, {}) for each in (self, other))
            for outcome, path, mine, its in _differing(ours, theirs, fields):
                yield outcome, f"its {name} has `{path}` {reprlib.repr(its)}, the base's {reprlib.repr(mine)}"
        told = all(any(name in each.files for name in _NUMBERED) for each in (self, other))
        for name in (*_WHOLE, "merges.txt"):
            if name in self.files and name in other.files and self.files[name] != other.files[name]:
                yield "warned" if told or name not in _WHOLE else "refused", f"its {name} is not the base's"
        yield from self._tokens(other)

    def _tokens(self, other: Meaning) -> Iterator[tuple[Outcome, str]]:
        known, its = self.vocabulary, other.vocabulary
        moved = [token for token in known.keys() & its.keys() if known[token] != its[token]]
        if moved:
            first = min(moved, key=lambda token: known[token])
            yield (
                "refused",
                f"its tokenizer gives {len(moved):,} tokens other numbers than the base's ({first!r} is {its[first]}, "
                f"the base's {known[first]}), so that rows of its embedding are about other tokens",
            )
        ours = {number: token for token, number in known.items() if token not in its}
        theirs = {number: token for token, number in its.items() if token not in known}
        renamed = ours.keys() & theirs.keys()
        if renamed:
            first_number = min(renamed)
            yield (
                "warned",
                f"its tokenizer gives {len(renamed):,} numbers to other tokens than the base's ({first_number} is "
                f"{theirs[first_number]!r}, the base's {ours[first_number]!r})",
            )


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    found = {}
    for name, read in _READERS.items():
        path = Path(checkpoint.source) / name
        if checkpoint.files and path.is_file():
            try:
                found[name] = read(path)
            except (OSError, ValueError):  # another tool's file: it says nothing
                continue
    return _beside(checkpoint.base) if not found and isinstance(checkpoint, LoraCheckpoint) else found


def _inner(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _numbers(vocab: Any) -> dict[str, int]:
    if isinstance(vocab, list):  # unigram: (token, log probability) in the order of the numbers
        return {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    pairs = vocab.items() if isinstance(vocab, Mapping) else ()
    return {token: number for token, number in pairs if type(number) is int}


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], fields: Mapping[str, Outcome], path: str = ""
) -> Iterator[tuple[Outcome, str, Any, Any]]:
    # fields, also of sections, that both have and that differ: outcome, path and both values
    for key in (key for key in ours if key in theirs):
        one, other, where = ours[key], theirs[key], f"{path}{key}"
        outcome = fields.get(where, fields.get(key))
        if outcome is None and isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(one, other, fields, f"{where}.")
        elif outcome is not None:
            form = _FORMS.get(where, _FORMS.get(key, lambda value: value))
            lacking = outcome == "refused" and (one is None or other is None)  # the default, whatever it is
            if not lacking and not _alike(form(one), form(other)):
                yield outcome, where, one, other


def _alike(one: Any, other: Any) -> bool:
    """Return whether values are equal but for entries of mappings that one of them lacks."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_alike(value, other[key]) for key, value in one.items() if key in other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_alike(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def listed(texts: Sequence[str], shown: int = 5) -> str:
    """The first of some texts in one line."""
    return "; ".join(texts[:shown]) + (f"; and {len(texts) - shown} more" if len(texts) > shown else "")
