"""Settings and tokenizers beside weights: what makes an expert another model, and what is warned of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from poe_models import CheckpointError, TaskVectors

MODEL = {"embed_tokens.weight": torch.zeros(6, 4), "q_proj.weight": torch.eye(4)}


def beside(name: str, ours: Any, theirs: Any, tmp_path: Path) -> TaskVectors:
    """A base and an expert with different contents of one file."""
    for folder, content in (("base", ours), ("tuned", theirs)):
        (tmp_path / folder).mkdir(exist_ok=True)
        weights = {key: value + (folder == "tuned") for key, value in MODEL.items()}
        save_file(weights, tmp_path / folder / "model.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        if content is not None:
            (tmp_path / folder / name).write_text(text)
    return TaskVectors(tmp_path / "base", {"x": tmp_path / "tuned"})


def vocabulary(**model: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, **model}}


def added(number: int, token: str) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(number): {"content": token}}}


CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
REFUSED: list[tuple[str, Any, Any, str]] = [
    (CONFIG, {"hidden_act": "gelu"}, {"hidden_act": "relu"}, r"`hidden_act` 'relu', the base's 'gelu'"),
    *(
        (
            CONFIG,
            {part: {"num_attention_heads": 4}},
            {part: {"num_attention_heads": 8}},
            rf"`{part}\.num_att\w+` 8, .* 4",
        )
        for part in ("text_config", "vision_config", "audio_encoder")
    ),
    ("tokenizer.model", "\x01a", "\x01b", r"its tokenizer\.model is not the base's"),
    ("spiece.model", "\x01a", "\x01b", r"its spiece\.model is not the base's"),
    ("vocab.txt", "a\nb\n", "b\na\n", r"2 tokens other numbers .*'a' is 1, the base's 0"),
    ("added_tokens.json", {"<x>": 4}, {"<x>": 5}, r"1 tokens other numbers .*'<x>' is 5, the base's 4"),
    (SETTINGS, added(4, "<x>"), added(5, "<x>"), r"1 tokens other numbers"),
]
WARNED: list[tuple[str, Any, Any, str]] = [
    (CONFIG, {"rope_theta": 1e4}, {"rope_theta": 1e6}, r"`rope_theta` 1000000\.0, the base's 10000\.0"),
    (CONFIG, {"sliding_window": 4}, {"sliding_window": None}, r"`sliding_window` None, the base's 4"),
    (CONFIG, {"final_logit_softcapping": 30}, {"final_logit_softcapping": None}, "None, the base's 30"),
    (
        CONFIG,
        {"text_config": {"rms_norm_eps": 1e-5}},
        {"text_config": {"rms_norm_eps": 1e-6}},
        "1e-06, the base's 1e-05",
    ),
    (CONFIG, {"rope_scaling": {"factor": 2}}, {"rope_scaling": {"factor": 4}}, r"`rope_scaling` .'factor': 4."),
    ("merges.txt", "#version: 0.2\na b\n", "b a\n", "is not the base's"),
    (TOKENIZER, vocabulary(merges=["a b"]), vocabulary(merges=[["b", "a"]]), r"`model\.merges`"),
    (
        TOKENIZER,
        vocabulary() | {"normalizer": {"lowercase": True}},
        vocabulary() | {"normalizer": {"lowercase": False}},
        "`normalizer`",
    ),
    ("added_tokens.json", {"<x>": 4}, {"<y>": 4}, r"1 numbers to other tokens .*4 is '<y>', the base's '<x>'"),
    (SETTINGS, {"tokenizer_class": "A"}, {"tokenizer_class": "B"}, "`tokenizer_class` 'B', the base's 'A'"),
    (SETTINGS, {"do_lower_case": True}, {"do_lower_case": False}, "`do_lower_case` False, the base's True"),
    ("preprocessor_config.json", {"image_mean": [0, 1, 2]}, {"image_mean": [1, 1, 1]}, "`image_mean`"),
]
SILENT: list[tuple[str, Any, Any]] = [
    (CONFIG, {"head_dim": None, "rope_theta": 1e4}, {"head_dim": 4, "text_config": {"hidden_act": "relu"}}),
    (
        CONFIG,
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (CONFIG, {"num_labels": 2, "max_position_embeddings": 4, "eps": 1}, {"num_labels": 3, "eps": 1.0}),
    (TOKENIZER, vocabulary(merges=["a b"]), vocabulary(merges=[["a", "b"]])),
    (TOKENIZER, vocabulary(), vocabulary(vocab={"a": 0, "b": 1, "c": 2})),
    (SETTINGS, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    (SETTINGS, {"eos_token": "a", "chat_template": "a"}, {"eos_token": "b", "chat_template": "b"}),
    (TOKENIZER, "{", vocabulary(merges=3)),
    (TOKENIZER, {"model": 3, "added_tokens": [3, {"id": "x"}]}, {"model": {"merges": [[3]], "vocab": [3]}}),
    (SETTINGS, {"added_tokens_decoder": {"1" * 9999: {"content": "a"}}}, {"added_tokens_decoder": [3]}),
    ("vocab.json", "[3]", {"a": 0}),
    ("tokenizer.model", "\x01a", "\x01a"),
]


@pytest.mark.parametrize(("name", "ours", "theirs", "words"), REFUSED)
def test_another_model_is_refused(name: str, ours: Any, theirs: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"expert 'x': .*{words}.*: weights of equal shapes that are another"):
        beside(name, ours, theirs, tmp_path)


@pytest.mark.parametrize(("name", "ours", "theirs", "words"), WARNED)
def test_what_may_change_results_is_warned_of(name: str, ours: Any, theirs: Any, words: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"expert 'x': its {'.*' if 'numbers' in words else name}.*{words}") as told:
        beside(name, ours, theirs, tmp_path)
    assert [each.filename for each in told] == [__file__]


@pytest.mark.parametrize(("name", "ours", "theirs"), SILENT)
def test_what_is_no_difference_is_silent(name: str, ours: Any, theirs: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beside(name, ours, theirs, tmp_path)


def test_a_vocabulary_in_two_formats_is_compared_where_it_can_be_read(tmp_path: Path) -> None:
    beside(TOKENIZER, vocabulary(), vocabulary(), tmp_path)
    with pytest.warns(UserWarning, match=r"its tokenizer\.model is not the base's"):
        beside("tokenizer.model", "\x01a", "\x01b", tmp_path)
