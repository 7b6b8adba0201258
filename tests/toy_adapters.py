"""Small checkpoints, and adapters on them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.seeds import seeded


def state(seed: int = 0, dtype: torch.dtype = torch.float64, vocabulary: int = 10) -> dict[str, Tensor]:
    generator = seeded(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "embed_tokens.weight": random(vocabulary, 4),
        "layer.weight": random(6, 4),
        "layer.bias": random(6),
        "attn.in_proj_weight": random(12, 4),
        "conv.weight": random(5, 3, 2, 2),
        "experts.down_proj": random(3, 4, 2),
        "norm.weight": random(4),
        "position_ids": torch.arange(seed, seed + 5),
    }


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 6)
        self.conv = nn.Conv2d(3, 5, 3)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.head = nn.Linear(4, 2)
        self.untouched = nn.Linear(4, 4)


def adapter(folder: Path, seed: int, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(Small(), peft.LoraConfig(**settings))
        generator = seeded(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder
