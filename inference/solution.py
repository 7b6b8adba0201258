"""Result of a solver: the value, a status that says whether to trust it, and a record of the solve."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from torch import Tensor
from typing_extensions import override

from inference.retention import Retention


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
        "stopped at a saddle, or at a point too flat to be told from one, where no start led lower: add starts "
        "('twin' and 'experts' are the default), or raise the scale or the anchor's precision"
    )
    NO_MINIMUM = (
        "not a minimum: the energy's own gradient, taken in float64, does not vanish there: lower the tolerance, "
        "compute in float64, or check that rho carries its gradient"
    )
    COMPUTED = "computed: a merging method has no solver"
    MAX_STEPS = "not converged: raise max_steps, or the scale or the anchor's precision, which make the energy easier"

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached, at a minimum."""
        return self in (Status.CONVERGED, Status.CONVERGED_LINE_SEARCH, Status.COMPUTED)

    @override
    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class FixedPointInfo:
    """Record of a reweighted MAP; tensors are float64, one entry per module ``(M, ...)``.

    Attributes:
        experts: Names of the experts, the order of the last dimension of ``weights``.
        energy: ``E`` at the solution in nats, ``(M,)``.
        energy_trace: ``E`` after every solve of the winning start, ``(M, steps)``; constant once converged.
        start: Name of the start that reached the lowest energy.
        start_energies: Final energy of every start, ``(M, S)``: different values are different local minima.
        weights: Effective weights ``w_i`` at the solution, ``(M, E)``.
        relative_weights: ``w_i / w_i(q = 0)``, ``(M, E)``: the weight relative to the Gaussian twin's.
        weight_spread: Largest over smallest relative weight of the active experts, ``(M,)``; 1 means that the merge is
            a Gaussian's.
        inactive: Experts that say nothing because their update is zero, ``(M, E)``.
        residuals: ``q_i / s_i^2`` at the solution, ``(M, E)``.
        retention: How much of every expert the solution kept.
        steps: Reweighted solves until convergence, ``(M,)``; steps that were taken back are not among them.
        rejected: Accelerated or full steps that were taken back, ``(M,)``.
        gradient_norm: ``|H Z - b| / |b|`` for the system of the displacement from the centre, ``(M,)``.
        weight_change: Largest change of a log-weight in the last step, ``(M,)``.
        forward_error: Last correction of the iterative refinement relative to ``Z``, ``(M,)``: the error that rounding
            leaves; nan where nothing was refined.
        strict_minimum: Whether the energy's Hessian is positive definite at the solution, by more than rounding,
            ``(M,)``.
        contraction_rate: Spectral radius of the log-weight map at the solution, ``(M,)``: the rate of plain steps.
        contraction_bound: ``L`` of [PoE] Eq. 41 (appendix), tightened (each expert's term has its own size, at the
            solution) and for any map and energy, ``(M,)``: no smaller than the rate.
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
    weight_change: Tensor
    forward_error: Tensor
    strict_minimum: Tensor
    contraction_rate: Tensor
    contraction_bound: Tensor
    anchor_precision: Tensor

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        return {
            "steps": int(self.steps[module]),
            "rejected": int(self.rejected[module]),
            "start": self.start[module],
            "start_energies": self.start_energies[module].tolist(),
            "energy": float(self.energy[module]),
            "energy_trace": self.energy_trace[module, : int(self.steps[module])].tolist(),
            "gradient_norm": float(self.gradient_norm[module]),
            "weight_change": float(self.weight_change[module]),
            "forward_error": None if self.forward_error[module].isnan() else float(self.forward_error[module]),
            "strict_minimum": bool(self.strict_minimum[module]),
            "contraction_rate": float(self.contraction_rate[module]),
            "contraction_bound": float(self.contraction_bound[module]),
            "anchor_precision": float(self.anchor_precision[module]),
            "weights": dict(zip(self.experts, self.weights[module].tolist(), strict=True)),
            "relative_weights": self._active(self.relative_weights, module),
            "weight_spread": float(self.weight_spread[module]),
            "residuals": dict(zip(self.experts, self.residuals[module].tolist(), strict=True)),
            "norm": float(self.retention.norm[module]),
            "inactive": [n for n, silent in zip(self.experts, self.inactive[module].tolist(), strict=True) if silent],
        }

    def _active(self, values: Tensor, module: int) -> dict[str, float]:
        """One module's values of the experts that say anything."""
        rows = zip(self.experts, values[module].tolist(), self.inactive[module].tolist(), strict=True)
        return {name: value for name, value, silent in rows if not silent}


@dataclass(frozen=True, eq=False)
class MinimizeInfo:
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


@dataclass(frozen=True, eq=False)
class MethodInfo:
    """Record of modules that a merging method has merged.

    Attributes:
        retention: How much of every expert the merge kept.
    """

    retention: Retention

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        return {"norm": float(self.retention.norm[module])}


InfoT = TypeVar("InfoT", FixedPointInfo, MinimizeInfo, MethodInfo)


@dataclass(frozen=True, eq=False)
class Solution(Generic[InfoT]):
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

    def record(self, module: int = 0) -> dict[str, Any]:
        """One module's convergence as plain numbers and strings, ready for JSON.

        Args:
            module: Its position in the batch.
        """
        return {"status": self.status[module].name.lower(), **self.info.record(module)}
