"""Small models with adapters made by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from poe_models.weights.loading import Checkpoint, open_checkpoint
from tests.seeds import seed_of, seeded


class Mixed(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.square_emb = nn.Embedding(4, 4)
        self.fc = nn.Linear(4, 4)
        self.wide = nn.Linear(4, 6, bias=False)
        self.conv = nn.Conv2d(3, 5, 3)
        self.conv1x1 = nn.Conv2d(3, 5, 1)
        self.conv1d = nn.Conv1d(3, 5, 3)
        self.attn = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


def randomise(model: nn.Module, generator: torch.Generator, only_trainable: bool = False) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trainable:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=10, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=10, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {"bert": bert, "gpt2": gpt2, "mixed": Mixed}


def save_base(model: nn.Module, folder: Path) -> Checkpoint:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        return open_checkpoint(folder)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return open_checkpoint(folder)


def train_adapter(model: nn.Module, folder: Path, **settings: Any) -> None:
    """Save an adapter with random values in everything that would be trained."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    randomise(adapted, seeded(1), only_trainable=True)
    adapted.save_pretrained(folder)


def build(kind: str, tmp_path: Path, **settings: Any) -> tuple[nn.Module, Checkpoint, Path]:
    """A random base model, its checkpoint, and the folder of an adapter on it."""
    torch.manual_seed(seed_of(0))
    model, trained = MODELS[kind](), MODELS[kind]()
    randomise(model, seeded(0))
    trained.load_state_dict(model.state_dict())
    base = save_base(model, tmp_path / "base")
    train_adapter(trained, tmp_path / "adapter", **settings)
    return model, base, tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
