"""Tiny random models of transformers' own classes: what the rules do with each, and that the merged folder loads."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inference import merge_checkpoint
from poe_models import TaskVectors
from poe_models.methods import Average
from poe_models.weights.loading import TensorInfo, open_checkpoint
from poe_models.weights.rules import DEFAULT_RULES
from tests.seeds import seed_of, seeded

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4}
VISION = {**{key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}, **IMAGE}
TOWERS = {
    "text_config": {**TEXT, "projection_dim": 8},
    "vision_config": {**VISION, "intermediate_size": 24, "projection_dim": 8},
}  # fmt: skip
HALF = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip

Model = tuple[str, dict[str, Any], str]
"""Class, settings of its config, and kind of input."""
MODELS: dict[str, Model] = {
    "bert": ("BertForSequenceClassification", TEXT, "text"),
    "roberta": ("RobertaForSequenceClassification", {**TEXT, "max_position_embeddings": 20}, "text"),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
        "text",
    ),
    "modernbert": ("ModernBertForSequenceClassification", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, "text"),
    "vit": ("ViTForImageClassification", {**VISION, "intermediate_size": 24}, "image"),
    "clip": ("CLIPModel", {**TOWERS, "projection_dim": 8}, "both"),
    "siglip": ("SiglipModel", TOWERS, "both"),
    "dinov2": ("Dinov2ForImageClassification", VISION, "image"),
    "swin": ("SwinForImageClassification", {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
                                            "num_heads": [1, 2], "window_size": 2}, "large image"),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
                 "large image"),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
                                          "num_heads": 2, "decoder_start_token_id": 0}, "pair"),
    "bart": ("BartForConditionalGeneration", {**HALF, "vocab_size": 32, "max_position_embeddings": 16,
                                              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                                              "decoder_start_token_id": 2, "forced_eos_token_id": 2}, "pair"),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
                                 "bos_token_id": 1, "eos_token_id": 2}, "text"),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT, "text"),
    "llama": ("LlamaForCausalLM", DECODER, "text"),
    "qwen2": ("Qwen2ForCausalLM", DECODER, "text"),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "tie_word_embeddings": True}, "text"),
    "gemma": ("GemmaForCausalLM", DECODER, "text"),
    "phi": ("PhiForCausalLM", TEXT, "text"),
    "phi3": ("Phi3ForCausalLM", DECODER, "text"),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2}, "text"),
    "mamba": ("MambaForCausalLM", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
                                   "pad_token_id": 0}, "text"),
    "whisper": ("WhisperForConditionalGeneration", {**HALF, "vocab_size": 32, "num_mel_bins": 8,
                                                    "max_source_positions": 8, "max_target_positions": 8,
                                                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                                                    "decoder_start_token_id": 1, "suppress_tokens": None,
                                                    "begin_suppress_tokens": None}, "spectrum"),
    "wav2vec2": ("Wav2Vec2ForCTC", {**TEXT, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4],
                                    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
                                    "num_feat_extract_layers": 2}, "sound"),
}  # fmt: skip
COUNTS: dict[str, tuple[int, int, int, int, int]] = {
    "bert": (14, 27, 0, 0, 0),
    "roberta": (14, 27, 0, 0, 0),
    "deberta-v2": (18, 30, 0, 0, 0),
    "modernbert": (10, 8, 0, 10, 0),
    "vit": (14, 26, 0, 0, 0),
    "clip": (27, 51, 0, 0, 0),
    "siglip": (30, 58, 0, 3, 0),
    "dinov2": (14, 31, 0, 0, 0),
    "swin": (15, 30, 0, 0, 0),
    "convnext": (7, 23, 0, 0, 0),
    "t5": (16, 10, 0, 0, 3),
    "bart": (16, 34, 0, 0, 3),
    "gpt2": (8, 20, 0, 6, 1),
    "gpt-neox": (9, 19, 0, 0, 0),
    "llama": (15, 6, 0, 0, 0),
    "qwen2": (15, 12, 0, 0, 0),
    "qwen3": (14, 10, 0, 0, 1),
    "gemma": (14, 6, 0, 0, 1),
    "phi": (13, 20, 0, 0, 0),
    "phi3": (9, 6, 0, 4, 0),
    "mixtral": (23, 6, 0, 0, 0),
    "mamba": (8, 14, 0, 0, 1),
    "whisper": (18, 32, 0, 0, 1),
    "wav2vec2": (17, 31, 0, 0, 0),
}
"""Tensors merged, averaged and kept, matrices that split or stacked tensors are seen as, and further tied names."""
ODD = {
    "siglip": {"vision_model.head.attention.in_proj_weight"},  # of nn.MultiheadAttention, split into [q; k; v]
    "wav2vec2": {"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"},  # of a weight norm
}
"""Parameters that are merged although their own module is none of the dense classes."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about tiny settings
        yield


def made(name: str) -> nn.Module:
    kind, settings, _ = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(seed_of(0))
    return cls(cls.config_class(**settings)).eval()


def inputs(kind: str) -> dict[str, Tensor]:
    ids, generator = torch.tensor([[1, 5, 7, 9, 2]]), seeded(1)
    return {
        "text": {"input_ids": ids},
        "image": {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)},
        "large image": {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)},
        "both": {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)},
        "pair": {"input_ids": ids, "decoder_input_ids": ids},
        "spectrum": {"input_features": torch.randn(1, 8, 16, generator=generator), "decoder_input_ids": ids},
        "sound": {"input_values": torch.randn(1, 400, generator=generator)},
    }[kind]


def vectors_of(name: str, folder: Path) -> TaskVectors:
    made(name).save_pretrained(folder / "base")
    base, experts = open_checkpoint(folder / "base"), {}
    for number in range(2):
        generator = seeded(2 + number)
        state = {}
        for key in base.tensors:
            value = base.read(key)
            noise = torch.randn(value.shape, generator=generator)
            state[key] = value + 0.01 * noise if value.is_floating_point() else value
        experts[f"e{number}"] = {**state, **{alias: state[target] for alias, target in base.aliases.items()}}
    return TaskVectors(folder / "base", experts)


def counts(vectors: TaskVectors) -> tuple[int, int, int, int]:
    actions = Counter(treatment.action for treatment in vectors.treatments.values())
    blocks = [
        len(treatment.view.block_shapes(vectors.base.tensors[name].shape))
        for name, treatment in vectors.treatments.items()
        if treatment.view is not None
    ]
    return actions["merge"], actions["average"], actions["base"], sum(count for count in blocks if count > 1)


def by_class(model: nn.Module) -> dict[str, str]:
    """What the class of its module says of each parameter: dense matrices and kernels are merged."""
    found = {}
    for place, module in model.named_modules():
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
        depthwise = convolution and module.groups == module.in_channels > 1
        dense = isinstance(module, nn.Linear | Conv1D) or (convolution and not depthwise)
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{place}.{name}".lstrip(".")] = "merge" if dense and parameter.ndim > 1 else "average"
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_happens_to_a_real_class(name: str, tmp_path: Path) -> None:
    model, vectors = made(name), vectors_of(name, tmp_path)
    assert (*counts(vectors), len(open_checkpoint(model.state_dict()).aliases)) == COUNTS[name]
    expected = by_class(model)
    other = {n for n, t in vectors.treatments.items() if n in expected and t.action != expected[n]}
    assert other == ODD.get(name, set())
    merge_checkpoint(vectors, Average(), tmp_path / "merged")
    merged, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        output, before = (each.eval()(**inputs(MODELS[name][2])) for each in (merged, model))
    logits, old = (each.logits_per_image if "logits_per_image" in each else each.logits for each in (output, before))
    assert bool(logits.isfinite().all())
    assert not torch.equal(logits, old)


@pytest.mark.parametrize("name", ["cls_token", "mask_token", "embeddings.register_tokens"])
def test_learned_tokens_are_averaged(name: str) -> None:
    shape = (1, 4, 16) if name.endswith("s") else (1, 16)
    assert DEFAULT_RULES.treat(TensorInfo(name, shape, torch.float32)).action == "average"
