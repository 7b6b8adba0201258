"""A small network, its folders and its task vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from poe_models import Anchor, ProductOfExperts, StudentT, TaskVectors, average
from tests.seeds import seeded

NAMES = ("x", "y", "z")


WIDTH, CLASSES = 12, 4


class Net(nn.Module):
    """Layers in a ModuleList, so that features before the last can be computed once, with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * CLASSES)
        self.norm = nn.LayerNorm(3 * CLASSES)
        self.head = nn.Linear(3 * CLASSES, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(self.qkv(x)))


def net(seed: int, base: nn.Module | None = None) -> Net:
    """A model of random weights, or one near a base."""
    generator = seeded(seed)
    model = Net() if base is None else copy.deepcopy(base)
    assert isinstance(model, Net)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if base is None else parameter + 0.3 * noise)
    return model


Open = Callable[..., TaskVectors]


def product(**given: Any) -> ProductOfExperts:
    return ProductOfExperts.of(NAMES, **{"energy": StudentT(4.0), "anchor": Anchor(average), **given})


def batches(count: int = 24) -> list[Tensor]:
    return list(torch.randn(count, 5, generator=seeded(9)).split(8))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
