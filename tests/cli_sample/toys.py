"""The files, flags and weights of the tests of `stats` and `sample`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]


Cli = Callable[..., tuple[int, str, str]]


SHAPES = {"0.mlp.weight": (8, 4), "1.mlp.weight": (8, 4), "1.attn.weight": (4, 4), "1.bias": (4,)}


MERGED = ("0.mlp.weight", "1.attn.weight", "1.mlp.weight")


CONFIG = {
    "base_model": "base",
    "models": [{"model": "mnist"}, {"model": "emoji"}],
    "parameters": {"energy": "StudentT(4.0)", "eta": 0.2, "scaling": 0.7},
}


QUICK = ("--draws", "20", "--warmup", "5")


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def updates(here: Path, tensor: str) -> Tensor:
    """The experts' updates, (N, d_out, d_in) float64."""
    base = weights(here / "base")[tensor].double()
    return torch.stack([weights(here / name)[tensor].double() - base for name in ("mnist", "emoji")])
