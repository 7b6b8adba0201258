"""Random checkpoints of known shapes, on which the benchmark of speed merges: a base and experts near it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from poe_models import TaskVectors

RANK = 8
"""Rank of an expert's update beside its noise."""
NOISE = 1e-3
"""Size of an entry of the noise, and of the low-rank part."""


@dataclass(frozen=True)
class Shapes:
    """Names and shapes of a checkpoint's tensors.

    Args:
        name: For tables.
        tensors: Names to shapes.
        experts: Number of experts.
    """

    name: str
    tensors: Mapping[str, tuple[int, ...]]
    experts: int = 4

    @property
    def numel(self) -> int:
        """Parameters of one model."""
        return sum(torch.Size(shape).numel() for shape in self.tensors.values())


def llama(layers: int = 12, hidden: int = 768, intermediate: int = 2048, vocabulary: int = 16_000) -> Shapes:
    """A small Llama with an untied head.

    >>> f"{llama().numel / 1e6:.1f}"
    '109.5'
    """
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        found |= {f"{name}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{name}.mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (hidden, intermediate)
        found |= {f"{name}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return Shapes("Llama", found)


def mini_lm() -> Shapes:
    """The linear layers of MiniLM-L6, 10.6 million weights, with five experts.

    >>> f"{mini_lm().numel / 1e6:.1f}"
    '10.6'
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        found |= {f"{name}.attention.{part}.weight": (384, 384) for part in ("query", "key", "value", "output")}
        found |= {f"{name}.intermediate.weight": (1536, 384), f"{name}.output.weight": (384, 1536)}
    return Shapes("MiniLM", found, experts=5)


def matrices(count: int, rows: int, columns: int, experts: int = 4) -> Shapes:
    """So many matrices of one shape."""
    tensors = {f"layers.{index}.weight": (rows, columns) for index in range(count)}
    return Shapes(f"{count} x {rows} x {columns}", tensors, experts)


def shapes_of(text: str) -> Shapes:
    """The shapes that a text names: ``llama``, ``minilm``, or the arguments of :func:`matrices`.

    >>> shapes_of("2 64 32 3").name
    '2 x 64 x 32'
    """
    named = {"llama": llama, "minilm": mini_lm}
    return named[text]() if text in named else matrices(*map(int, text.split()))


def write(folder: Path, shapes: Shapes, seed: int = 0) -> None:
    """Write ``base`` and ``expert1`` and so on, each a safetensors file; what is there already stays."""
    if (folder / f"expert{shapes.experts}").exists():
        return
    generator = torch.Generator().manual_seed(seed)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.tensors.items()}
    _save(folder / "base", base)
    for index in range(1, shapes.experts + 1):
        _save(folder / f"expert{index}", dict(_tuned(base, generator)))


def _tuned(base: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Add noise to the base and, for matrices, a few directions of about its size in every entry.

    Yields:
        Names and weights.
    """
    for name, weight in base.items():
        update = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2:
            rank = min(RANK, *weight.shape)
            left = torch.randn(weight.shape[0], rank, generator=generator)
            update += left @ torch.randn(rank, weight.shape[1], generator=generator) / rank**0.5
        yield name, weight + NOISE * update


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def opened(folder: Path, shapes: Shapes, device: torch.device | str = "cpu") -> TaskVectors:
    """The task vectors of a folder that :func:`write` has filled."""
    experts = {f"expert{i}": folder / f"expert{i}" for i in range(1, shapes.experts + 1)}
    return TaskVectors(folder / "base", experts, device=device)
