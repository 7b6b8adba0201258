r"""Span coordinates: the merged update as a combination of the experts' updates and the anchor's centre.

With ``Z = sum_j c_j B_j``, ``B = (U_1, ..., U_N, Z_0)``, every squared residual is a quadratic form in ``N + 1``
numbers, ``q_i(c) = (c - e_i)^T K_i (c - e_i)`` with ``K_i[j, k] = <B_j, P_i B_k>``. One pass over the weights
gives ``K`` and the Gram matrix ``G[j, k] = <B_j, B_k>``; after it any energy, solver or sampler is small.

The span of the updates alone does not hold the merge in general: the MAP in Span coordinates is another point than the
one in Full coordinates, by up to nine tenths of its length for Gram maps. A span *through a merge* has the merged
update ``Z_*`` as one more member of the basis, ``B = (U_1, ..., U_N, Z_0, Z_*)``. It is the same posterior restricted
to a larger span, and because ``Z_*`` minimises the energy over all ``Z``, it minimises it there as well: the draws
surround it. Such statistics belong to one design, for another energy has another merge.

The latents are not ``c`` itself but coordinates ``x`` in an orthonormal basis of the span, ``c = T x``: identical
or zero experts make ``G`` singular, and an orthonormal basis keeps the anchor isotropic. Directions that the
span does not have are padded with zeros, so that all modules have ``K`` coordinates: ``N + 1``, or ``N + 2`` through a
merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poe_models.experts import ProductOfExperts
from poe_models.operators import RANK_TOLERANCE, mean_curvatures, vector_lengths
from poe_models.printing import Brief
from poe_models.records import joined, with_tensors
from poe_models.span_labels import basis_names, center_label, merge_label
from poe_models.sums import inner_products, largest_entry
from poe_models.updates import NamedUpdates, above_rounding, batch_of, center_of


@dataclass(frozen=True, eq=False, repr=False)
class SpanStatistics(Brief):
    """Inner products of updates, centre and operators for ``M`` modules of any shapes: all that Span coordinates need.

    Attributes:
        modules: Module names.
        updates: Names of the task vectors, in the order of the first ``N`` coordinates.
        residual_maps: ``repr`` of each expert's residual map: ``forms`` belong to these.
        center: What the anchor's centre was: "zero", the text of a rule, or "tensor" for values of its own.
        gram: ``G``, ``(M, K, K)`` with ``K = N + 1``, or ``N + 2`` through a merge.
        forms: ``K_i``, ``(M, E, K, K)``, one form per expert.
        mean_curvature: ``tr(P_i) / d_i``, ``(M, E)``.
        dimension: Rank of ``P_i``, ``(M, E)``; nan if it was not asked for.
        through: Text of the design whose merge is the last member of the basis, for each module; None without one.
    """

    modules: tuple[str, ...]
    updates: tuple[str, ...]
    residual_maps: tuple[str, ...]
    center: str
    gram: Tensor
    forms: Tensor
    mean_curvature: Tensor
    dimension: Tensor
    through: tuple[str, ...] | None = None

    @property
    def basis(self) -> tuple[str, ...]:
        """Names of the members of the basis, ``K`` of them: the updates, the centre, and the merge if there is one."""
        return basis_names(self.updates, self.through is not None)

    def select(self, kept: Sequence[int]) -> SpanStatistics:
        """The statistics of the modules at some positions."""
        places = list(kept)
        return replace(
            with_tensors(lambda value: value[places], self),
            modules=tuple(self.modules[place] for place in places),
            through=None if self.through is None else tuple(self.through[place] for place in places),
        )


@dataclass(frozen=True, eq=False, repr=False)
class SpanCoordinates(Brief):
    """The change of variables ``c = T x`` between coefficients and orthonormal coordinates.

    Attributes:
        transform: ``T``, ``(M, K, K)``, with zero columns where the span has fewer dimensions.
        inverse: ``x = S c``, ``(M, K, K)``.
        statistics: What the span is made of.
        bases: ``B`` of each module, ``(K, d_out, d_in)``; None where only statistics are at hand.
    """

    transform: Tensor
    inverse: Tensor
    statistics: SpanStatistics
    bases: tuple[Tensor, ...] | None = None

    @property
    def known(self) -> Tensor:
        """Mask of the coordinates that the span has, ``(M, K)``; the others are padding."""
        return (self.transform != 0).any(-2)

    def coefficients(self, x: Tensor) -> Tensor:
        """``c`` of latents ``x``, ``(*S, M, K, 1)`` to ``(*S, M, K)``."""
        return (self.transform @ x).squeeze(-1)

    def latents(self, c: Tensor) -> Tensor:
        """``x`` of coefficients ``c``, ``(*S, M, K)`` to ``(*S, M, K, 1)``."""
        return self.inverse @ c.unsqueeze(-1)

    def update(self, x: Tensor, module: int) -> Tensor:
        """Merged update of the module at a position from all latents, ``(*S, M, K, 1)`` to ``(*S, d_out, d_in)``.

        Raises:
            ValueError: If only statistics are at hand.
        """
        if self.bases is None:
            raise ValueError(
                "this posterior was bound from statistics, which have no weights to make merged updates of. Take its "
                "`coefficients`, or bind the updates themselves: `poe.bind(updates, coordinates='span')`."
            )
        basis = self.bases[module]
        return torch.tensordot(self.coefficients(x)[..., module, :].to(basis), basis, dims=1)

    def module(self, one: slice) -> SpanCoordinates:
        """The coordinates of some modules."""
        places = range(len(self.transform))[one]
        bases = None if self.bases is None else self.bases[one]
        return SpanCoordinates(self.transform[one], self.inverse[one], self.statistics.select(places), bases)


def span_statistics(
    poe: ProductOfExperts,
    updates: Tensor | NamedUpdates,
    modules: Sequence[str] | None = None,
    *,
    through: Tensor | None = None,
    ranks: bool = True,
) -> SpanStatistics:
    """Span statistics of a batch of modules of equal shape, in one pass over their updates.

    Args:
        poe: The design; only its residual maps and its centre matter here, unless the span is to go through its merge.
        updates: ``(M, N, d_out, d_in)`` or ``(N, d_out, d_in)``, or one module with names.
        modules: Names of the modules of a tensor; numbered if not given.
        through: The merged updates ``Z_*`` of this design, ``(M, d_out, d_in)``, as ``fixed_point``
            solves for them, for draws to surround.
        ranks: Find the rank of every ``P_i``, by singular values of the updates; without, only energies whose exponent
            does not depend on it can be used, and nothing that needs normalised experts.

    Returns:
        Statistics, to be joined over shapes with :func:`concatenate`.

    Raises:
        ValueError: If the product has no expert with an update, or the updates do not fit it.
    """
    if not poe.update_names:
        raise ValueError(
            "`span_statistics(...)`: the product has factor experts only, and nothing names the task vectors that span "
            "the coordinates. Add an `Expert` for each."
        )
    poe, updates, _, labels = batch_of(poe, updates)
    if modules is not None:
        poe, labels = poe.for_modules(modules), tuple(modules)
    return statistics_of(poe, updates, span_basis(poe, updates, through), labels, ranks, through is not None)


def statistics_of(
    poe: ProductOfExperts, updates: Tensor, basis: Tensor, modules: tuple[str, ...], ranks: bool, through: bool
) -> SpanStatistics:
    """Statistics of updates ``(M, N, d_out, d_in)`` and their basis ``(M, K, d_out, d_in)``.

    ``through`` says that the last member of the basis is the design's merge. Updates whose fourth power leaves the
    range of their dtype are seen in float64, as their statistics are.
    """
    dtype, sizes = updates.dtype, largest_entry(updates)
    low, high = torch.finfo(dtype).tiny ** 0.25, torch.finfo(dtype).max ** 0.25
    if bool(((sizes > 0) & ((sizes < low) | (sizes > high))).any()):
        updates, basis = updates.double(), basis.double()
    operators = [
        e.residual_map.checked_operator(updates[:, poe.update_names.index(e.update_name)]) for e in poe.experts
    ]
    members = basis.unbind(1)
    curvature = torch.stack(above_rounding(poe.experts, mean_curvatures(operators), dtype), 1)
    return SpanStatistics(
        modules=modules,
        updates=poe.update_names,
        residual_maps=tuple(repr(expert.residual_map) for expert in poe.experts),
        center=center_label(poe.anchor.center),
        gram=inner_products(members),
        forms=torch.stack([inner_products([each.root(member) for member in members]) for each in operators], 1),
        mean_curvature=curvature,
        dimension=torch.stack([operator.dimension() for operator in operators], 1)
        if ranks
        else torch.full_like(curvature, torch.nan),
        through=(merge_label(poe),) * len(updates) if through else None,
    )


def concatenate(parts: Sequence[SpanStatistics]) -> SpanStatistics:
    """Statistics of several batches of modules as one.

    Raises:
        ValueError: If the parts are about different task vectors, residual maps or centres, or only some go through a
            merge.
    """
    first = parts[0]
    for part in parts[1:]:
        kinds = [(each.basis, each.residual_maps, each.center) for each in (part, first)]
        if kinds[0] != kinds[1]:
            shown = [f"{basis} under {maps} with the centre {center}" for basis, maps, center in kinds]
            raise ValueError(
                f"`concatenate(...)`: one part is about {shown[0]}, another about {shown[1]}. Make all parts with one "
                "design."
            )
    return replace(
        joined(*parts),
        modules=tuple(name for part in parts for name in part.modules),
        through=None if first.through is None else tuple(text for part in parts for text in part.through or ()),
    )


def span_coordinates(statistics: SpanStatistics, bases: tuple[Tensor, ...] | None = None) -> SpanCoordinates:
    """Orthonormal coordinates of each module's span, by a rank-revealing eigendecomposition of ``G``."""
    # Of unit vectors, so that a small update counts as a direction of its own as much as a large one.
    lengths = vector_lengths(statistics.gram)
    eigenvalues, vectors = torch.linalg.eigh(statistics.gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    kept = eigenvalues > RANK_TOLERANCE * eigenvalues[:, -1:].clamp(min=0)
    root = torch.where(kept, eigenvalues, 0.0).sqrt()
    inverse_root = torch.where(kept, eigenvalues, torch.inf).rsqrt()
    norms = statistics.gram.diagonal(dim1=-2, dim2=-1).sqrt()  # latents of a zero member are zero
    return SpanCoordinates(
        vectors * inverse_root.unsqueeze(-2) / lengths.unsqueeze(-1),
        (vectors * root.unsqueeze(-2) * norms.unsqueeze(-1)).mT,
        statistics,
        bases,
    )


def span_basis(poe: ProductOfExperts, updates: Tensor, through: Tensor | None = None) -> Tensor:
    """``B = (U_1, ..., U_N, Z_0)``, and ``Z_*`` if it is given, ``(M, K, d_out, d_in)``; a zero centre is zeros.

    Raises:
        ValueError: If ``through`` is not one merged update for each module.
    """
    center = center_of(poe.anchor, updates)
    parts = [updates, (torch.zeros_like(updates[:, 0]) if center is None else center).unsqueeze(1)]
    if through is not None:
        merged = through.to(updates).reshape(-1, *through.shape[-2:])
        if merged.shape != updates[:, 0].shape or not bool(merged.isfinite().all()):
            raise ValueError(
                f"`span_statistics(through={tuple(through.shape)})`: give one finite merged update for each module, "
                f"{tuple(updates[:, 0].shape)}, as `fixed_point(poe.bind(updates)).value`."
            )
        parts.append(merged.unsqueeze(1))
    return torch.cat(parts, 1)
