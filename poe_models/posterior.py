"""The posterior of a batch of modules: a product of experts that has met its updates.

Everything is batched over ``M`` modules of equal shape; draws may have any leading dimensions ``(*S)``:

>>> from poe_models.experts import ProductOfExperts
>>> updates = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)     # two experts, one row
>>> posterior = full_posterior(ProductOfExperts.of(["a", "b"]), updates)
>>> posterior.energy(torch.zeros(1, 1, 2, dtype=torch.float64))                     # 2 log 2: q / s^2 is 1 twice
tensor([1.3863], dtype=torch.float64)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from poe_models.energies import Energy
from poe_models.experts import Anchor, Expert, NamedCenter, ProductOfExperts
from poe_models.operators import Operator, mean_curvatures, sum_of_squares
from poe_models.scales import ExpertSizes, weighted_median


@dataclass(frozen=True, eq=False)
class BoundExpert:
    """One expert's energy with its operator, update and scale filled in.

    Attributes:
        name: name of the expert.
        update_name: name of the task vector it is about.
        operator: ``P_i``, batched over modules.
        update: ``U_i``, ``(M, d_out, d_in)``.
        rho: the energy of the scaled squared residual.
        scale_squared: ``s_i^2``, ``(M,)`` float64.
        norm_squared: ``|U_i|^2``, ``(M,)`` float64.
        residual_at_zero: ``q_i(0)``, the squared residual of merging nothing, ``(M,)`` float64.
        importance: ``a_i``.
        active: ``(M,)``; false where ``P_i`` vanishes (a zero update under a map made from it, or one that is zero to
            rounding beside the others): the expert drops out.
        low_rank: factors of the update, ``(M, d_out, r)`` and ``(M, r, d_in)``, where it is an adapter's.
    """

    name: str
    update_name: str
    operator: Operator
    update: Tensor
    rho: Energy
    scale_squared: Tensor
    norm_squared: Tensor
    residual_at_zero: Tensor
    importance: float
    active: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    def residual(self, z: Tensor) -> Tensor:
        """Squared residual ``q_i(Z)``, ``(*S, M, d_out, d_in)`` to ``(*S, M)`` in float64."""
        return self.operator.quadratic(z - self.update)

    def energy(self, z: Tensor) -> Tensor:
        """``a_i rho(q_i(Z) / s_i^2)`` in nats, ``(*S, M, d_out, d_in)`` to ``(*S, M)``."""
        return self.energy_of(self.residual(z))

    def module(self, one: slice) -> BoundExpert:
        """The expert of some modules of the batch."""
        return replace(
            self,
            operator=self.operator.module(one),
            update=self.update[one],
            rho=self.rho.module(one),
            scale_squared=self.scale_squared[one],
            norm_squared=self.norm_squared[one],
            residual_at_zero=self.residual_at_zero[one],
            active=self.active[one],
            low_rank=None if self.low_rank is None else (self.low_rank[0][one], self.low_rank[1][one]),
        )

    def energy_of(self, q: Tensor) -> Tensor:
        """Energy in nats of squared residuals ``q``, ``(*S, M)``."""
        return self._if_active(self.importance * self.rho.rho(q / self.scale_squared))

    def weight(self, q: Tensor) -> Tensor:
        """``a_i rho'(q / s_i^2) / s_i^2``: the weight of ``P_i`` in the reweighted normal equations."""
        return self._if_active(self.importance * self.rho.weight(q / self.scale_squared) / self.scale_squared)

    def curvature(self, q: Tensor) -> Tensor:
        """``a_i rho''(q / s_i^2) / s_i^4``: the coefficient of the rank-one term of the Hessian."""
        return self._if_active(self.importance * self.rho.curvature(q / self.scale_squared) / self.scale_squared**2)

    def _if_active(self, value: Tensor) -> Tensor:
        return torch.where(self.active, value, torch.zeros_like(value))


@dataclass(frozen=True, eq=False)
class BoundFactor:
    """A :class:`~poe_models.experts.FactorExpert` as a function of the posterior's own coordinates.

    Attributes:
        name: name of the expert.
        energy: maps ``(*S, M, *event)`` to nats: ``(*S, M)``, or ``(*S)`` when ``joint``.
        joint: whether it couples all modules.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    joint: bool


@dataclass(frozen=True, eq=False)
class Posterior:
    """``exp(-E(Z) / T)`` for a batch of ``M`` modules, in Full or Span coordinates.

    Attributes:
        experts: the bound experts.
        center: ``Z_0``, ``(M, *event)``, or None for zero.
        anchor_precision: ``eta``, ``(M,)`` float64.
        temperature: ``T``, a number. In a Pyro model of one's own also a scalar tensor that the model has drawn: such a
            posterior is for :func:`~poe_models.program.program` and :func:`~poe_models.program.log_density` only.
        event_shape: shape of one module's latent: ``(d_out, d_in)``, in Span coordinates ``(N + 1, 1)``.
        factors: bound factor experts.
        coordinates: whether the latent is the merged update itself, or coefficients on the updates.
    """

    experts: tuple[BoundExpert, ...]
    center: Tensor | None
    anchor_precision: Tensor
    temperature: float | Tensor
    event_shape: tuple[int, int]
    factors: tuple[BoundFactor, ...] = ()
    coordinates: Literal["full", "span"] = "full"

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Tensor):
            if self.temperature.ndim:
                shape = tuple(self.temperature.shape)
                raise ValueError(
                    f"`Posterior(temperature=...)`: a tensor of shape {shape}. All modules share one temperature: give "
                    "a number, or a scalar tensor."
                )
        elif not 0 < self.temperature < math.inf:
            raise ValueError(f"`Posterior(temperature={self.temperature})`: must be positive and finite.")

    @property
    def fixed_temperature(self) -> float:
        """``T`` as a number, which everything but the Pyro program needs.

        Raises:
            ValueError: it is a tensor.
        """
        if isinstance(self.temperature, Tensor):
            raise ValueError(
                f"`Posterior(temperature={self.temperature})`: a tensor is for a Pyro model that infers it "
                "with `program` or `log_density`. Samplers, Laplace and evidence take a number: give `float(...)`."
            )
        return self.temperature

    @property
    def num_modules(self) -> int:
        """Number of modules ``M``."""
        return self.anchor_precision.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the latents."""
        return self.like.dtype

    @property
    def like(self) -> Tensor:
        """A tensor of the latents' dtype and device, for making others."""
        if self.experts:
            return self.experts[0].update
        return self.anchor_precision if self.center is None else self.center

    def residuals(self, z: Tensor) -> Tensor:
        """Squared residuals of every expert, ``(*S, M, *event)`` to ``(*S, M, E)`` float64."""
        return torch.stack([expert.residual(z) for expert in self.experts], -1)

    def weights(self, q: Tensor) -> Tensor:
        """Half-quadratic weights ``w_i`` at residuals ``q``, ``(*S, M, E)`` to ``(*S, M, E)``."""
        return torch.stack([e.weight(q[..., i]) for i, e in enumerate(self.experts)], -1)

    def curvatures(self, q: Tensor) -> Tensor:
        """``a_i rho''_i / s_i^4`` at residuals ``q``, ``(*S, M, E)`` to ``(*S, M, E)``."""
        return torch.stack([e.curvature(q[..., i]) for i, e in enumerate(self.experts)], -1)

    def energy_of(self, q: Tensor) -> Tensor:
        """Summed energy of the experts in nats at residuals ``q``, ``(*S, M, E)`` to ``(*S, M)``."""
        return torch.stack([e.energy_of(q[..., i]) for i, e in enumerate(self.experts)], -1).sum(-1)

    def anchor_energy(self, z: Tensor) -> Tensor:
        """``eta |Z - Z_0|^2`` in nats, ``(*S, M, *event)`` to ``(*S, M)``."""
        return self.anchor_precision * sum_of_squares(z if self.center is None else z - self.center)

    def energy(self, z: Tensor) -> Tensor:
        """``E(Z)`` in nats per module, ``(*S, M, *event)`` to ``(*S, M)``; joint factors are not included."""
        total = self.anchor_energy(z)
        for expert in self.experts:
            total = total + expert.energy(z)
        for factor in self.factors:
            if not factor.joint:
                total = total + factor.energy(z)
        return total

    def joint_energy(self, z: Tensor) -> Tensor:
        """Energy in nats of all modules together, ``(*S, M, *event)`` to ``(*S)``."""
        total = self.energy(z).sum(-1)
        for factor in self.factors:
            if factor.joint:
                total = total + factor.energy(z)
        return total

    @property
    def joint(self) -> bool:
        """Whether a factor expert couples the modules."""
        return any(factor.joint for factor in self.factors)

    def group_energy(self, z: Tensor) -> Tensor:
        """Energy in nats of independent groups, ``(*S, M, *event)`` to ``(*S, G)``: the modules, or all if joint."""
        return self.joint_energy(z).unsqueeze(-1) if self.joint else self.energy(z)

    def module(self, index: int) -> Posterior:
        """The posterior of one module of the batch alone.

        Raises:
            ValueError: factor experts are functions of the whole batch.
        """
        if self.factors:
            raise ValueError(f"`Posterior.module(...)`: {self.factors[0].name!r} sees the whole batch of modules.")
        one = slice(index, index + 1)
        experts = tuple(expert.module(one) for expert in self.experts)
        center = None if self.center is None else self.center[one]
        return replace(self, experts=experts, center=center, anchor_precision=self.anchor_precision[one])

    @property
    def active(self) -> Tensor:
        """Which experts say anything, ``(M, E)``."""
        return torch.stack([expert.active for expert in self.experts], -1)


def full_posterior(poe: ProductOfExperts, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Posterior:
    """The posterior of the merged update ``Z`` itself.

    Args:
        poe: the design.
        updates: ``(M, N, d_out, d_in)`` or ``(N, d_out, d_in)``, in the order of ``poe.update_names``. Half
            precision is computed in float32.
        low_rank: the factors ``(..., N, d_out, r)`` and ``(..., N, r, d_in)`` of the updates, if every expert
            is an adapter: saves work, changes nothing.

    Returns:
        The posterior of ``M`` modules with latents ``(M, d_out, d_in)``.

    Raises:
        ValueError: shapes do not fit, values are not finite, or the design has factor experts.
    """
    if poe.factors:
        raise ValueError(
            f"`full_posterior(...)`: {poe.factors[0].name!r} is a FactorExpert, whose energy is known only as a "
            "function and is differentiated through a few coefficients. Use Span coordinates."
        )
    names = poe.update_names
    updates = check_updates(updates, names)
    d_out, d_in = updates.shape[2:]
    index = [names.index(expert.update_name) for expert in poe.experts]
    factors = None if low_rank is None else _check_factors(low_rank, updates)
    operators = [
        e.residual_map.operator(updates[:, i])
        if factors is None
        else e.residual_map.operator_of_factors(factors[0][:, i], factors[1][:, i])
        for e, i in zip(poe.experts, index, strict=True)
    ]
    experts, precision = bind(
        poe,
        operators=operators,
        updates=[updates[:, i] for i in index],
        norms=[sum_of_squares(updates[:, i]) for i in index],
        mean_curvatures=mean_curvatures(operators),
        dimensions=[operator.dimension for operator in operators],
    )
    if factors is not None:
        experts = tuple(
            replace(e, low_rank=(factors[0][:, i], factors[1][:, i])) for e, i in zip(experts, index, strict=True)
        )
    return Posterior(experts, center_of(poe.anchor, updates, factors), precision, poe.temperature, (d_out, d_in))


def bind(
    poe: ProductOfExperts,
    operators: Sequence[Operator],
    updates: Sequence[Tensor],
    norms: Sequence[Tensor],
    mean_curvatures: Sequence[Tensor],
    dimensions: Sequence[Callable[[], Tensor]],
) -> tuple[tuple[BoundExpert, ...], Tensor]:
    """Fill in scales and the anchor's precision; shared by Full and Span coordinates.

    Args:
        poe: the design.
        operators: ``P_i`` per expert.
        updates: ``U_i`` per expert in the same coordinates, ``(M, *event)``.
        norms: ``|U_i|^2`` per expert, ``(M,)``.
        mean_curvatures: ``tr(P_i) / d_i`` per expert, ``(M,)``.
        dimensions: rank of ``P_i`` per expert, ``(M,)``; called only where an energy depends on it.

    Returns:
        The bound experts and ``eta``, ``(M,)``.
    """
    sizes = ExpertSizes(
        norm_squared=torch.stack(list(norms), -1),
        residual_at_zero=torch.stack([p.quadratic(u) for p, u in zip(operators, updates, strict=True)], -1),
        mean_curvature=torch.stack(list(mean_curvatures), -1),
        importance=torch.tensor([e.importance for e in poe.experts], dtype=torch.float64, device=updates[0].device),
        active=_active(poe.experts, mean_curvatures, updates[0].dtype),
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
        )
        for i, expert in enumerate(poe.experts)
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
    for i, (expert, group) in enumerate(zip(experts, _same_map(experts), strict=True)):
        squared = expert.scale.squared(sizes.among(group, expert.residual_map.common_units))
        columns.append(squared[..., group.index(i)])
    return torch.stack(columns, -1)


def check_updates(updates: Tensor, names: Sequence[str]) -> Tensor:
    """Updates as ``(M, N, d_out, d_in)`` in a dtype to compute in.

    Raises:
        ValueError: the shape does not fit ``names``, or a value is not finite.
    """
    if updates.ndim == 3:
        updates = updates.unsqueeze(0)
    if updates.ndim != 4 or updates.shape[1] != len(names):
        raise ValueError(
            f"`updates` has shape {tuple(updates.shape)}, but the product is about {len(names)} task vectors "
            f"({', '.join(names)}). Give (N, d_out, d_in) or (M, N, d_out, d_in) with N = {len(names)}."
        )
    if not updates.is_floating_point():
        raise ValueError(f"`updates` are {updates.dtype}. Give floating-point updates, W_i - W_0.")
    if updates.dtype not in (torch.float32, torch.float64):
        updates = updates.float()
    finite = torch.isfinite(updates).flatten(2).all(-1)
    if not bool(finite.all()):
        module, expert = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"`updates` of {names[expert]!r} (module {module} of the batch) has NaN or infinite values. "
            "Leave the expert out, or look at the checkpoint it came from."
        )
    return updates


def center_of(anchor: Anchor, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor | None:
    """The anchor's centre as ``(M, d_out, d_in)``, or None for zero; a merging method makes use of adapters' factors.

    Raises:
        ValueError: the centre does not have the shape of the updates.
    """
    if anchor.center is None:
        return None
    if isinstance(anchor.center, Tensor):
        center = anchor.center
    elif isinstance(anchor.center, NamedCenter):
        center = anchor.center(updates, low_rank)
    else:
        center = anchor.center(updates)
    center = center.to(updates)
    if center.ndim == 2:
        center = center.unsqueeze(0)
    if not bool(center.isfinite().all()):
        raise ValueError("`Anchor(center=...)` has NaN or infinite values. Look at where it comes from.")
    expected = (updates.shape[0], *updates.shape[2:])
    if tuple(center.shape) != expected:
        raise ValueError(
            f"`Anchor(center=...)` has shape {tuple(center.shape)}, but the merged updates have {expected}. "
            "Give one centre per module of the batch, or a function of the updates."
        )
    return center


def _check_factors(low_rank: tuple[Tensor, Tensor], updates: Tensor) -> tuple[Tensor, Tensor]:
    left, right = (factor.unsqueeze(0) if factor.ndim == 3 else factor for factor in low_rank)
    modules, num_updates, d_out, d_in = updates.shape
    rank = left.shape[-1]
    if tuple(left.shape) != (modules, num_updates, d_out, rank) or right.shape != (modules, num_updates, rank, d_in):
        raise ValueError(
            f"`low_rank` has shapes {tuple(left.shape)} and {tuple(right.shape)}, which do not multiply to the "
            f"updates' {tuple(updates.shape)}. Give (M, N, d_out, r) and (M, N, r, d_in)."
        )
    return left.to(updates), right.to(updates)


def _active(experts: Sequence[Expert], mean_curvatures: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Which experts say anything, ``(M, E)``: those whose ``P_i`` is not zero, nor rounding beside its map's others.

    Norms are squares, so rounding of the updates is ``eps^2`` of the largest.
    """
    curvatures = torch.stack(list(mean_curvatures), -1)
    columns = []
    for i, group in enumerate(_same_map(experts)):
        largest = curvatures[..., group].amax(-1)
        columns.append(curvatures[..., i] > torch.finfo(dtype).eps ** 2 * largest)
    return torch.stack(columns, -1)


def _with_fallback(experts: Sequence[Expert], scales: Tensor, sizes: ExpertSizes) -> Tensor:
    """Replace zero scales ``(M, E)``: by the median of the same map's positive scales in the module, else by 1.

    The median is weighted by importance, so that an expert given twice is one of importance 2.
    """
    known = torch.where(scales > 0, sizes.importance.to(scales), 0.0)
    columns = []
    for i, group in enumerate(_same_map(experts)):
        median = weighted_median(scales[..., group], known[..., group])
        fallback = torch.where(sizes.active[..., i] & (median > 0), median, torch.ones_like(median))
        columns.append(torch.where(scales[..., i] > 0, scales[..., i], fallback))
    return torch.stack(columns, -1)


def _same_map(experts: Sequence[Expert]) -> list[list[int]]:
    """For every expert the experts with the same residual map, whose residuals have the same units."""
    return [[j for j, other in enumerate(experts) if other.residual_map == e.residual_map] for e in experts]
