"""Binding a design to updates: operators, scales and the anchor's precision of a batch of modules.

:meth:`poe_models.experts.ProductOfExperts.bind` is the way in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from poe_models.experts import Expert, FactorExpert, ProductOfExperts
from poe_models.module_names import not_drawn
from poe_models.operators import Gram, Operator, mean_curvatures
from poe_models.posterior import BoundExpert, BoundFactor, Posterior
from poe_models.scales import ExpertSizes, weighted_median
from poe_models.span import SpanCoordinates, SpanStatistics, concatenate, span_basis, span_coordinates, statistics_of
from poe_models.span_labels import center_label, merge_label
from poe_models.sums import inner_each, sum_of_squares
from poe_models.updates import Batch, above_rounding, center_of, divided, over_units, same_map


def full_posterior(batch: Batch) -> Posterior:
    """The posterior in Full coordinates: of the merged updates ``(M, d_out, d_in)`` themselves.

    Raises:
        ValueError: If the design has factor experts.
    """
    poe, updates, factors, modules = batch
    if poe.factors:
        raise ValueError(
            f"`poe.bind(...)`: {poe.factors[0].name!r} is a FactorExpert, whose energy is known only as a function and "
            "is differentiated through a few coefficients. Use coordinates='span'."
        )
    index = [poe.update_names.index(expert.update_name) for expert in poe.experts]
    low_rank = [None if factors is None else (factors[0][:, i], factors[1][:, i]) for i in index]
    own = [updates[:, i] for i in index]
    operators = [
        e.residual_map.checked_operator(update, pair)
        for e, update, pair in zip(poe.experts, own, low_rank, strict=True)
    ]
    # What a Gram pulls with is needed for the solution as well; of adapters that is made of their factors.
    pulls = [
        p.apply(u) if isinstance(p, Gram) and pair is None else None
        for p, u, pair in zip(operators, own, low_rank, strict=True)
    ]
    experts, precision = bind_experts(
        poe,
        operators=operators,
        updates=own,
        norms=[_squared_norm(p, update) for p, update in zip(operators, own, strict=True)],
        mean_curvatures=above_rounding(poe.experts, mean_curvatures(operators), updates.dtype),
        dimensions=[operator.dimension for operator in operators],
        pulls=pulls,
    )
    experts = tuple(replace(e, low_rank=pair) for e, pair in zip(experts, low_rank, strict=True))
    center, shape = center_of(poe.anchor, updates, factors), (int(updates.shape[2]), int(updates.shape[3]))
    return Posterior(
        experts,
        center,
        precision,
        poe.temperature,
        shape,
        modules=modules,
        in_units=partial(_full_in_units, batch),
    )


def _full_in_units(batch: Batch, units: Tensor) -> Posterior:
    """The posterior of ``full_posterior`` of the same updates and centre over units, ``(M,)``."""
    return full_posterior(divided(batch, units))


def _squared_norm(operator: Operator, update: Tensor) -> Tensor:
    """``|U_i|^2``, which an operator that is made of the update itself has for its trace."""
    where = (update.data_ptr(), update.numel())
    if isinstance(operator, Gram) and (operator.factor.data_ptr(), operator.factor.numel()) == where:
        return operator.squared_size
    return sum_of_squares(update)


def span_posterior(
    poe: ProductOfExperts, batches: Sequence[Batch], merges: Sequence[Tensor] | Tensor | None
) -> Posterior:
    """The posterior restricted to the span of the updates, the centre and perhaps a merge, ``(M, d_out, d_in)`` each.

    Batches may be of modules of different shapes; the posterior can make merged updates of its latents.
    """
    ranks = any(expert.energy.needs_dimension for expert in poe.experts)
    if merges is not None and len(merges) != len(batches):
        raise ValueError(
            f"`poe.bind(through=...)`: {len(merges)} merged updates for {len(batches)} modules. Give one for each."
        )
    parts: list[SpanStatistics] = []
    bases: list[Tensor] = []
    for i, (bound, updates, _, modules) in enumerate(batches):
        basis = span_basis(bound, updates, None if merges is None else merges[i])
        parts.append(statistics_of(bound, updates, basis, modules, ranks, merges is not None))
        bases += basis.unbind(0)
    return replace(
        statistics_posterior(poe, concatenate(parts), tuple(bases)),
        in_units=None if poe.factors else partial(_span_in_units, poe, batches, merges),
    )


def _span_in_units(
    poe: ProductOfExperts, batches: Sequence[Batch], merges: Sequence[Tensor] | Tensor | None, units: Tensor
) -> Posterior:
    """The posterior of ``span_posterior`` of the same updates, centre and merges over units, ``(M,)``."""
    each = units.split([len(batch.updates) for batch in batches])
    through = None if merges is None else [over_units(*pair) for pair in zip(merges, each, strict=True)]
    return span_posterior(poe, [divided(*pair) for pair in zip(batches, each, strict=True)], through)


def model_posterior(poe: ProductOfExperts, statistics: SpanStatistics) -> Posterior:
    """The posterior from the statistics of a whole model, without the modules that no update changes.

    A warning names these. They stay where nothing is said about any, and where factor experts see all modules.

    Raises:
        ValueError: If the statistics are about another design, or a factor expert needs bases.
    """
    whole = statistics_posterior(poe, statistics)
    silent = whole.undetermined.tolist()
    if poe.factors or all(silent) or not any(silent):
        return whole
    warnings.warn(not_drawn([name for name, idle in zip(whole.modules, silent, strict=True) if idle]), stacklevel=3)
    return statistics_posterior(poe, statistics.select([place for place, idle in enumerate(silent) if not idle]))


def statistics_posterior(
    poe: ProductOfExperts, statistics: SpanStatistics, bases: tuple[Tensor, ...] | None = None
) -> Posterior:
    """The posterior over ``x``, ``(M, K, 1)``, from statistics of modules of any shapes.

    Its residual maps must be those of the statistics, and where these go through a merge, it must be the design of that
    merge; the temperature may be any. Without the bases ``B``, ``(K, d_out, d_in)`` each, no updates can be made.

    Raises:
        ValueError: If the statistics are about another design, or a factor expert needs bases.
    """
    _require_same_design(poe, statistics)
    coordinates = span_coordinates(statistics, bases)
    size, num_modules = int(statistics.gram.shape[-1]), len(statistics.gram)
    index = [statistics.updates.index(expert.update_name) for expert in poe.experts]
    units = torch.eye(size, dtype=torch.float64, device=statistics.gram.device)
    experts, precision = bind_experts(
        poe,
        operators=[Gram(form_root(coordinates, statistics.forms[:, i]), "left", (size, 1)) for i in range(len(index))],
        updates=[coordinates.latents(units[j].expand(num_modules, size)) for j in index],
        norms=[statistics.gram[:, j, j] for j in index],
        mean_curvatures=list(statistics.mean_curvature.unbind(-1)),
        dimensions=[partial(_known_rank, statistics, i) for i in range(len(index))],
    )
    if bool((precision == 0).logical_and(torch.stack([e.active for e in experts]).any(0)).any()):
        raise ValueError(
            "`poe.bind(...)`: the anchor's precision is zero, and Span coordinates need one to hold directions that "
            "the updates do not have. Give a small one, or use Full coordinates."
        )
    center = coordinates.latents(units[len(statistics.updates)].expand(num_modules, size))
    factors = tuple(bind_factor(factor, coordinates) for factor in poe.factors)
    return Posterior(experts, center, precision, poe.temperature, (size, 1), factors, coordinates, statistics.modules)


def bind_experts(
    poe: ProductOfExperts,
    operators: Sequence[Operator],
    updates: Sequence[Tensor],
    norms: Sequence[Tensor],
    mean_curvatures: Sequence[Tensor],
    dimensions: Sequence[Callable[[], Tensor]],
    pulls: Sequence[Tensor | None] | None = None,
) -> tuple[tuple[BoundExpert, ...], Tensor]:
    """Bound experts and the anchor's ``eta``, ``(M,)``, in Full or Span coordinates.

    Args:
        poe: The design; the others have an entry per expert.
        operators: ``P_i``.
        updates: ``U_i`` in the same coordinates, ``(M, *event)``.
        norms: ``|U_i|^2``, ``(M,)``.
        mean_curvatures: ``tr(P_i) / d_i``, ``(M,)``; zero where it is rounding, and the expert drops out.
        dimensions: Rank of ``P_i``, ``(M,)``; called only where an energy depends on it.
        pulls: ``P_i U_i`` where they are known.
    """
    pulls = [None] * len(operators) if pulls is None else pulls
    pulled = [None if pull is None else inner_each(pull, [u, pull]) for u, pull in zip(updates, pulls, strict=True)]
    sizes = ExpertSizes(
        norm_squared=torch.stack(list(norms), -1),
        residual_at_zero=torch.stack(
            [
                p.quadratic(u) if each is None else each[..., 0]
                for p, u, each in zip(operators, updates, pulled, strict=True)
            ],
            -1,
        ),
        mean_curvature=torch.stack(list(mean_curvatures), -1),
        importance=torch.tensor([e.importance for e in poe.experts], dtype=torch.float64, device=updates[0].device),
        active=torch.stack(list(mean_curvatures), -1) > 0,
    )
    scales = _with_fallback(poe.experts, _scales_by_rule(poe.experts, sizes), sizes)
    experts = tuple(
        BoundExpert(
            name=expert.name,
            update_name=expert.update_name,
            operator=operators[i],
            update=updates[i],
            rho=expert.energy.for_dimension(dimensions[i]()) if expert.energy.needs_dimension else expert.energy,
            scale_squared=scales[..., i],
            norm_squared=sizes.norm_squared[..., i],
            residual_at_zero=sizes.residual_at_zero[..., i],
            importance=expert.importance,
            active=sizes.active[..., i],
            pull=pulls[i],
            pull_squared=None if each is None else each[..., 1],
        )
        for i, (expert, each) in enumerate(zip(poe.experts, pulled, strict=True))
    )
    terms = [
        2 * e.importance * e.rho.weight_at_rest(t) * t / e.scale_squared
        for e, t in zip(experts, mean_curvatures, strict=True)
    ]
    curvature = torch.where(sizes.active, torch.stack(terms, -1), 0.0).sum(-1)
    return experts, poe.anchor.precision.value(curvature)


def _scales_by_rule(experts: Sequence[Expert], sizes: ExpertSizes) -> Tensor:
    """Every expert's rule, asked about the experts that share its map: ``(M, E)``, zero where a rule gives none."""
    columns = []
    for i, (expert, group) in enumerate(zip(experts, same_map(experts), strict=True)):
        squared = expert.scale.squared(sizes.among(group, expert.residual_map.common_units))
        columns.append(squared[..., group.index(i)])
    return torch.stack(columns, -1)


def _with_fallback(experts: Sequence[Expert], scales: Tensor, sizes: ExpertSizes) -> Tensor:
    """Replace zero scales ``(M, E)``: by the median of the same map's positive scales in the module, else by 1.

    The median is weighted by importance, so that an expert given twice is one of importance 2.
    """
    known = torch.where(scales > 0, sizes.importance.to(scales), 0.0)
    groups = same_map(experts)
    medians = torch.stack([weighted_median(scales[..., group], known[..., group]) for group in groups], -1)
    fallback = torch.where(sizes.active & (medians > 0), medians, 1.0)
    return torch.where(scales > 0, scales, fallback)


def _require_same_design(poe: ProductOfExperts, statistics: SpanStatistics) -> None:
    """Refuse statistics that belong to other task vectors, maps, centres or merges."""
    maps = tuple(repr(expert.residual_map) for expert in poe.experts)
    unknown = sorted(set(poe.update_names) - set(statistics.updates))
    if maps != statistics.residual_maps or unknown:
        ours, theirs = (poe.update_names, statistics.updates) if unknown else (maps, statistics.residual_maps)
        raise ValueError(
            f"`poe.bind(statistics)`: the design is about {', '.join(ours)}, the statistics about {', '.join(theirs)}. "
            "Make the statistics again with this design."
        )
    label, center = center_label(poe.anchor.center), poe.anchor.center
    nowhere = isinstance(center, Tensor) and not bool((center != 0).any())
    if label != statistics.center and not (nowhere and statistics.center == "zero"):
        raise ValueError(
            f"`poe.bind(statistics)`: the design's anchor has the centre {label}, the statistics were made with the "
            f"centre {statistics.center}. Make the statistics again with this design"
            + (", or give `Anchor(stored_center)` to take theirs." if statistics.center == "tensor" else ".")
        )
    merge = merge_label(poe)
    for name, through in zip(statistics.modules, statistics.through or (), strict=False):
        if through != merge:
            raise ValueError(
                f"`poe.bind(statistics)`: the statistics of {name!r} go through the merge of the design {through}, "
                f"this design is {merge} and has another merge. Make the statistics again with this design; those of "
                "`span_statistics(poe, updates)` and of designs with coordinates='span' go through none and serve any."
            )


def _known_rank(statistics: SpanStatistics, expert: int) -> Tensor:
    """Rank of one expert's operator in every module, ``(M,)``."""
    ranks = statistics.dimension[..., expert]
    if bool(ranks.isnan().any()):
        raise ValueError(
            "`poe.bind(statistics)`: an energy depends on the rank of its expert's operator, and the statistics were "
            "made without. Make them with `ranks=True`."
        )
    return ranks


def form_root(coordinates: SpanCoordinates, form: Tensor) -> Tensor:
    """A factor ``F`` with ``F F^T = T^T K_i T``, ``(M, K, K)``; rounding below zero is clipped.

    It is nan where the form is beyond float64, as of updates that only own units (``Posterior.in_units``) can hold.
    """
    projected = coordinates.transform.mT @ form @ coordinates.transform
    held = projected.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(held, (projected + projected.mT) / 2, 0.0))
    return torch.where(held, vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2), torch.nan)


def bind_factor(factor: FactorExpert, span: SpanCoordinates) -> BoundFactor:
    """A factor expert as a function of the latents ``(*S, M, K, 1)``."""
    joint, names = factor.scope != "module", span.statistics.modules
    if factor.coordinates == "update" and span.bases is None:
        raise ValueError(
            f"`poe.bind(statistics)`: factor expert {factor.name!r} sees the merged updates, which statistics alone "
            "cannot give. Bind the updates with coordinates='span', or write it with coordinates='span'."
        )

    def argument(x: Tensor) -> Tensor | dict[str, Tensor]:
        if factor.coordinates == "span":
            return span.coefficients(x)
        return dict(zip(names, (span.update(x, i) for i in range(len(names))), strict=True))

    def energy(x: Tensor) -> Tensor:
        whole = argument(x)
        if joint or isinstance(whole, Tensor):
            return _checked(factor, whole, shape=x.shape[:-3] if joint else x.shape[:-2])
        return torch.stack([_checked(factor, update, shape=x.shape[:-3]) for update in whole.values()], -1)

    def per_example(x: Tensor, rows: Tensor) -> Tensor:
        whole = argument(x)
        parts = rows.split(factor.batch_size or factor.examples)
        return torch.cat([_checked(factor, whole, part, shape=(*x.shape[:-3], len(part))) for part in parts], -1)

    def summed(x: Tensor) -> Tensor:
        return per_example(x, torch.arange(factor.examples, device=x.device)).sum(-1)

    if factor.scope == "examples":
        return BoundFactor(factor.name, summed, joint, per_example, factor)
    return BoundFactor(factor.name, energy, joint, expert=factor)


def _checked(factor: FactorExpert, *arguments: Tensor | dict[str, Tensor], shape: Sequence[int]) -> Tensor:
    energy = factor.function(*arguments)
    if not isinstance(energy, Tensor):
        raise ValueError(
            f"factor expert {factor.name!r} returned {type(energy).__name__}, expected a tensor of energies in nats, "
            f"{tuple(shape)}. Return it from its function, computed with torch."
        )
    if energy.shape != torch.Size(shape):
        raise ValueError(
            f"factor expert {factor.name!r} returned shape {tuple(energy.shape)}, but leading dimensions are "
            f"independent draws: expected {tuple(shape)}. Sum over the trailing dimensions only."
        )
    return energy
