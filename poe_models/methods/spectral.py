"""Rules on singular vectors of a module: TSV-M, ISO-C and ISO-CTS.

All three add up singular triplets of the experts; they differ in the triplets, and in the singular values that these
get. Only singular values that count (see :mod:`poe_models.methods.decompositions`) take part, so that on exactly
low-rank updates nothing depends on null-space vectors; on adapters the cost is that of their ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import require_number, require_share
from poe_models.methods.decompositions import (
    RANK_TOLERANCE,
    SVD,
    SVD_FLOATS,
    compressed,
    concatenated,
    frobenius,
    guarded_svd,
    nearest_orthogonal,
)
from poe_models.methods.method import About, MergingMethod, ModuleBatch


class SpectralMethod(MergingMethod):
    """Base of the methods with a ``scale`` of the merged update and a ``rank_tolerance`` of singular values."""

    scale: float
    rank_tolerance: float

    def __post_init__(self) -> None:
        require_number(self, "scale")
        require_share(self, "rank_tolerance", one=False)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return SVD_FLOATS * modules * shape[0] * shape[1]


@dataclass(frozen=True)
class TSVM(SpectralMethod):
    """Task singular vectors, merged without interference (Gargiulo et al., 2025).

    Of each expert the first ``floor(min(d_out, d_in) / N)`` singular triplets are kept (at least one), and the left and
    the right vectors of all experts are replaced by the nearest orthonormal ones.

    Args:
        scale: Coefficient of the merged update.
        rank_tolerance: Singular values up to this times the module's largest Frobenius norm count as zero.

    >>> one, first = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([2.0, 0.0]))
    >>> torch.allclose(TSVM()(torch.stack([one, one])), first, atol=1e-6)  # identical experts: one of two triplets
    True
    """

    about = About(
        "TSV-M",
        "Gargiulo et al., 2025, Task singular vectors, arXiv 2412.00081",
        matrices=True,
        exceptions={
            "one expert": "times its coefficient",
            "identical experts": "an expert keeps a share of its directions",
        },
    )

    scale: float = 1.0
    rank_tolerance: float = RANK_TOLERANCE

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        count, side = batch.updates.shape[1], min(batch.updates.shape[2:])
        space = compressed(batch)
        floor = self.rank_tolerance * frobenius(space.cores)
        parts = [guarded_svd(core, floor).first(max(1, side // count)) for core in space.cores.unbind(1)]
        kept = concatenated(parts)
        left, right = (nearest_orthogonal(vectors, self.rank_tolerance) for vectors in (kept.left, kept.right))
        return self.scale * space.lift((left * kept.values.unsqueeze(-2)) @ right.mT)


@dataclass(frozen=True)
class IsoC(SpectralMethod):
    """The sum of the updates with all its singular values made equal to their mean (Marczak et al., 2025, ISO-C).

    The mean is over the singular values that count, as many as the rank of the sum.

    Args:
        scale: Coefficient of the merged update.
        rank_tolerance: Singular values up to this times the module's largest Frobenius norm count as zero.

    >>> updates = torch.stack([torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 0.0]))])
    >>> torch.allclose(IsoC()(updates), 2 * torch.eye(2), atol=1e-6)
    True
    """

    about = About(
        "ISO-C",
        "Marczak et al., 2025, No task left behind, arXiv 2502.04959",
        matrices=True,
        exceptions={
            "one expert": "all singular values become equal",
            "identical experts": "all singular values become equal",
        },
    )

    scale: float = 1.0
    rank_tolerance: float = RANK_TOLERANCE

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        space = compressed(batch)
        svd = guarded_svd(space.cores.sum(1), self.rank_tolerance * frobenius(space.cores))
        return self.scale * space.lift(_mean_value(svd) * (svd.left @ svd.right.mT))


@dataclass(frozen=True)
class IsoCTS(SpectralMethod):
    """ISO-C with the smaller part of the common directions given to single experts (Marczak et al., 2025, ISO-CTS).

    The first ``c`` singular directions of the sum are common; each expert adds the first ``p`` of what its update has
    outside their left span, with ``c + N p = min(d_out, d_in)``. All are made orthonormal and get the same singular
    value, the mean of those that count.

    Args:
        common: Share of the directions that are common, before rounding to the sum above.
        scale: Coefficient of the merged update.
        rank_tolerance: Singular values up to this times the module's largest Frobenius norm count as zero.

    >>> updates = torch.diag(torch.tensor([2.0, 0.0])).expand(2, 2, 2)
    >>> torch.allclose(IsoCTS()(updates), updates.sum(0), atol=1e-6)
    True
    """

    about = About(
        "ISO-CTS",
        "Marczak et al., 2025, No task left behind, arXiv 2502.04959",
        matrices=True,
        exceptions={
            "one expert": "all singular values become equal",
            "identical experts": "all singular values become equal",
        },
    )

    common: float = 0.8
    scale: float = 1.0
    rank_tolerance: float = RANK_TOLERANCE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "common")

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        space = compressed(batch)
        floor = self.rank_tolerance * frobenius(space.cores)
        count, own = directions(min(batch.updates.shape[2:]), batch.updates.shape[1], self.common)
        common = guarded_svd(space.cores.sum(1), floor).first(count)
        parts = []
        for core in space.cores.unbind(1):
            rest = core - common.left @ (common.left.mT @ core)
            parts.append(guarded_svd(rest, floor).first(own))
        both = concatenated([*parts, common])
        left, right = (nearest_orthogonal(vectors, self.rank_tolerance) for vectors in (both.left, both.right))
        return self.scale * space.lift(_mean_value(both) * (left @ right.mT))


def directions(side: int, experts: int, common: float) -> tuple[int, int]:
    """Numbers of common directions of ISO-CTS and of each expert's own: ``c`` and ``p`` with ``c + N p = side``.

    >>> directions(768, 8, 0.8)
    (616, 19)
    """
    own = min(round((side - int(side * common)) / experts), side // experts)
    return side - own * experts, own


def _mean_value(svd: SVD) -> Tensor:
    """The mean of the singular values that count, 0 if none does, ``(..., 1, 1)``."""
    mean = svd.values.sum(-1) / svd.counted.clamp(min=1)
    return torch.where(svd.counted > 0, mean, 0)[..., None, None]
