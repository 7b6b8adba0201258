"""Did the fixed point converge, how fast, and did the tails do anything: one merge, module by module.

Works on the records that a merge leaves in ``poe_merge.json`` and on solutions in memory alike:

>>> import torch
>>> from inference import fixed_point
>>> from poe_models import ProductOfExperts
>>> updates = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
>>> solution = fixed_point(ProductOfExperts.of(["a", "b"]), updates)
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
from typing import Any

import numpy as np

from diagnostics.verdicts import Level, Verdict
from inference.models.model_draws import SpanDraws
from inference.solution import FixedPointInfo, Solution, Status

__all__ = [
    "CoefficientIntervals",
    "FixedPointConvergence",
    "coefficient_intervals",
    "fixed_point_convergence",
    "solution_records",
]


@dataclass(frozen=True, eq=False)
class CoefficientIntervals:
    """Posterior quantiles of ``K`` coefficients in ``M`` modules; float64 ``(M, K)`` arrays.

    Attributes:
        modules: Names.
        updates: Names of the updates, then of the anchor's centre where it has one, then of a merge that the span goes
            through; a draw at that merge has a one there, and zeros at the updates.
        median: Of all chains together.
        low: Lower end of the central interval.
        high: Upper end.
        confidence: Its level.
    """

    modules: tuple[str, ...]
    updates: tuple[str, ...]
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float


def coefficient_intervals(draws: SpanDraws, confidence: float = 0.9) -> CoefficientIntervals:
    """Central intervals of each module's coefficients.

    Args:
        draws: In Span coordinates; judge their chains first.
        confidence: Level of the intervals.

    Returns:
        The intervals.

    Raises:
        ValueError: If the level is not between 0 and 1, or the draws are not in Span coordinates.

    >>> import torch
    >>> coefficients = torch.linspace(0, 1, 101, dtype=torch.float64).reshape(1, 101, 1, 1).expand(1, 101, 1, 2)
    >>> found = coefficient_intervals(SpanDraws(("m",), torch.tensor([[1.0, 0.0]]), "", ("a",), coefficients), 0.8)
    >>> found.updates, found.low.round(2), found.high.round(2)
    (('a',), array([[0.1]]), array([[0.9]]))
    """
    if not isinstance(draws, SpanDraws) or not 0 < confidence < 1:
        raise ValueError(
            f"`coefficient_intervals({type(draws).__name__}, confidence={confidence})`: give Span draws, which have "
            "coefficients, and a level between 0 and 1."
        )
    names = tuple(draws.basis[place] for place in draws.varying)
    values = draws.coefficients[..., draws.varying].detach().cpu().double().numpy()
    low, median, high = np.quantile(values, [(1 - confidence) / 2, 0.5, (1 + confidence) / 2], axis=(0, 1))
    return CoefficientIntervals(draws.modules, names, median, low, high, confidence)


SHOWN = 3
GAUSSIAN_SPREAD = 1.05
"""Spread of the relative weights up to which they are a Gaussian's."""


@dataclass(frozen=True, eq=False)
class FixedPointConvergence:
    """How the solver ended in each of ``M`` modules; arrays are float64 unless said otherwise.

    Attributes:
        modules: Names, in the order of the merge.
        experts: Names of all experts, in order of appearance.
        status: How each solve ended.
        traces: The energy in nats after every solve of the winning start; one array for each module.
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
        """On convergence, on contraction, and on what the tails did."""
        return self._convergence(), self._contraction(), self._tails()

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
        records: One for each module: its name as ``module``, and what ``Solution.record`` gives.

    Returns:
        The modules side by side.

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
        return _collected(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`fixed_point_convergence(...)`: a record is incomplete ({type(error).__name__}: {error}). Give "
            "records of `solution_records`, or a `poe_merge.json` of this version."
        ) from error


def solution_records(solution: Solution[FixedPointInfo], modules: Sequence[str]) -> list[dict[str, Any]]:
    """Records of a solution in memory.

    Args:
        solution: Of a batch of modules.
        modules: Their names.

    Returns:
        One record for each, as in ``poe_merge.json``.

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
