"""Rules on moments of the experts' data: Fisher merging, RegMean, uncertainty-based gradient matching."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import for_each_expert, require_number, require_share
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData
from poe_models.operators import moment_rounding, unit_diagonal
from poe_models.residual_maps import MomentKind, MomentsSource, require_source, scaled_off_diagonal
from poe_models.sums import sum_of_squares
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.task_vectors import ModuleUpdates


@dataclass(frozen=True)
class MomentsMethod(MergingMethod):
    """Base of the rules on moments of every expert's data.

    Args:
        moments: Moments of every expert: ``ModuleMoments``, or a ``MomentsFolder``.
    """

    moments: MomentsSource

    kind: ClassVar[MomentKind]
    """Kind of the moments."""

    def __post_init__(self) -> None:
        require_source(self)

    def read(self, batch: ModuleBatch) -> Tensor:
        """Moments of all experts, ``(M, N, ...)`` in their own dtype."""
        shape = batch.updates.shape[-2:]
        given = self.moments.opened(self.kind, batch.experts)
        return torch.stack([given.read(name, batch.names, shape) for name in batch.experts], 1).to(batch.updates.device)

    @override
    def inputs(self, experts: Sequence[str], modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Checkpoint]:
        given = self.moments.opened(self.kind, experts)
        return {role: found for expert in experts for role, found in given.inputs(expert, modules).items()}


@dataclass(frozen=True)
class FisherMerging(MomentsMethod):
    """``sum_i w_i (F_i + floor) U_i / sum_i w_i (F_i + floor)`` entry by entry (Matena & Raffel, 2022).

    Args:
        moments: Exact diagonal Fisher information.
        floor: Number above 0, added to every entry, so that entries that no example depends on are averaged.
        normalize: Weigh each expert by one over the norm of its Fisher information over the whole model.
        weights: Weights ``w_i``, in the order of the experts; filled in by ``prepare`` if ``normalize``.

    >>> from poe_models import ModuleMoments
    >>> given = ModuleMoments("fisher", {n: {"fc": torch.full((1, 1), f)} for n, f in (("a", 3.0), ("b", 1.0))})
    >>> batch = ModuleBatch.of(torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1), ["fc"], ["a", "b"])
    >>> FisherMerging(given, floor=1e-9, normalize=False).merge(batch)
    tensor([[[2.]]])
    """

    about = About(
        "Fisher merging",
        "Matena & Raffel, 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        scope="model",
        data="fisher",
    )
    kind = "fisher"

    floor: float = 1e-6
    normalize: bool = True
    weights: tuple[float, ...] | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "floor", torch.finfo(torch.float32).tiny)

    @property
    @override
    def ready(self) -> bool:
        return self.weights is not None or not self.normalize

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> FisherMerging:
        squares = sum((sum_of_squares(self.read(ModuleBatch.of_module(m))[0]).cpu() for m in modules), torch.zeros(()))
        inverse = 1 / (squares.sqrt() + self.floor)
        return replace(self, weights=tuple((inverse / inverse.sum()).tolist()))

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        precision = self.read(batch).to(batch.updates.dtype) + self.floor
        if self.normalize:
            weights = for_each_expert(self, "weights", batch)
            precision = precision * precision.new_tensor(weights)[:, None, None]
        return (precision * batch.updates).sum(1) / precision.sum(1)


@dataclass(frozen=True)
class RegMean(MomentsMethod):
    """``(sum_i U_i G_i) (sum_i G_i)^+``, ``G_i`` the second moments of an expert's inputs (Jin et al., 2023).

    Input directions that no example has stay at the base's: the published inverse does not exist there.

    Args:
        moments: Second moments ``X X^T / n`` of the inputs.
        off_diagonal: Factor on their off-diagonal entries.

    >>> from poe_models import ModuleMoments
    >>> given = ModuleMoments("activations", {n: {"fc": f * torch.eye(2)} for n, f in (("a", 3.0), ("b", 1.0))})
    >>> batch = ModuleBatch.of(torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2), ["fc"], ["a", "b"])
    >>> RegMean(given).merge(batch)
    tensor([[[2., 2.]]])
    """

    about = About(
        "RegMean",
        "Jin et al., 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
        data="activations",
        matrices=True,
    )
    kind = "activations"

    off_diagonal: float = 0.9

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.off_diagonal != 0:
            require_share(self, "off_diagonal")

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        given = self.read(batch)
        rounding = moment_rounding(given.shape[-1], given.dtype)
        grams = scaled_off_diagonal(given.double(), self.off_diagonal)
        pull = (batch.updates.double() @ grams).sum(1)
        return _solved_from_right(pull, grams.sum(1), rounding).to(batch.updates.dtype)


@dataclass(frozen=True)
class GradientMatching(MomentsMethod):
    """``scale * sum_i (H_0 + F_i) U_i / (H_0 + scale * sum_i F_i)`` entry by entry (Daheim et al., 2024).

    ``H_0`` is the base's own curvature. Without Fisher information this is task arithmetic, without ``H_0``
    Fisher-weighted averaging.

    Args:
        moments: Exact diagonal Fisher information.
        scale: The task-arithmetic coefficient, one for all experts.
        floor: Number above 0, added to the base's curvature: entries that no example depends on are task arithmetic's.
        base: Name under which the moments have the base's Fisher information; without, ``H_0`` is the floor.

    >>> from poe_models import ModuleMoments
    >>> given = ModuleMoments("fisher", {n: {"fc": torch.full((1, 1), f)} for n, f in (("a", 3.0), ("b", 1.0))})
    >>> batch = ModuleBatch.of(torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1), ["fc"], ["a", "b"])
    >>> GradientMatching(given, floor=1e-9).merge(batch), GradientMatching(given, floor=1e9).merge(batch)
    (tensor([[[2.]]]), tensor([[[6.]]]))
    """

    about = About(
        "uncertainty-based gradient matching",
        "Daheim et al., 2024, Model merging by uncertainty-based gradient matching, arXiv 2310.12808",
        data="fisher",
        exceptions={
            "one expert": "times its coefficient",
            "identical experts": "a sum where the Fisher information is small",
        },
    )
    kind = "fisher"

    scale: float = 1.0
    floor: float = 1e-6
    base: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "scale", 0.0)
        require_number(self, "floor", torch.finfo(torch.float32).tiny)

    @override
    def inputs(self, experts: Sequence[str], modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Checkpoint]:
        return super().inputs([*experts, *([] if self.base is None else [self.base])], modules)

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        fisher = self.read(batch).to(batch.updates.dtype)
        own = torch.full_like(fisher[:, 0], self.floor)
        if self.base is not None:
            given = self.moments.opened(self.kind, [self.base])
            own += given.read(self.base, batch.names, batch.updates.shape[-2:]).to(own)
        pull = ((own.unsqueeze(1) + fisher) * batch.updates).sum(1)
        return self.scale * pull / (own + self.scale * fisher.sum(1))


def _solved_from_right(pull: Tensor, gram: Tensor, rounding: float) -> Tensor:
    """``pull @ gram^+``, the solution of least norm, in float64.

    Eigenvalues within rounding count as zero once the diagonal is one, so that small inputs beside large ones count.
    With ``gram = B L B^T`` and ``B`` of full column rank, ``gram^+ = (B^+)^T L^-1 B^+``.
    """
    unit, sizes = unit_diagonal(gram)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not bool(failed.any()) and bool((factor.diagonal(dim1=-2, dim2=-1).square() > rounding).all()):
        return torch.cholesky_solve((pull / sizes.unsqueeze(-2)).mT, factor).mT / sizes.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(unit)
    kept = values > rounding
    inverse = torch.linalg.pinv(sizes.unsqueeze(-1) * vectors * kept.unsqueeze(-2))
    return ((pull @ inverse.mT) * torch.where(kept, 1 / values, 0.0).unsqueeze(-2)) @ inverse
