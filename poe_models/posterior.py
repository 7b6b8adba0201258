"""The posterior of a batch of modules: a product of experts bound to their updates.

:meth:`~poe_models.experts.ProductOfExperts.bind` makes one, and every solver and sampler takes one. Everything is
batched over ``M`` modules; draws may have any leading dimensions ``(*S)``:

>>> from poe_models.experts import ProductOfExperts
>>> updates = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)     # two experts, one row
>>> posterior = ProductOfExperts.of(["a", "b"]).bind(updates)
>>> posterior.energy(torch.zeros(1, 1, 2, dtype=torch.float64))                     # 2 log 2: q / s^2 is 1 twice
tensor([1.3863], dtype=torch.float64)
>>> posterior
Posterior(1 module: 0; full, latents (1, 2), torch.float64; experts a, b; T = 1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.energies import Energy
from poe_models.limits import require_positive
from poe_models.module_names import module_label
from poe_models.operators import Operator
from poe_models.printing import Brief
from poe_models.records import with_tensors
from poe_models.sums import sum_of_squares

if TYPE_CHECKING:
    from poe_models.experts import FactorExpert
    from poe_models.span import SpanCoordinates


@dataclass(frozen=True, eq=False, repr=False)
class BoundExpert(Brief):
    """One expert's energy with its operator, update and scale filled in.

    Attributes:
        name: Name of the expert.
        update_name: Name of the task vector it is about.
        operator: ``P_i``, batched over modules.
        update: ``U_i``, ``(M, d_out, d_in)``.
        rho: The energy of the scaled squared residual.
        scale_squared: ``s_i^2``, ``(M,)`` float64.
        norm_squared: ``|U_i|^2``, ``(M,)`` float64.
        residual_at_zero: ``q_i(0)``, the squared residual of merging nothing, ``(M,)`` float64.
        importance: ``a_i``.
        active: ``(M,)``; false where ``P_i`` vanishes (a zero update under a map made from it, or one that is zero to
            rounding beside the others): the expert drops out.
        low_rank: Factors of the update, ``(M, d_out, r)`` and ``(M, r, d_in)``, where it is an adapter's.
        pull: ``P_i U_i``, ``(M, d_out, d_in)``, where it was made for ``residual_at_zero`` and may be used again.
        pull_squared: ``|P_i U_i|^2``, ``(M,)`` float64, where that is known.
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
    pull: Tensor | None = None
    pull_squared: Tensor | None = None

    def residual(self, z: Tensor) -> Tensor:
        """Squared residual ``q_i(Z)``, ``(*S, M, d_out, d_in)`` to ``(*S, M)`` in float64."""
        return self.operator.quadratic(z - self.update)

    def energy(self, z: Tensor) -> Tensor:
        """``a_i rho(q_i(Z) / s_i^2)`` in nats, ``(*S, M, d_out, d_in)`` to ``(*S, M)``."""
        return self.energy_of(self.residual(z))

    def module(self, one: slice) -> BoundExpert:
        """The expert of some modules of the batch."""
        low_rank = None if self.low_rank is None else (self.low_rank[0][one], self.low_rank[1][one])
        some = with_tensors(lambda value: value[one], self)
        return replace(some, operator=self.operator.module(one), rho=self.rho.module(one), low_rank=low_rank)

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


@dataclass(frozen=True, eq=False, repr=False)
class BoundFactor(Brief):
    """A :class:`~poe_models.experts.FactorExpert` as a function of the posterior's own coordinates.

    Attributes:
        name: Name of the expert.
        energy: Maps ``(*S, M, *event)`` to nats: ``(*S, M)``, or ``(*S)`` when ``joint``.
        joint: Whether it couples all modules.
        per_example: Of a sum over examples: maps ``(*S, M, *event)`` and rows ``(b,)`` to nats ``(*S, b)``.
        expert: What was bound.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    joint: bool
    per_example: Callable[[Tensor, Tensor], Tensor] | None = None
    expert: FactorExpert | None = None


@dataclass(frozen=True, eq=False)
class Posterior:
    """``exp(-E(Z) / T)`` for a batch of ``M`` modules, in Full or Span coordinates.

    Attributes:
        experts: The bound experts.
        center: ``Z_0``, ``(M, *event)``, or None for zero.
        anchor_precision: ``eta``, ``(M,)`` float64.
        temperature: ``T``, a number. In a Pyro model of one's own also a scalar tensor that the model has drawn: such a
            posterior is for :func:`~poe_models.program.program` and :func:`~poe_models.program.log_density` only.
        event_shape: Shape of one module's latent: ``(d_out, d_in)``, in Span coordinates ``(N + 1, 1)``.
        factors: Bound factor experts.
        span: The change of variables to coefficients on the updates; None in Full coordinates.
        modules: Names of the modules.
        in_units: Binds the same design to the same updates over units ``c``, ``(M,)``, before anything is computed of
            them: the posterior of ``Z / c``. None where updates are not at hand, or factor experts see them.
    """

    experts: tuple[BoundExpert, ...]
    center: Tensor | None
    anchor_precision: Tensor
    temperature: float | Tensor
    event_shape: tuple[int, int]
    factors: tuple[BoundFactor, ...] = ()
    span: SpanCoordinates | None = None
    modules: tuple[str, ...] = ()
    in_units: Callable[[Tensor], Posterior] | None = None

    def __post_init__(self) -> None:
        if self.modules and len(self.modules) != self.num_modules:
            raise ValueError(
                f"`Posterior(modules=...)`: {len(self.modules)} names for {self.num_modules} modules. Give one for "
                "each."
            )
        if isinstance(self.temperature, Tensor) and self.temperature.ndim:
            raise ValueError(
                f"`Posterior(temperature=...)`: a tensor of shape {tuple(self.temperature.shape)}. All modules share "
                "one temperature: give a number, or a scalar tensor."
            )
        if not isinstance(self.temperature, Tensor):
            require_positive("Posterior(", temperature=self.temperature)

    @property
    def fixed_temperature(self) -> float:
        """``T`` as a number, which everything but the Pyro program needs.

        Raises:
            ValueError: If it is a tensor.
        """
        if isinstance(self.temperature, Tensor):
            raise ValueError(
                f"`Posterior(temperature={self.temperature})`: a tensor is for a Pyro model that infers it "
                "with `program` or `log_density`. Samplers, Laplace and evidence take a number: give `float(...)`."
            )
        return self.temperature

    @override
    def __repr__(self) -> str:
        """Modules, coordinates, experts and temperature; no values."""
        count = f"{self.num_modules} module{'s' if self.num_modules != 1 else ''}"
        named = ", ".join(self.modules[:3]) + (", ..." if len(self.modules) > 3 else "")
        experts = ", ".join([each.name for each in self.experts] + [each.name for each in self.factors])
        return (
            f"Posterior({count}: {named}; {self.coordinates}, latents {self.event_shape}, {self.dtype}; "
            f"experts {experts}; T = {float(self.temperature):g})"
        )

    @property
    def coordinates(self) -> Literal["full", "span"]:
        """Whether the latent is the merged update itself, or coordinates in the span of the updates."""
        return "full" if self.span is None else "span"

    def label(self, module: int) -> str:
        """A module's name for messages, or its position where it has none."""
        return module_label(self.modules, module)

    def update(self, z: Tensor) -> Tensor:
        """Merged updates of latents, ``(*S, M, *event)`` to ``(*S, M, d_out, d_in)``, for modules of equal shape.

        Raises:
            ValueError: If the posterior was bound from statistics alone.
        """
        if self.span is None:
            return z
        return torch.stack([self.span.update(z, module) for module in range(self.num_modules)], -3)

    def coefficients(self, z: Tensor) -> Tensor:
        """Coefficients on the members of the span, ``(*S, M, K, 1)`` to ``(*S, M, K)``.

        Raises:
            ValueError: If the posterior is in Full coordinates.
        """
        if self.span is None:
            raise ValueError(
                "`Posterior.coefficients(...)`: Full coordinates have none. Bind in the span: "
                "`poe.bind(updates, coordinates='span')`."
            )
        return self.span.coefficients(z)

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
        own = (factor for factor in self.factors if not factor.joint)
        terms: tuple[BoundExpert | BoundFactor, ...] = (*self.experts, *own)
        return sum((term.energy(z) for term in terms), self.anchor_energy(z))

    def joint_energy(self, z: Tensor) -> Tensor:
        """Energy in nats of all modules together, ``(*S, M, *event)`` to ``(*S)``."""
        return sum((factor.energy(z) for factor in self.factors if factor.joint), self.energy(z).sum(-1))

    @property
    def joint(self) -> bool:
        """Whether a factor expert couples the modules."""
        return any(factor.joint for factor in self.factors)

    def component_energy(self, z: Tensor) -> Tensor:
        """Energy in nats of independent components, ``(*S, M, *event)`` to ``(*S, G)``: modules, or all if joint."""
        return self.joint_energy(z).unsqueeze(-1) if self.joint else self.energy(z)

    def module(self, index: int) -> Posterior:
        """The posterior of one module of the batch alone; a ``ValueError`` as :meth:`part`."""
        return self.part(slice(index, index + 1))

    def part(self, some: slice) -> Posterior:
        """The posterior of some modules of the batch.

        Raises:
            ValueError: If factor experts are functions of the whole batch.
        """
        if self.factors:
            raise ValueError(f"`Posterior.module(...)`: {self.factors[0].name!r} sees the whole batch of modules.")
        return replace(
            with_tensors(lambda value: value[some], replace(self, modules=())),
            experts=tuple(expert.module(some) for expert in self.experts),
            span=None if self.span is None else self.span.module(some),
            modules=self.modules[some],
            in_units=None if self.in_units is None else partial(_part_in_units, self, some),
        )

    @property
    def active(self) -> Tensor:
        """Mask of the experts whose operator is not zero, ``(M, E)``."""
        return torch.stack([expert.active for expert in self.experts], -1)

    @property
    def undetermined(self) -> Tensor:
        """Mask of the modules without any active expert or anchor precision, ``(M,)``: any update is as good there."""
        return (self.anchor_precision == 0) & ~self.active.any(-1)


def _part_in_units(whole: Posterior, some: slice, units: Tensor) -> Posterior:
    """Some modules of a posterior in units of theirs, ``(m,)``: the batch is bound again, for maps know its modules."""
    assert whole.in_units is not None
    every = torch.ones_like(whole.anchor_precision)
    every[some] = units
    return whole.in_units(every).part(some)
