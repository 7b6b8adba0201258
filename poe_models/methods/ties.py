"""TIES: trim, elect signs, merge the entries that agree (Yadav et al., 2023, arXiv 2306.01708).

:class:`SignElection` does so on any representation of the experts; DARE-TIES and KnOTS are others than the entries of
the updates themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import for_each_expert, require_choice, require_number, require_share
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData
from poe_models.methods.selection import joined, magnitude_thresholds
from poe_models.weights.task_vectors import ModuleUpdates

Combine = Literal["mean", "sum", "max"]
Scope = Literal["model", "module"]
_TOGETHER = 2**14
"""Entries of an update that are merged at once: of many small modules, or of one."""


class SignElection(MergingMethod):
    """Base of the methods that trim, elect signs and merge on a representation of the experts' updates.

    A subclass is a dataclass with the fields ``density``, ``scale``, ``thresholds`` and ``majority``, and may have
    ``combine``.
    """

    density: float
    scale: float
    combine: Combine = "mean"
    thresholds: tuple[float, ...] | None
    majority: int | None

    @abstractmethod
    def represented(self, batch: ModuleBatch) -> Iterable[tuple[Tensor | None, Tensor]]:
        """For each module a basis ``(d_out, k)``, None for the identity, and the experts in it ``(N, ...)``."""

    @property
    @override
    def ready(self) -> bool:
        return None not in (self.thresholds, self.majority)

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> Self:
        def vectors() -> Iterator[Tensor]:
            for module in modules:
                for _, experts in self.represented(ModuleBatch.of_module(module)):
                    yield experts.flatten(1)

        thresholds, majority = trimming(vectors, self.density)
        return replace(self, thresholds=thresholds, majority=majority)  # type: ignore[type-var]

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        merged = torch.empty_like(batch.updates[:, 0])
        for position, (basis, experts) in enumerate(self.represented(batch)):
            thresholds, majority = self.trimming_of(experts, batch)
            values = merged_by_sign(list(zip(experts, thresholds, strict=True)), self.combine, majority)
            merged[position] = values if basis is None else basis @ values
        return merged.mul_(self.scale)

    def trimming_of(self, experts: Tensor, batch: ModuleBatch) -> tuple[tuple[float, ...], int]:
        """Thresholds and majority sign for one module: those of the whole model."""
        return for_each_expert(self, "thresholds", batch), self.majority or 0


@dataclass(frozen=True)
class Ties(SignElection):
    """``scale * merge(elect(trim(U_i)))`` (Yadav et al., 2023, Algorithm 1).

    Every expert keeps its largest entries; each entry elects the sign of the sum of what is left; the mean of the
    experts that have this sign is taken. The paper trims the task vector as a whole and takes the mean; merging tools
    differ: some trim each tensor (``scope="module"``), some take the sum.

    Args:
        density: Share of the entries that an expert keeps.
        scale: Coefficient of the merged update; 1 is the paper's choice without validation data.
        combine: Mean, sum, or largest of the entries that agree.
        scope: Trim over the whole model, or within each module.
        thresholds: Smallest magnitude that each expert keeps; filled in by ``prepare``.
        majority: Sign of the entries whose trimmed values cancel: the more frequent one of the model;
            filled in by ``prepare``.

    >>> updates = torch.tensor([[[4.0, 1.0, -3.0]], [[2.0, 0.0, 5.0]]])
    >>> Ties(density=0.5, scope="module")(updates)
    tensor([[3., 0., 5.]])
    """

    about = About(
        "TIES",
        "Yadav et al., 2023, TIES-Merging, arXiv 2306.01708",
        scope="model",
        exceptions={
            "one expert": "small entries are trimmed",
            "identical experts": "small entries are trimmed",
        },
    )

    density: float = 0.2
    scale: float = 1.0
    combine: Combine = "mean"
    scope: Scope = "model"
    thresholds: tuple[float, ...] | None = None
    majority: int | None = None

    def __post_init__(self) -> None:
        require_share(self, "density")
        require_number(self, "scale")
        require_choice(self, "combine", Combine)
        require_choice(self, "scope", Scope)
        if self.scope == "module" and (self.thresholds, self.majority) != (None, None):
            raise ValueError(
                "`Ties(scope='module', thresholds=..., majority=...)`: a module's own are used. Leave them out, or "
                "take scope='model'."
            )

    @property
    @override
    def ready(self) -> bool:
        return self.scope == "module" or super().ready

    @override
    def represented(self, batch: ModuleBatch) -> Iterable[tuple[Tensor | None, Tensor]]:
        return ((None, updates) for updates in batch.updates)

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        if self.scope == "module":
            return super().merged(batch)
        thresholds, majority = self.trimming_of(batch.updates, batch)
        parts = batch.updates.split(max(1, _TOGETHER // batch.updates[0, 0].numel()))
        pairs = [list(zip(part.unbind(1), thresholds, strict=True)) for part in parts]
        return torch.cat([merged_by_sign(each, self.combine, majority) for each in pairs]).mul_(self.scale)

    @override
    def trimming_of(self, experts: Tensor, batch: ModuleBatch) -> tuple[tuple[float, ...], int]:
        if self.scope == "module":
            return trimming(lambda: [experts.flatten(1)], self.density)
        return super().trimming_of(experts, batch)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return 8 * shape[0] * shape[1]


def trimmed(values: Tensor, threshold: float) -> Tensor:
    """The entries whose magnitude reaches the threshold, zero elsewhere."""
    return torch.where(values.abs() >= threshold, values, 0)


def elected_sum(experts: Iterable[tuple[Tensor, float]]) -> Tensor:
    """The sum of the trimmed experts, whose sign is elected, from the values ``(...)`` and threshold of each."""
    # Float64 makes the sum of a few float32 numbers exact, so that the election does not depend on the experts' order.
    total: Tensor | None = None
    for values, threshold in experts:
        kept = trimmed(values, threshold)
        total = kept.double() if total is None else total.add_(kept)
    assert total is not None
    return total


def merged_by_sign(experts: Sequence[tuple[Tensor, float]], combine: Combine, majority: int) -> Tensor:
    """Merge the trimmed entries that have the elected sign.

    Args:
        experts: Values ``(...)`` and threshold of each.
        combine: The mean over the experts that agree, their sum, or the one of largest magnitude.
        majority: The sign, 1, 0 or -1, where the trimmed experts cancel; 0 counts as -1.

    Returns:
        The merged values, ``(...)``.
    """
    total = elected_sum(experts)
    positive = (total > 0) | ((total == 0) & (majority > 0))
    del total
    merged = torch.zeros_like(experts[0][0])
    count = torch.zeros_like(merged)
    for values, threshold in experts:
        kept = trimmed(values, threshold)
        kept = torch.where(positive == (kept > 0), kept, 0)
        if combine == "max":
            merged = torch.where(kept.abs() > merged.abs(), kept, merged)
        else:
            merged += kept
            count += kept != 0
    return merged / count.clamp(min=1) if combine == "mean" else merged


def trimming(vectors: Callable[[], Iterable[Tensor]], density: float) -> tuple[tuple[float, ...], int]:
    """Thresholds and majority sign of a whole model.

    Args:
        vectors: Starts a pass over the model: for each module the experts' entries, ``(N, L)``.
        density: Share of the entries that an expert keeps.

    Returns:
        One threshold for each expert; 1, 0 or -1.
    """
    thresholds = magnitude_thresholds(vectors, density)
    passed = joined(vectors())
    surplus = sum(int(elected_sum(zip(values, thresholds, strict=True)).sign().sum().item()) for values in passed)
    return thresholds, (surplus > 0) - (surplus < 0)
