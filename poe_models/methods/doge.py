"""DOGE-TA: task arithmetic after a common offset of the experts that reduces their interference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import for_each_expert, require_count, require_number, require_share
from poe_models.methods.decompositions import RANK_TOLERANCE, SVD_FLOATS, frobenius, guarded_svd, inverse_norms
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData
from poe_models.methods.selection import magnitude_thresholds
from poe_models.weights.task_vectors import ModuleUpdates


@dataclass(frozen=True)
class DogeTA(MergingMethod):
    """``sum_i l_i m_i (U_i + D)`` with ``l_i = scale / |U_i|`` (Wei et al., 2025).

    The offset ``D`` of a module starts at 0 and minimises, by Adam, how far the merge without trimming is from each
    expert along the expert's own rows::

        sum_i sum_rows <U_i, U_i - sum_k l_k (U_k + D)>_row^2

    with gradients orthogonal to the shared subspace: the main left singular vectors of those of all experts. ``m_i``
    keeps the largest entries of ``U_i`` over the whole model. As the coefficients are relative to the updates and the
    step is not, merging ``c U_i`` does not give ``c Z``.

    Args:
        scale: Norm of each expert's part.
        density: Share of the entries that an expert keeps, over the whole model.
        subspace: The shared subspace has ``min(d_out, d_in) / subspace`` dimensions.
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam.
        thresholds: Smallest magnitude that each expert keeps; filled in by ``prepare``.

    >>> DogeTA(scale=0.5, steps=0, thresholds=(0.0, 0.0))(torch.tensor([3.0, 4.0])[:, None, None])
    tensor([[1.]])
    """

    about = About(
        "DOGE-TA",
        "Wei et al., 2025, Adaptive projective gradient descent, arXiv 2501.01230",
        scope="model",
        matrices=True,
        exceptions={
            "one expert": "updates are brought to one length and trimmed",
            "identical experts": "updates are brought to one length and trimmed",
            "scale equivariance": "updates are brought to one length",
        },
    )

    scale: float = 0.07
    density: float = 0.3
    subspace: int = 6
    steps: int = 400
    learning_rate: float = 1e-4
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_share(self, "density")
        require_number(self, "scale")
        require_count(self, "subspace", 1)
        require_count(self, "steps", 0)
        require_number(self, "learning_rate", 0.0)

    @property
    @override
    def ready(self) -> bool:
        return self.thresholds is not None

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> DogeTA:
        def vectors() -> Iterable[Tensor]:
            return (module.updates.flatten(1) for module in modules)

        return replace(self, thresholds=magnitude_thresholds(vectors, self.density))

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return (2 * experts + SVD_FLOATS) * modules * shape[0] * shape[1]

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        thresholds = for_each_expert(self, "thresholds", batch)
        weights = self.scale * inverse_norms(batch.updates, RANK_TOLERANCE)
        offset = self._offset(batch.updates, weights)
        merged = torch.zeros_like(offset)
        for update, weight, threshold in zip(batch.updates.unbind(1), weights.unbind(1), thresholds, strict=True):
            merged += torch.where(update.abs() >= threshold, weight[:, None, None] * (update + offset), 0)
        return merged

    def _offset(self, updates: Tensor, weights: Tensor) -> Tensor:
        """``D`` of each module, ``(M, d_out, d_in)``."""
        shared = self._shared(updates)
        total = weights.sum(1)[:, None, None]
        merged = torch.einsum("mn,mnij->mij", weights, updates)
        gaps = torch.einsum("mnij,mnij->mni", updates, updates - merged.unsqueeze(1))
        offset = torch.zeros_like(merged)
        optimizer = torch.optim.Adam([offset], lr=self.learning_rate)
        for _ in range(self.steps):
            residual = gaps - total * torch.einsum("mnij,mij->mni", updates, offset)
            gradient = -2 * total * torch.einsum("mni,mnij->mij", residual, updates)
            offset.grad = gradient - shared @ (shared.mT @ gradient)
            optimizer.step()
        return offset

    def _shared(self, updates: Tensor) -> Tensor:
        """Orthonormal basis of the shared subspace, ``(M, d_out, k)``."""
        side, floor = min(updates.shape[2:]), RANK_TOLERANCE * frobenius(updates)
        kept = max(1, side // updates.shape[1])
        left = torch.cat([guarded_svd(update, floor).first(kept).left for update in updates.unbind(1)], -1)
        return guarded_svd(left, torch.full_like(floor, RANK_TOLERANCE)).left[..., : side // self.subspace]
