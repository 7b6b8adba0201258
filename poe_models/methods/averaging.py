"""Weighted sums of the updates: averaging, task arithmetic, MetaGPT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import for_each_expert, require_number
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData
from poe_models.sums import sum_of_squares
from poe_models.weights.task_vectors import ModuleUpdates


@dataclass(frozen=True)
class Average(MergingMethod):
    """``mean_i U_i`` (Wortsman et al., 2022, model soups).

    >>> Average()(torch.tensor([1.0, 3.0])[:, None, None])
    tensor([[2.]])
    """

    about = About("weight averaging", "Wortsman et al., 2022, Model soups, arXiv 2203.05482")

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        return batch.updates.mean(1)


average = Average()
"""The mean update."""


@dataclass(frozen=True)
class TaskArithmetic(MergingMethod):
    """``scale * sum_i U_i`` (Ilharco et al., 2023).

    Args:
        scale: The task-arithmetic coefficient.

    >>> TaskArithmetic(0.5)(torch.tensor([1.0, 3.0])[:, None, None])
    tensor([[2.]])
    """

    about = About(
        "task arithmetic",
        "Ilharco et al., 2023, Editing models with task arithmetic, arXiv 2212.04089",
        exceptions={
            "one expert": "times its coefficient",
            "identical experts": "a sum, not a mean",
        },
    )

    scale: float = 0.3

    def __post_init__(self) -> None:
        require_number(self, "scale")

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        return self.scale * batch.updates.sum(1)


@dataclass(frozen=True)
class MetaGPT(MergingMethod):
    """``sum_i c_i U_i`` with ``c_i = |U_i|^2 / sum_k |U_k|^2``, norms over the whole model (Zhou et al., 2024).

    The coefficients minimise an upper bound on the average loss difference to the experts, for updates that are
    orthogonal and a loss that is linear around the base.

    Args:
        coefficients: Coefficients ``c_i``, in the order of the experts; filled in by ``prepare``.

    >>> MetaGPT((0.25, 0.75))(torch.tensor([1.0, 2.0])[:, None, None])
    tensor([[1.7500]])
    """

    about = About("MetaGPT", "Zhou et al., 2024, Model-exclusive task arithmetic, arXiv 2406.11385", scope="model")

    coefficients: tuple[float, ...] | None = None

    @property
    @override
    def ready(self) -> bool:
        return self.coefficients is not None

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> MetaGPT:
        squares = sum((sum_of_squares(module.updates).cpu() for module in modules), torch.zeros(()))
        shares = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return replace(self, coefficients=tuple(shares.tolist()))

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        values = for_each_expert(self, "coefficients", batch)
        weights = torch.tensor(values, dtype=batch.updates.dtype, device=batch.updates.device)
        return torch.einsum("n,mnij->mij", weights, batch.updates)
