"""Convergence of the fixed point, its rate, and the effective weights of the experts, module by module.

Works on the records that a merge leaves in ``poe_merge.json`` and on solutions in memory alike:

>>> import torch
>>> from inference import fixed_point
>>> from poe_models import ProductOfExperts
>>> updates = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
>>> solution = fixed_point(ProductOfExperts.of(["a", "b"]).bind(updates))
>>> found = fixed_point_convergence(solution_records(solution, ["fc.weight"]))
>>> found.modules, found.status[0].name, bool(found.rate[0] < 1)
(('fc.weight',), 'CONVERGED', True)
>>> [verdict.level.name for verdict in found.verdicts]
['GOOD', 'GOOD', 'NOTE']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.verdicts import Level, Verdict
from inference.models.record_shapes import SolvedModule, require_shape
from inference.solution import FixedPointInfo, Solution, Status
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


SHOWN = 3
GAUSSIAN_SPREAD = 1.05
"""Spread of the relative weights up to which they are a Gaussian's."""


@dataclass(frozen=True, eq=False, repr=False)
class FixedPointConvergence(Brief):
    """Status, rate and expert weights of the solver in each of ``M`` modules; arrays are float64 unless said otherwise.

    Attributes:
        modules: Names, in the order of the merge.
        experts: Names of all experts, in order of appearance.
        status: Status of each solve.
        traces: Energy in nats after every solve of the winning start; one array for each module.
        start_energies: Final energies in nats of every start, one array for each module.
        steps: Reweighted solves, ``(M,)`` int64.
        rate: Spectral radius of the log-weight map at the solution, ``(M,)``: the rate of plain steps.
        bound: [PoE] Eq. 41's ``L``, ``(M,)``.
        gradient_norm: Relative norm of the gradient at the solution, ``(M,)``.
        weight_spread: Largest over smallest relative weight of the active experts, ``(M,)``.
        relative_weights: ``w_i / w_i(q = 0)``, ``(M, E)``; nan where an expert is inactive or not of this module.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    status: tuple[Status, ...]
    traces: tuple[np.ndarray, ...]
    start_energies: tuple[np.ndarray, ...]
    steps: np.ndarray
    rate: np.ndarray
    bound: np.ndarray
    gradient_norm: np.ndarray
    weight_spread: np.ndarray
    relative_weights: np.ndarray

    @property
    def verdicts(self) -> tuple[Verdict, Verdict, Verdict]:
        """Verdicts on convergence, on contraction, and on the experts' weights."""
        return self._convergence(), self._contraction(), self._tails()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per module: status, steps, rate, bound, gradient norm, weight spread, and each expert's weight."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("steps", "rate", "bound", "gradient_norm", "weight_spread")}
        weights = {f"weight_{name}": column for name, column in zip(self.experts, self.relative_weights.T, strict=True)}
        status = [each.name.lower() for each in self.status]
        return pd.DataFrame({"module": self.modules, "status": status, **columns, **weights})

    def _convergence(self) -> Verdict:
        counts = Counter(self.status)
        total = len(self.modules)
        converged = sum(n for status, n in counts.items() if status.converged)
        low, high = int(self.steps.min()), int(self.steps.max())
        steps = f"in {low} to {high} steps (median {np.median(self.steps):g})" if low < high else f"in {high} steps"
        failed = [name for name, status in zip(self.modules, self.status, strict=True) if not status.converged]
        if failed:
            worst = next(status for status in (Status.MAX_STEPS, Status.SADDLE, Status.ROUNDING) if counts[status])
            level = Level.BAD if worst is Status.MAX_STEPS else Level.CAUTION
            text = f"{converged} of {total} modules converged; {_listed(failed)}: {worst}."
            return Verdict("fixed point", level, text)
        return Verdict("fixed point", Level.GOOD, f"all {total} modules converged {steps}, to strict minima.")

    def _contraction(self) -> Verdict:
        rates, bounds = self.rate, self.bound
        within = int((bounds < 1).sum())
        unknown = int((~np.isfinite(rates)).sum())
        if unknown:
            text = f"the rate is not known in {unknown} of {len(rates)} modules: solve them in float64."
            return Verdict("contraction", Level.UNKNOWN, text)
        text = (
            f"plain steps contract at rates up to {rates.max():.3g}; the paper's bound L is below 1 in {within} of "
            f"{len(bounds)} modules (largest {np.nanmax(bounds):.3g})."
        )
        if bool((rates >= 1).any()):
            return Verdict(
                "contraction", Level.CAUTION, f"{text} Where the rate is 1 or more, plain steps need not converge."
            )
        return Verdict("contraction", Level.GOOD, text)

    def _tails(self) -> Verdict:
        spread = self.weight_spread[np.isfinite(self.weight_spread)]
        if not spread.size:
            return Verdict("tails at work", Level.UNKNOWN, "no module has finite expert weights: solve in float64.")
        text = (
            f"largest over smallest relative expert weight: median {np.median(spread):.3g}, most {spread.max():.3g}; "
        )
        if spread.max() <= GAUSSIAN_SPREAD:
            return Verdict("tails at work", Level.NOTE, f"{text}the experts are weighed as by a Gaussian.")
        differing = int((spread > GAUSSIAN_SPREAD).sum())
        return Verdict(
            "tails at work",
            Level.NOTE,
            f"{text}the experts are weighed otherwise than by a Gaussian in {differing} of {len(spread)} modules.",
        )


def fixed_point_convergence(records: Iterable[Mapping[str, Any]]) -> FixedPointConvergence:
    """Collect the records of the modules of a merge.

    Args:
        records: One for each module: its name as ``module``, and the entries of ``Solution.record``.

    Raises:
        ValueError: If there are none, or one lacks an entry.
    """
    found = list(records)
    if not found:
        raise ValueError(
            "`fixed_point_convergence([])`: no modules. A merge that only averages has nothing to converge: leave "
            "it out."
        )
    try:
        for number, record in enumerate(found):
            require_shape(SolvedModule, record, "`fixed_point_convergence(...)`: a record is incomplete", f"{number}.")
    except ValueError as error:
        raise ValueError(
            f"{error} Give records of `solution_records`, or a `poe_merge.json` of this version."
        ) from error
    return _collected(found)


def solution_records(solution: Solution[FixedPointInfo], modules: Sequence[str]) -> list[dict[str, Any]]:
    """Records of a solution in memory, one for each named module of its batch, as in ``poe_merge.json``.

    Raises:
        ValueError: If there are more or fewer names than modules.
    """
    if len(modules) != len(solution.status):
        raise ValueError(
            f"`solution_records(...)`: {len(modules)} names for {len(solution.status)} modules. Give one for each."
        )
    return [{"module": name} | solution.record(index) for index, name in enumerate(modules)]


def _collected(found: Sequence[Mapping[str, Any]]) -> FixedPointConvergence:
    experts = tuple(dict.fromkeys(name for record in found for name in record["weights"]))
    relative = [[record["relative_weights"].get(name, np.nan) for name in experts] for record in found]

    def column(name: str) -> np.ndarray:
        return np.array([record[name] for record in found], dtype=np.float64)

    return FixedPointConvergence(
        modules=tuple(str(record["module"]) for record in found),
        experts=experts,
        status=tuple(Status[str(record["status"]).upper()] for record in found),
        traces=tuple(np.array(record["energy_trace"], dtype=np.float64) for record in found),
        start_energies=tuple(np.array(record["start_energies"], dtype=np.float64) for record in found),
        steps=np.array([record["steps"] for record in found], dtype=np.int64),
        rate=column("contraction_rate"),
        bound=column("contraction_bound"),
        gradient_norm=column("gradient_norm"),
        weight_spread=column("weight_spread"),
        relative_weights=np.array(relative, dtype=np.float64),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
