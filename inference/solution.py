"""Result of a solver: the value, a status that says whether to trust it, and a record of the solve."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch import Tensor
from typing_extensions import override

from inference.retention import ExpertRetention, Retention, concerns, totals
from poe_models.printing import Brief


class Status(Enum):
    """End of a module's solve; its text says what to do about it."""

    CONVERGED = "converged"
    CONVERGED_LINE_SEARCH = (
        "converged by line search: the energy is not concave in q, so reweighting alone need not decrease it"
    )
    ROUNDING = (
        "stopped at the rounding of its dtype, with the gradient or the error of Z above the tolerance: compute in "
        "float64, or raise the anchor's precision or the tolerance"
    )
    SADDLE = (
        "stopped at a saddle, or at a point too flat to be told from one, where no start led lower: add starts (of "
        "`fixed_point`, 'twin' and 'experts' are the default; `minimize` takes one), or raise the scale or the "
        "anchor's precision"
    )
    NO_MINIMUM = (
        "not a minimum: the energy's own gradient, taken in float64, does not vanish there: lower the tolerance, "
        "compute in float64, or check that rho carries its gradient"
    )
    COMPUTED = "computed: a merging method has no solver"
    STOPPED = "stopped where held-out inputs are served best, before the minimum"
    MAX_STEPS = "not converged: raise max_steps, or the scale or the anchor's precision, which make the energy easier"

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached, at a minimum."""
        return self in (Status.CONVERGED, Status.CONVERGED_LINE_SEARCH, Status.COMPUTED, Status.STOPPED)

    @override
    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False, repr=False)
class FixedPointInfo(Brief):
    """Record of a reweighted MAP; tensors are float64, one entry per module ``(M, ...)``.

    Attributes:
        experts: Names of the experts, the order of the last dimension of ``weights``.
        energy: ``E`` at the solution in nats, ``(M,)``.
        energy_trace: ``E`` after every solve of the winning start, ``(M, steps)``; constant once converged.
        start: Name of the start that reached the lowest energy.
        start_energies: Final energy of every start, ``(M, S)``: different values are different local minima.
        weights: Effective weights ``w_i`` at the solution, ``(M, E)``.
        relative_weights: ``w_i / w_i(q = 0)``, ``(M, E)``: the weight relative to the Gaussian twin's.
        weight_spread: Largest over smallest relative weight of the active experts, ``(M,)``; 1 of a Gaussian merge.
        inactive: Experts that say nothing because their update is zero, ``(M, E)``.
        residuals: ``q_i / s_i^2`` at the solution, ``(M, E)``.
        retention: How much of every expert the solution kept.
        steps: Reweighted solves until convergence, ``(M,)``; steps that were taken back are not among them.
        rejected: Accelerated or full steps that were taken back, ``(M,)``.
        gradient_norm: ``|H Z - b| / |b|`` for the system of the displacement from the centre, ``(M,)``.
        anchor_share: ``eta |Z - Z_0| / |b|``, ``(M,)``: how much of what pulls at the solution the anchor holds.
        weight_change: Largest change of a log-weight in the last step, ``(M,)``.
        forward_error: Error of ``Z`` by rounding, relative to it, ``(M,)``: measured on a few rows, or the last
            correction of the refinement; nan where it was not asked for.
        strict_minimum: Whether the energy's Hessian there is positive definite by more than rounding, ``(M,)``.
        contraction_rate: Spectral radius of the log-weight map at the solution, ``(M,)``: the rate of plain steps.
            Where it cannot be above 0.5 it is not computed, and this is ``max_i 2 |rho''_i| q_i / rho'_i s_i^2``, which
            it is at most.
        contraction_bound: ``L`` of [PoE] Eq. 41 (appendix), tightened (each expert's term has its own size, at the
            solution) and for any map and energy, ``(M,)``: no smaller than the rate. Not computed where the rate is
            not, and the same number then: steps contract by it in the norm of ``H``.
        anchor_precision: ``eta``, ``(M,)``.
    """

    experts: tuple[str, ...]
    energy: Tensor
    energy_trace: Tensor
    start: tuple[str, ...]
    start_energies: Tensor
    weights: Tensor
    relative_weights: Tensor
    weight_spread: Tensor
    inactive: Tensor
    residuals: Tensor
    retention: Retention
    steps: Tensor
    rejected: Tensor
    gradient_norm: Tensor
    anchor_share: Tensor
    weight_change: Tensor
    forward_error: Tensor
    strict_minimum: Tensor
    contraction_rate: Tensor
    contraction_bound: Tensor
    anchor_precision: Tensor

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        found = {name: values[module] for name, values in self._numbers.items()}
        for name in ("weights", "relative_weights", "residuals", "inactive"):
            found[name] = dict(zip(self.experts, found[name], strict=True))
        silent = [name for name, says_nothing in found["inactive"].items() if says_nothing]
        found["relative_weights"] = {name: w for name, w in found["relative_weights"].items() if name not in silent}
        found["energy_trace"] = found["energy_trace"][: found["steps"]]
        found["forward_error"] = None if math.isnan(found["forward_error"]) else found["forward_error"]
        return found | {"start": self.start[module], "norm": self.retention.numbers["norm"][module], "inactive": silent}

    @cached_property
    def _numbers(self) -> dict[str, list[Any]]:
        """The tensors of all modules as lists: a record for each of many modules is then little work."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False, repr=False)
class MinimizeInfo(Brief):
    """Record of a generic MAP.

    Attributes:
        joint_energy: Energy of all modules together in nats.
        energy: Per module, ``(M,)``, without the factors that couple modules.
        gradient_norm: Norm of the energy's gradient over the summed norms of its terms' gradients, ``(M,)``.
        retention: How much of every expert the solution kept; factor experts have no update.
        steps: Evaluations of the energy.
    """

    joint_energy: Tensor
    energy: Tensor
    gradient_norm: Tensor
    retention: Retention
    steps: int

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        return {
            "steps": self.steps,
            "energy": float(self.energy[module]),
            "gradient_norm": float(self.gradient_norm[module]),
        }


@dataclass(frozen=True, eq=False, repr=False)
class FitInfo(Brief):
    """Record of a MAP by mini-batches.

    Attributes:
        steps: Steps that were taken.
        energy_trace: Estimated joint energy in nats at every step, ``(steps,)``.
        held_out_trace: Steps and the held-out energy per example in nats, ``(evaluations, 2)``; empty without.
        best_step: The step whose point is the solution.
        gradient_norm: Norm of the gradient of the whole joint energy there, in nats per unit of coefficient.
        retention: How much of every expert the solution kept.
    """

    steps: int
    energy_trace: Tensor
    held_out_trace: Tensor
    best_step: int
    gradient_norm: float
    retention: Retention

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        return {"steps": self.steps, "best_step": self.best_step, "norm": float(self.retention.norm[module])}


@dataclass(frozen=True, eq=False)
class MethodInfo:
    """Record of modules that a merging method has merged: how much of every expert it kept."""

    retention: Retention

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        return {"norm": float(self.retention.norm[module])}


InfoT = TypeVar("InfoT", FixedPointInfo, MinimizeInfo, FitInfo, MethodInfo)


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Brief, Generic[InfoT]):
    """A MAP with its status.

    Attributes:
        value: The latents in the posterior's coordinates, ``(M, *event)``: the merged updates ``(M, d_out, d_in)`` in
            Full ones.
        status: One per module.
        info: How it got there.
    """

    value: Tensor
    status: tuple[Status, ...]
    info: InfoT

    @property
    def converged(self) -> bool:
        """Whether every module converged."""
        return all(status.converged for status in self.status)

    @property
    def experts(self) -> tuple[ExpertRetention, ...]:
        """Retention of every expert by all modules together."""
        kept = self.info.retention
        return totals(kept.record(module) for module in range(len(self.status)))

    @property
    def concerns(self) -> list[str]:
        """Warnings about a merge that is little more than the base, or than one of its experts."""
        return concerns(self.experts)

    @override
    def __repr__(self) -> str:
        known = [expert for expert in self.experts if not math.isnan(expert.kept)]
        kept: str = ", ".join(f"{expert.name} {expert.kept_percent}" for expert in known)
        lines: list[str] = [super().__repr__(), *([f"  kept of the updates: {kept}"] if kept else [])]
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.concerns)])

    def record(self, module: int = 0) -> dict[str, Any]:
        """One module's convergence as plain numbers and strings, ready for JSON."""
        return {"status": self.status[module].name.lower(), **self.info.record(module)}
