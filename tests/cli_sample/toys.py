"""The files, flags and weights of the tests of `stats` and `sample`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.toys import State

MERGED = ("0.mlp.weight", "1.attn.weight", "1.mlp.weight")


CONFIG = {
    "base_model": "base",
    "models": [{"model": "mnist"}, {"model": "emoji"}],
    "parameters": {"energy": "StudentT(4.0)", "eta": 0.2, "scaling": 0.7},
}


QUICK = ("--draws", "20", "--warmup", "5")


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def updates(here: Path, tensor: str) -> Tensor:
    """The experts' updates, (N, d_out, d_in) float64."""
    base = weights(here / "base")[tensor].double()
    return torch.stack([weights(here / name)[tensor].double() - base for name in ("mnist", "emoji")])
