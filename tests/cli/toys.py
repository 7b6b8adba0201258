"""Weights, a configuration and what is in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

State = dict[str, Tensor]


SHAPES = {"0.mlp.weight": (8, 4), "1.mlp.weight": (8, 4), "1.attn.weight": (4, 4), "1.bias": (4,)}


CONFIG = {
    "merge_method": "poe",
    "base_model": "base",
    "models": [{"model": "mnist"}, {"model": "emoji"}],
    "parameters": {"energy": "StudentT(4.0)", "eta": 0.2},
}


Cli = Callable[..., tuple[int, str, str]]


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}
