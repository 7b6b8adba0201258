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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from poe_models.experts import FactorExpert, ProductOfExperts
from poe_models.operators import RANK_TOLERANCE, Gram, inner_products, mean_curvatures
from poe_models.posterior import BoundFactor, Posterior, bind, center_of, check_updates
from poe_models.span_labels import basis_names, center_label, merge_label


@dataclass(frozen=True, eq=False)
class SpanStatistics:
    """What Span coordinates need of the weights, for ``M`` modules of any shapes; all float64.

    Attributes:
        modules: module names.
        updates: names of the task vectors, in the order of the first ``N`` coordinates.
        residual_maps: ``repr`` of each expert's residual map: ``forms`` belong to these.
        center: what the anchor's centre was: "zero", the text of a rule, or "tensor" for values of its own.
        gram: ``G``, ``(M, K, K)`` with ``K = N + 1``, or ``N + 2`` through a merge.
        forms: ``K_i``, ``(M, E, K, K)``, one form per expert.
        mean_curvature: ``tr(P_i) / d_i``, ``(M, E)``.
        dimension: rank of ``P_i``, ``(M, E)``; nan if it was not asked for.
        through: text of the design whose merge is the last member of the basis, for each module; None without one.
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
        """The statistics of some modules.

        Args:
            kept: their positions.
        """
        places = list(kept)
        return replace(
            self,
            modules=tuple(self.modules[place] for place in places),
            gram=self.gram[places],
            forms=self.forms[places],
            mean_curvature=self.mean_curvature[places],
            dimension=self.dimension[places],
            through=None if self.through is None else tuple(self.through[place] for place in places),
        )


@dataclass(frozen=True, eq=False)
class SpanCoordinates:
    """The change of variables ``c = T x`` between coefficients and orthonormal coordinates.

    Attributes:
        transform: ``T``, ``(M, K, K)``, with zero columns where the span has fewer dimensions.
        inverse: ``x = S c``, ``(M, K, K)``.
    """

    transform: Tensor
    inverse: Tensor

    def coefficients(self, x: Tensor) -> Tensor:
        """``c`` of latents ``x``, ``(*S, M, K, 1)`` to ``(*S, M, K)``."""
        return (self.transform @ x).squeeze(-1)

    def latents(self, c: Tensor) -> Tensor:
        """``x`` of coefficients ``c``, ``(*S, M, K)`` to ``(*S, M, K, 1)``."""
        return self.inverse @ c.unsqueeze(-1)


def span_statistics(
    poe: ProductOfExperts,
    updates: Tensor,
    modules: Sequence[str] | None = None,
    *,
    through: Tensor | None = None,
    ranks: bool = True,
) -> SpanStatistics:
    """One pass over a batch of modules of equal shape.

    Args:
        poe: the design; only its residual maps and its centre matter here, unless the span is to go through its merge.
        updates: ``(M, N, d_out, d_in)`` or ``(N, d_out, d_in)``.
        modules: names of the modules; numbered if not given.
        through: the merged updates ``Z_*`` of this design, ``(M, d_out, d_in)`` or ``(d_out, d_in)``, as `fixed_point`
            solves for them: draws from these statistics then surround the merge. Without, they surround the minimum
            over the span of the updates and the centre alone, which is another point.
        ranks: find the rank of every ``P_i``, by singular values of the updates; without, only energies whose exponent
            does not depend on it can be used, and nothing that needs normalised experts.

    Returns:
        Statistics, to be joined over shapes with :func:`concatenate`.

    Raises:
        ValueError: the product has no expert with an update, or the updates do not fit it.
    """
    names = poe.update_names
    if not names:
        raise ValueError(
            "`span_statistics(...)`: the product has factor experts only, and nothing names the task vectors that span "
            "the coordinates. Add an `Expert` for each."
        )
    updates = check_updates(updates, names)
    poe = poe if modules is None else poe.for_modules(modules)
    basis = span_basis(poe, updates, through)
    position = {name: i for i, name in enumerate(names)}
    operators = [e.residual_map.operator(updates[:, position[e.update_name]]) for e in poe.experts]
    labels = tuple(modules) if modules is not None else tuple(str(i) for i in range(len(updates)))
    return SpanStatistics(
        modules=labels,
        updates=names,
        residual_maps=tuple(repr(expert.residual_map) for expert in poe.experts),
        center=center_label(poe.anchor.center),
        gram=inner_products([basis[:, j] for j in range(basis.shape[1])]),
        forms=torch.stack(
            [inner_products([operator.root(basis[:, j]) for j in range(basis.shape[1])]) for operator in operators], 1
        ),
        mean_curvature=(curvature := torch.stack(mean_curvatures(operators), 1)),
        dimension=torch.stack([operator.dimension() for operator in operators], 1)
        if ranks
        else torch.full_like(curvature, torch.nan),
        through=None if through is None else (merge_label(poe),) * len(updates),
    )


def concatenate(parts: Sequence[SpanStatistics]) -> SpanStatistics:
    """Statistics of several batches of modules as one.

    Raises:
        ValueError: the parts are about different task vectors, residual maps or centres, or only some go through a
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
    return SpanStatistics(
        modules=tuple(name for part in parts for name in part.modules),
        updates=first.updates,
        residual_maps=first.residual_maps,
        center=first.center,
        gram=torch.cat([part.gram for part in parts]),
        forms=torch.cat([part.forms for part in parts]),
        mean_curvature=torch.cat([part.mean_curvature for part in parts]),
        dimension=torch.cat([part.dimension for part in parts]),
        through=None if first.through is None else tuple(text for part in parts for text in part.through or ()),
    )


def span_coordinates(statistics: SpanStatistics) -> SpanCoordinates:
    """Orthonormal coordinates of each module's span, by a rank-revealing eigendecomposition of ``G``."""
    # Of unit vectors, so that a small update counts as a direction of its own as much as a large one.
    lengths = statistics.gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    eigenvalues, vectors = torch.linalg.eigh(statistics.gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    kept = eigenvalues > RANK_TOLERANCE * eigenvalues[:, -1:].clamp(min=0)
    root = torch.where(kept, eigenvalues, 0.0).sqrt()
    inverse_root = torch.where(kept, eigenvalues, torch.inf).rsqrt()
    return SpanCoordinates(
        vectors * inverse_root.unsqueeze(-2) / lengths.unsqueeze(-1),
        (vectors * root.unsqueeze(-2) * lengths.unsqueeze(-1)).mT,
    )


def span_posterior(
    poe: ProductOfExperts, statistics: SpanStatistics, bases: Sequence[Tensor] | None = None
) -> tuple[Posterior, SpanCoordinates]:
    """The posterior restricted to the span, from statistics alone.

    Args:
        poe: the design; its residual maps must be those of the statistics, and where these go through a merge, it must
            be the design of that merge. The temperature may be any.
        statistics: of all modules, whatever their shapes.
        bases: ``B`` of each module, ``(K, d_out, d_in)``; needed only by factor experts that see updates.

    Returns:
        The posterior over ``x``, ``(M, K, 1)``, and its coordinates.

    Raises:
        ValueError: the statistics are about another design, or a factor expert needs ``bases``.
    """
    maps = tuple(repr(expert.residual_map) for expert in poe.experts)
    if maps != statistics.residual_maps:
        raise ValueError(
            f"`span_posterior(...)`: the statistics were made under {statistics.residual_maps}, the design has {maps}. "
            "Make the statistics again with this design."
        )
    _require_same_center(poe, statistics)
    _require_same_merge(poe, statistics)
    coordinates = span_coordinates(statistics)
    size = statistics.gram.shape[-1]
    position = {name: i for i, name in enumerate(statistics.updates)}
    index = [position[expert.update_name] for expert in poe.experts]
    units = torch.eye(size, dtype=torch.float64, device=statistics.gram.device)
    num_modules = len(statistics.gram)
    experts, precision = bind(
        poe,
        operators=[Gram(_root(coordinates, statistics.forms[:, i]), "left", (size, 1)) for i in range(len(index))],
        updates=[coordinates.latents(units[j].expand(num_modules, size)) for j in index],
        norms=[statistics.gram[:, j, j] for j in index],
        mean_curvatures=list(statistics.mean_curvature.unbind(-1)),
        dimensions=[partial(_known_rank, statistics, i) for i in range(len(index))],
    )
    if bool((precision == 0).logical_and(torch.stack([e.active for e in experts]).any(0)).any()):
        raise ValueError(
            "`span_posterior(...)`: the anchor's precision is zero, and Span coordinates need one to hold directions "
            "that the updates do not have. Give a small one, or use Full coordinates."
        )
    center = coordinates.latents(units[len(statistics.updates)].expand(num_modules, size))
    factors = tuple(_bind_factor(factor, coordinates, statistics, bases) for factor in poe.factors)
    return Posterior(experts, center, precision, poe.temperature, (size, 1), factors, "span"), coordinates


def _require_same_center(poe: ProductOfExperts, statistics: SpanStatistics) -> None:
    unknown = sorted(set(poe.update_names) - set(statistics.updates))
    if unknown:
        raise ValueError(
            f"`span_posterior(...)`: the design is about {unknown[0]!r}, the statistics about "
            f"{', '.join(statistics.updates)}. Make the statistics again with this design."
        )
    center = poe.anchor.center
    label = center_label(center)
    nowhere = isinstance(center, Tensor) and not bool((center != 0).any())
    if label != statistics.center and not (nowhere and statistics.center == "zero"):
        raise ValueError(
            f"`span_posterior(...)`: the design's anchor has the centre {label}, the statistics were made with the "
            f"centre {statistics.center}. Make the statistics again with this design"
            + (", or give `Anchor(stored_center)` to take theirs." if statistics.center == "tensor" else ".")
        )


def _require_same_merge(poe: ProductOfExperts, statistics: SpanStatistics) -> None:
    label = merge_label(poe)
    for name, through in zip(statistics.modules, statistics.through or (), strict=False):
        if through != label:
            raise ValueError(
                f"`span_posterior(...)`: the statistics of {name!r} go through the merge of the design {through}, this "
                f"design is {label} and has another merge. Make the statistics again with this design; those of "
                "`span_statistics(poe, updates)` and of designs with coordinates='span' go through none and serve any."
            )


def _known_rank(statistics: SpanStatistics, expert: int) -> Tensor:
    """Rank of one expert's operator in every module, ``(M,)``."""
    ranks = statistics.dimension[..., expert]
    if bool(ranks.isnan().any()):
        raise ValueError(
            "`span_posterior(...)`: an energy depends on the rank of its expert's operator, and the statistics were "
            "made without. Make them with `ranks=True`."
        )
    return ranks


def span_basis(poe: ProductOfExperts, updates: Tensor, through: Tensor | None = None) -> Tensor:
    """``B = (U_1, ..., U_N, Z_0)``, and ``Z_*`` if it is given, ``(M, K, d_out, d_in)``; a zero centre is zeros.

    Raises:
        ValueError: ``through`` is not one merged update for each module.
    """
    center = center_of(poe.anchor, updates)
    parts = [updates, (torch.zeros_like(updates[:, 0]) if center is None else center).unsqueeze(1)]
    if through is not None:
        merged = through.to(updates).reshape(-1, *through.shape[-2:])
        if merged.shape != updates[:, 0].shape or not bool(merged.isfinite().all()):
            raise ValueError(
                f"`span_statistics(through={tuple(through.shape)})`: give one finite merged update for each module, "
                f"{tuple(updates[:, 0].shape)}, as `fixed_point(poe, updates).value`."
            )
        parts.append(merged.unsqueeze(1))
    return torch.cat(parts, 1)


def _root(coordinates: SpanCoordinates, form: Tensor) -> Tensor:
    """A factor ``F`` with ``F F^T = T^T K_i T``, ``(M, K, K)``; rounding below zero is clipped."""
    projected = coordinates.transform.mT @ form @ coordinates.transform
    eigenvalues, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    return vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)


def _bind_factor(
    factor: FactorExpert, coordinates: SpanCoordinates, statistics: SpanStatistics, bases: Sequence[Tensor] | None
) -> BoundFactor:
    joint = factor.scope == "model"

    def checked(energy: Tensor, shape: torch.Size) -> Tensor:
        if energy.shape != shape:
            raise ValueError(
                f"factor expert {factor.name!r} returned shape {tuple(energy.shape)}, but leading dimensions are "
                f"independent draws: expected {tuple(shape)}. Sum over the trailing dimensions only."
            )
        return energy

    if factor.coordinates == "span":

        def of_coefficients(x: Tensor) -> Tensor:
            return checked(factor.function(coordinates.coefficients(x)), x.shape[:-3] if joint else x.shape[:-2])

        return BoundFactor(factor.name, of_coefficients, joint)
    if bases is None:
        raise ValueError(
            f"`span_posterior(...)`: factor expert {factor.name!r} sees the merged updates, which statistics alone "
            "cannot give. Pass `bases`, or write it with coordinates='span'."
        )
    updates = _update_functions(coordinates, bases)

    def of_model(x: Tensor) -> Tensor:
        named = {name: update(x) for name, update in zip(statistics.modules, updates, strict=True)}
        return checked(factor.function(named), x.shape[:-3])

    def of_modules(x: Tensor) -> Tensor:
        return torch.stack([checked(factor.function(update(x)), x.shape[:-3]) for update in updates], -1)

    return BoundFactor(factor.name, of_model if joint else of_modules, joint)


def _update_functions(coordinates: SpanCoordinates, bases: Sequence[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """One function per module from latents ``(*S, M, K, 1)`` to its merged update ``(*S, d_out, d_in)``."""

    def update_of(module: int) -> Callable[[Tensor], Tensor]:
        basis = bases[module]
        return lambda x: torch.tensordot(coordinates.coefficients(x)[..., module, :].to(basis), basis, dims=1)

    return [update_of(module) for module in range(len(bases))]
