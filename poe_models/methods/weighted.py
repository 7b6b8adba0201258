"""Weighted sums of thinned updates, each tensor by itself: the definitions of mergekit (Goddard et al., 2024)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import (
    for_each_expert,
    require_number,
    require_numbers,
    require_seed,
    require_share,
    require_shares,
)
from poe_models.methods.method import About, MergingMethod, ModuleBatch, named_generator

_CITATION = "Goddard et al., 2024, Arcee's MergeKit, arXiv 2403.13257"
_NO_DIVISOR = 1e-8


@dataclass(frozen=True)
class WeightedMethod(MergingMethod):
    """``sum_i w_i t_i(U_i)``, divided by the sum of the weights if ``normalize`` is set; ``t_i`` thins an update.

    With ``elect``, only entries with the sign of their sum take part, which counts as plus where the sum is zero, and
    only the weights of those are summed.

    Args:
        elect: Elect a sign for every entry, as TIES does.
        normalize: Divide by the sum of the weights.
        rescale: Keep the L1 norm of every thinned update.
        density: Share of the entries that an expert keeps.
        weights: Weight of each expert, in their order; 1 if not given.
        densities: Share of the entries that each expert keeps; ``density`` if not given.
        base_weight: Weight of the base, whose update is zero, in the sum that is divided by.
    """

    elect: bool = False
    normalize: bool = True
    rescale: bool = False
    density: float = 1.0
    weights: tuple[float, ...] | None = None
    densities: tuple[float, ...] | None = None
    base_weight: float = 0.0

    def __post_init__(self) -> None:
        require_number(self, "base_weight")
        require_share(self, "density")
        require_numbers(self, "weights")
        require_shares(self, "densities")

    @abstractmethod
    def mask(self, update: Tensor, density: float, module: str, expert: str) -> Tensor:
        """The entries ``(d_out, d_in)`` of an update that are kept, of a density below 1."""

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        weights = self._of_experts("weights", 1.0, batch)
        densities = self._of_experts("densities", self.density, batch)
        merged = torch.empty_like(batch.updates[:, 0])
        for position, (module, updates) in enumerate(zip(batch.names, batch.updates, strict=True)):
            parts = [
                self._thinned(update, density, module, expert).mul_(weight)
                for update, density, weight, expert in zip(updates, densities, weights, batch.experts, strict=True)
            ]
            merged[position] = self._combined(parts, weights)
        return merged

    def _of_experts(self, name: str, default: float, batch: ModuleBatch) -> tuple[float, ...]:
        return (default,) * len(batch.experts) if getattr(self, name) is None else for_each_expert(self, name, batch)

    def _thinned(self, update: Tensor, density: float, module: str, expert: str) -> Tensor:
        if density >= 1:
            return update.clone()
        kept = torch.where(self.mask(update, density, module, expert), update, 0)
        before, after = (float(each.abs().sum(dtype=torch.float64)) for each in (update, kept))
        return kept.mul_(before / after) if self.rescale and after > 0 else kept

    def _combined(self, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        if not self.elect:
            divisor = sum(weights) + self.base_weight
            total = torch.stack([*parts]).sum(0)
            return total.div_(divisor) if self.normalize and abs(divisor) >= _NO_DIVISOR else total
        # Float64 makes the sum of a few float32 numbers exact, so that the election does not depend on the order.
        positive = torch.stack([*parts]).sum(0, dtype=torch.float64) >= 0
        total, divisors = torch.zeros_like(parts[0]), torch.full_like(parts[0], self.base_weight)
        for part, weight in zip(parts, weights, strict=True):
            agrees = (part != 0) & ((part > 0) == positive)
            total += torch.where(agrees, part, 0)
            divisors.add_(agrees, alpha=weight)
        return total.div_(torch.where(divisors == 0, 1, divisors)) if self.normalize else total

    @override
    def importance(self, experts: int) -> tuple[float, ...]:
        return self.weights or super().importance(experts)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return (5 * experts + 8) * shape[0] * shape[1]


@dataclass(frozen=True)
class Weighted(WeightedMethod):
    """Weighted sum of the updates' largest entries: mergekit's ``linear``, ``task_arithmetic`` and ``ties``.

    With the defaults it is the average; ``normalize=False`` is task arithmetic, and ``elect=True`` with densities is
    TIES, each tensor being trimmed by itself.

    >>> updates = torch.tensor([[[4.0, 1.0, -3.0]], [[2.0, 0.0, 5.0]]])
    >>> Weighted(elect=True, weights=(1.0, 3.0), densities=(0.7, 0.7))(updates)
    tensor([[2.5000, 0.0000, 5.0000]])
    """

    about = About("weighted sum", _CITATION)

    @override
    def mask(self, update: Tensor, density: float, module: str, expert: str) -> Tensor:
        count = max(1, int(density * update.numel())) if density > 0 else 0
        largest = update.abs().flatten().sort(descending=True, stable=True).indices[:count]
        kept = torch.zeros(update.numel(), dtype=torch.bool, device=update.device)
        kept[largest] = True
        return kept.view_as(update)


@dataclass(frozen=True)
class WeightedDare(WeightedMethod):
    """Weighted sum of updates whose entries are dropped at random: mergekit's ``dare_linear`` and ``dare_ties``.

    The masks depend on the seed and on the names of module and expert.

    Args:
        seed: Seed of the masks.

    >>> WeightedDare(density=0.5, seed=1)(torch.ones(1, 1, 8))
    tensor([[2., 2., 0., 0., 0., 2., 2., 0.]])
    """

    about = About(
        "weighted sum of randomly dropped updates",
        _CITATION,
        random=True,
        exceptions={
            "one expert": "entries are dropped at random",
            "identical experts": "entries are dropped at random",
        },
    )

    rescale: bool = True
    density: float = 0.5
    seed: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self)

    @override
    def mask(self, update: Tensor, density: float, module: str, expert: str) -> Tensor:
        drawn = torch.rand(update.shape, generator=named_generator(self.seed, module, expert))
        return drawn.to(update.device) >= 1 - density
