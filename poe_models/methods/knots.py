"""KnOTS: TIES, or DARE and TIES, in the common singular basis of the experts (Stoica et al., 2025, arXiv 2410.19735).

Each module's updates side by side, ``[U_1 ... U_N] = B diag(s) [V_1 ... V_N]``, give every expert a representation
``R_i = diag(s) V_i = B^T U_i`` in one basis; the representations of all modules together are merged entry by entry, and
the merged update is ``B R``. Meant for adapters, whose bases are small: every pass over the model makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import require_number, require_seed, require_share
from poe_models.methods.dare import all_dropped
from poe_models.methods.decompositions import RANK_TOLERANCE, compressed, frobenius
from poe_models.methods.method import About, ModuleBatch
from poe_models.methods.ties import SignElection


@dataclass(frozen=True)
class KnotsTies(SignElection):
    """``scale * B merge(elect(trim(R_i)))``, TIES with the disjoint mean on the representations (Stoica et al., 2025).

    Args:
        density: Share of the entries of its representation that an expert keeps, over the whole model.
        scale: Coefficient of the merged update.
        rank_tolerance: Singular values up to this times the module's largest Frobenius norm count as zero.
        thresholds: Smallest magnitude that each expert keeps; filled in by ``prepare``.
        majority: Sign of the entries whose trimmed values cancel; filled in by ``prepare``.

    >>> one = torch.diag(torch.tensor([2.0, 1.0]))
    >>> method = KnotsTies(density=1.0, scale=1.0, thresholds=(0.0, 0.0), majority=1)
    >>> torch.allclose(method(torch.stack([one, one])), one, atol=1e-6)
    True
    """

    about = About(
        "KnOTS-TIES",
        "Stoica et al., 2025, Model merging with SVD to tie the knots, arXiv 2410.19735",
        scope="model",
        matrices=True,
        exceptions={
            "one expert": "small coordinates are trimmed",
            "identical experts": "small coordinates are trimmed",
        },
    )

    density: float = 0.2
    scale: float = 0.6
    rank_tolerance: float = RANK_TOLERANCE
    thresholds: tuple[float, ...] | None = None
    majority: int | None = None

    def __post_init__(self) -> None:
        require_share(self, "density")
        require_number(self, "scale")
        require_share(self, "rank_tolerance", one=False)

    @override
    def represented(self, batch: ModuleBatch) -> Iterator[tuple[Tensor, Tensor]]:
        return in_common_basis(batch, self.rank_tolerance)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return _working_floats(modules, experts, shape)


@dataclass(frozen=True)
class KnotsDareTies(SignElection):
    """``scale * B merge(elect(trim(drop(R_i))))``: entries of the representations are dropped first (see ``Dare``).

    Args:
        drop: Probability of dropping an entry of a representation.
        density: Share of the entries that an expert keeps after that; dropped ones, which are zero, count.
        scale: Coefficient of the merged update.
        seed: Seed of the masks.
        rank_tolerance: Singular values up to this times the module's largest Frobenius norm count as zero.
        thresholds: Smallest magnitude that each expert keeps; filled in by ``prepare``.
        majority: Sign of the entries whose trimmed values cancel; filled in by ``prepare``.

    >>> one = torch.diag(torch.tensor([2.0, 1.0]))
    >>> method = KnotsDareTies(drop=0.0, scale=1.0, thresholds=(0.0, 0.0), majority=1)
    >>> torch.allclose(method(torch.stack([one, one])), one, atol=1e-6)
    True
    """

    about = About(
        "KnOTS-DARE-TIES",
        "Stoica et al., 2025, Model merging with SVD to tie the knots, arXiv 2410.19735",
        scope="model",
        random=True,
        matrices=True,
        exceptions={
            "one expert": "coordinates are dropped at random",
            "identical experts": "coordinates are dropped at random",
        },
    )

    drop: float = 0.1
    density: float = 1.0
    scale: float = 0.7
    seed: int = 0
    rank_tolerance: float = RANK_TOLERANCE
    thresholds: tuple[float, ...] | None = None
    majority: int | None = None

    def __post_init__(self) -> None:
        require_share(self, "drop", one=False)
        require_share(self, "density")
        require_number(self, "scale")
        require_share(self, "rank_tolerance", one=False)
        require_seed(self)

    @override
    def represented(self, batch: ModuleBatch) -> Iterator[tuple[Tensor, Tensor]]:
        for module, (basis, own) in zip(batch.names, in_common_basis(batch, self.rank_tolerance), strict=True):
            yield basis, all_dropped(own, self.drop, self.seed, module, batch.experts)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return _working_floats(modules, experts, shape)


def _working_floats(modules: int, experts: int, shape: tuple[int, int]) -> int:
    return (4 * experts + 8 + modules) * shape[0] * shape[1] + 6 * shape[0] ** 2


def in_common_basis(batch: ModuleBatch, tolerance: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The left singular basis of each module and the experts in it.

    Yields:
        The basis ``(d_out, k)`` and the representations ``(N, k, d_in)``, in the dtype of the updates.
    """
    # The basis is the eigenvectors of sum_i U_i U_i^T, found in float64.
    space = compressed(batch)
    floors = (tolerance * frobenius(space.cores).double()).square()
    for position, (cores, floor) in enumerate(zip(space.cores, floors, strict=True)):
        cores = cores.double()
        values, vectors = torch.linalg.eigh((cores @ cores.mT).sum(0))
        basis = vectors[:, values > floor]
        own = basis.mT @ cores
        if space.right is not None:
            own = own @ space.right[position].double().mT
        if space.left is not None:
            basis = space.left[position].double() @ basis
        yield basis.to(batch.updates.dtype), own.to(batch.updates.dtype)
