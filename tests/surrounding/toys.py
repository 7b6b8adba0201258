"""Updates of low rank and products of experts about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference import SpanDraws, collect_statistics, gibbs
from poe_models import Anchor, InputGram, ProductOfExperts, Relative, RelativePrecision, TaskVectors
from tests.seeds import seeded

NAMES = ("a", "b", "c", "d")


LENGTHS = (0.3, 1.0, 1.0, 2.0)


SHAPES = {"one.weight": (48, 64), "two.weight": (24, 40)}


def low_rank(generator: torch.Generator, shape: tuple[int, int], length: float, rank: int = 5) -> Tensor:
    """An update of low rank with a little noise and rows of unequal size."""
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
    update = rows * (left @ right + 0.3 * noise)
    return length * update / update.norm()


def product(energy: Any, residual_map: Any = None, center: Any = None, temperature: float = 1.0) -> ProductOfExperts:
    anchor = Anchor(center, RelativePrecision(0.05))
    maps = InputGram() if residual_map is None else residual_map
    return ProductOfExperts.of(NAMES, maps, energy, Relative(1.0), anchor=anchor, temperature=temperature)


def around(vectors: TaskVectors, poe: ProductOfExperts, count: int = 500, seed: int = 0) -> SpanDraws:
    """Gibbs draws through the merge."""
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    return SpanDraws.of(gibbs(posterior, count, generator=generator), posterior)
