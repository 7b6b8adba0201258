"""Small models, and files of draws with one thing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference.gibbs import gibbs
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import collect_statistics
from poe_models import ProductOfExperts, TaskVectors
from tests.seeds import seeded

SHAPES = {"a.weight": (6, 4), "b.weight": (5, 6), "b.bias": (5,), "attn.in_proj_weight": (12, 4)}


MODULES = ("a.weight", "b.weight", *(f"attn.in_proj_weight[{i}]" for i in range(3)))


def states(generator: torch.Generator, shapes: dict[str, tuple[int, ...]] = SHAPES, names: str = "xyz") -> Any:
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        each: {k: w + 0.1 * (common[k] + torch.randn(w.shape, generator=generator)) for k, w in base.items()}
        for each in names
    }
    return base, experts


def poe_of(vectors: TaskVectors, **options: Any) -> ProductOfExperts:
    return ProductOfExperts.of(vectors.names, **options)


def span_draws(vectors: TaskVectors, poe: ProductOfExperts, seed: int = 0, count: int = 50) -> SpanDraws:
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    return SpanDraws.of(gibbs(posterior, count, generator=generator), posterior)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def corrupt_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
