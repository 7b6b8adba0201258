"""SmolLM2 as a feature extractor: what its last layer says at a prompt's end, which the embedding turns into tokens.

A choice of a task is one token, so a task's head is the rows of the (tied) output embedding of its choices: frozen, and
those of the next token among the choices. Blocks that no adapter changes are run once: a split may hold what they give.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from typing_extensions import override

from benchmarks.decoder.prompts import Split

EMBEDDING = "model.embed_tokens.weight"
"""The input embedding, which is the output embedding, too."""
TIED = "lm_head.weight"


class Batch(NamedTuple):
    """Prompts padded to the longest of them.

    Attributes:
        hidden: (n, longest, hidden), what the first block that runs is given.
        lengths: (n,) int64, in tokens.
        start: Number of that block.
    """

    hidden: Tensor
    lengths: Tensor
    start: int


class Decoder(LlamaForCausalLM):
    """Llama whose output is its features; the tensors have the names of the checkpoint of a causal LM."""

    is_gradient_checkpointing = False  # peft asks by this name, of which transformers warns

    @override
    def forward(self, batch: Batch) -> Tensor:
        """Features (n, hidden): the last layer at the last token of each prompt."""
        last = batch.lengths.to(batch.hidden.device) - 1
        found = self.through(batch.hidden, batch.start, len(self.model.layers))
        features: Tensor = self.model.norm(found[torch.arange(len(last), device=last.device), last])
        return features

    def through(self, hidden: Tensor, first: int, after: int) -> Tensor:
        """What some blocks make of hidden states; padding is behind the prompts, where no token before it looks.

        Args:
            hidden: (n, longest, hidden).
            first: The first block's number.
            after: Number of the block behind the last.

        Returns:
            Tensor (n, longest, hidden).
        """
        places = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = create_causal_mask(self.config, hidden, None, None, places)
        rotation = self.model.rotary_emb(hidden, position_ids=places)
        for block in self.model.layers[first:after]:
            hidden = block(hidden, attention_mask=mask, position_embeddings=rotation, position_ids=places)
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
        start: Number of the first block that is tuned.
        name: On the pages of results.
    """

    folder: Path
    start: int = 0
    name: str = "SmolLM2-135M"

    @cached_property
    def config(self) -> Mapping[str, object]:
        """The base's."""
        found: dict[str, object] = json.loads((self.folder / "config.json").read_text())
        return found

    @property
    def last_layer(self) -> str:
        """The last matrix of the last block that adapters change: that of its attention's output."""
        return rf"{re.escape(self.cut)}\.self_attn\.o_proj"

    @property
    def cut(self) -> str:
        """The block that this matrix is in: what comes before it also goes around the attention."""
        return f"model.layers.{int(str(self.config['num_hidden_layers'])) - 1}"

    @cached_property
    def embedding(self) -> Tensor:
        """The embedding of tokens (vocabulary, hidden), which no adapter changes."""
        with safe_open(self.folder / "model.safetensors", framework="pt") as file:
            found: Tensor = file.get_tensor(EMBEDDING)
        return found

    def open(self, state: Mapping[str, Tensor]) -> Decoder:
        """A backbone with these weights, in evaluation mode."""
        model = copy.deepcopy(_untrained(json.dumps(dict(self.config))))
        model.load_state_dict({**state, TIED: state[EMBEDDING]}, strict=True)
        return model

    def inputs(self, split: Split, rows: Tensor, device: torch.device) -> Batch:
        """Some of a split's prompts, cut to the longest of them."""
        lengths = split.lengths[rows]
        longest = int(lengths.max())
        if split.hidden is not None:
            return Batch(split.hidden[rows, :longest].to(device), lengths, self.start)
        return Batch(self.embedding[split.tokens[rows, :longest].long()].to(device), lengths, 0)

    def counted(self, inputs: Batch) -> Tensor:
        """Tokens, (n, longest) bool."""
        return torch.arange(inputs.hidden.shape[1]) < inputs.lengths.unsqueeze(1)

    def order(self, split: Split) -> Tensor:
        """Short prompts first: prompts of like length share a batch."""
        return torch.argsort(split.lengths, stable=True)
