"""Every merging method, and batches for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poe_models.methods import METHODS, DogeTA, MergingMethod, ModuleBatch, Ties, WudiAdam
from poe_models.weights.task_vectors import ModuleUpdates
from tests.helpers import name_of

ALL: list[MergingMethod] = [
    *(cls() for name, cls in METHODS.items() if cls.about.data == "none" and name not in ("DogeTA", "WudiAdam")),
    DogeTA(steps=20),
    WudiAdam(steps=20, learning_rate=1e-4),
    Ties(scope="module"),
    Ties(combine="max"),
]


for_all = pytest.mark.parametrize("method", ALL, ids=name_of)


def batch_of(updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> ModuleBatch:
    return ModuleBatch.of(
        updates, [f"m{i}" for i in range(len(updates))], [f"e{i}" for i in range(updates.shape[1])], low_rank
    )


def as_modules(batch: ModuleBatch) -> list[ModuleUpdates]:
    return [
        ModuleUpdates(
            name,
            name,
            batch.experts,
            torch.zeros_like(updates[0]),
            updates,
            None if batch.low_rank is None else (batch.low_rank[0][i], batch.low_rank[1][i]),
        )
        for i, (name, updates) in enumerate(zip(batch.names, batch.updates, strict=True))
    ]


def merge(method: MergingMethod, batch: ModuleBatch | Tensor) -> Tensor:
    batch = batch if isinstance(batch, ModuleBatch) else batch_of(batch)
    return method.prepare(as_modules(batch)).merge(batch)


def low_rank_batch(generator: torch.Generator, rank: int = 2) -> ModuleBatch:
    b = torch.randn(2, 3, 14, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(2, 3, rank, 12, generator=generator, dtype=torch.float64)
    b[0, 1, :, 1:] = 0  # an adapter of smaller rank
    return batch_of(b @ a, (b, a))
