"""A decoder as a feature extractor: its last layer at the last token of a prompt.

Its head is frozen and its own: the rows of the (tied) output embedding of the choices' tokens, so that logits are those
of the next token among the choices.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from typing_extensions import override

from benchmarks.language.model import Batch
from benchmarks.language.tasks import Split


class Decoder(LlamaModel):
    """Llama whose output is its features; the tensors have the names of Llama's checkpoint."""

    @override
    def forward(self, batch: Batch) -> Tensor:
        """Features (n, hidden): the last layer at the last token of each prompt."""
        found = super().forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        last = batch.attention_mask.sum(1) - 1
        hidden: Tensor = found.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return hidden


@cache
def _untrained(config: str) -> Decoder:
    """A backbone to copy: making one draws all its weights."""
    with torch.random.fork_rng(devices=[]):
        return Decoder(LlamaConfig.from_dict(json.loads(config))).eval()


@dataclass(frozen=True)
class DecoderNetwork:
    """The network of the decoder suite.

    Args:
        folder: Checkpoint folder of the base, whose `config.json` it has.
        name: On the pages of results.
    """

    folder: Path
    name: str = "SmolLM2-135M"

    @cached_property
    def config(self) -> Mapping[str, object]:
        """The base's, of a model without a head."""
        found: dict[str, object] = json.loads((self.folder / "config.json").read_text())
        return found

    @property
    def last_layer(self) -> str:
        """The last matrix of the last block: that of its feed-forward output."""
        return rf"{re.escape(self.cut)}\.down_proj"

    @property
    def cut(self) -> str:
        """The module that this matrix is in."""
        return f"layers.{int(str(self.config['num_hidden_layers'])) - 1}.mlp"

    def open(self, state: Mapping[str, Tensor]) -> Decoder:
        """A backbone with these weights, in evaluation mode."""
        model = copy.deepcopy(_untrained(json.dumps(dict(self.config))))
        model.load_state_dict(dict(state), strict=True)
        return model

    def inputs(self, split: Split, rows: Tensor, device: torch.device) -> Batch:
        """Some of a split's prompts, cut to the longest of them."""
        lengths = split.lengths[rows]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        return Batch(split.tokens[rows, :longest].to(device).long(), mask.to(device).long())

    def order(self, split: Split) -> Tensor:
        """Short prompts first: prompts of like length share a batch."""
        return torch.argsort(split.lengths, stable=True)
