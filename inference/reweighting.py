"""The loop of ``fixed_point``: its state, step and termination, for all modules of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from inference.anderson import Anderson
from inference.problem import TOLERANCE, Gradient, Point, Problem, Run
from poe_models.records import choose
from poe_models.sums import sum_of_squares

NamedStart = Literal["ones", "twin", "experts", "center"]
NAMED_STARTS: tuple[NamedStart, ...] = get_args(NamedStart)

Start = NamedStart | Tensor
"""A start: all weights 1 ([PoE]'s released code), the Gaussian twin's weights (``q = 0``), each task vector in
turn, the anchor's centre, or a given point ``(M, *event)``."""

MOST_STALLED = 10
"""Steps in a row without progress after which rounding is taken to have stopped a module."""


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the fixed point; see :func:`fixed_point`."""

    starts: Sequence[Start] = ("twin", "experts")
    max_steps: int = 100
    tolerance: float | None = None
    step_tolerance: float | None = None
    acceleration: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.starts, str):
            raise ValueError(f"`fixed_point(starts={self.starts!r})`: give a sequence of starts: ({self.starts!r},).")
        object.__setattr__(self, "starts", tuple(self.starts))
        unknown = [start for start in self.starts if not isinstance(start, Tensor) and start not in NAMED_STARTS]
        if unknown:
            raise ValueError(
                f"`fixed_point(starts=...)`: no start is called {unknown[0]!r}. Known: "
                f"{', '.join(map(repr, NAMED_STARTS))}, or a tensor."
            )
        if not self.starts or self.max_steps < 1:
            raise ValueError(
                f"`fixed_point(starts={self.starts!r}, max_steps={self.max_steps})`: at least one start and one step."
            )


@dataclass(frozen=True, eq=False)
class State:
    """State of the iteration for ``M`` modules; float64 and boolean, ``(M,)`` unless said otherwise.

    Attributes:
        point: Where it is.
        used: Log-weights that the point was solved with, ``(M, E)``.
        moved: Length of the last step of ``Z``.
        lowest: Smallest change of the log-weights so far.
        stalled: Steps in a row without progress.
        steps: Reweighted solves.
        rejected: Steps that were taken back.
        converged: Modules within the tolerance.
        rounding: Modules that rounding has stopped.
        searched: Modules in which a step was line-searched.
        arrived: Modules on their way to a known minimum.
        gradient: At the point, where it was asked for; None else.
    """

    point: Point
    used: Tensor
    moved: Tensor
    lowest: Tensor
    stalled: Tensor
    steps: Tensor
    rejected: Tensor
    converged: Tensor
    rounding: Tensor
    searched: Tensor
    arrived: Tensor
    gradient: Gradient | None = None

    @property
    def change(self) -> Tensor:
        """Largest change of a log-weight in the last step."""
        return (self.point.log_weights - self.used).abs().amax(-1)

    @property
    def done(self) -> Tensor:
        """Modules that need no further step."""
        return self.converged | self.rounding | self.arrived


def init(problem: Problem, weights: Tensor) -> State:
    """The state after one solve with given weights, ``(M, E)``."""
    point = problem.solve(weights)
    zero, infinite = torch.zeros_like(point.energy), torch.full_like(point.energy, torch.inf)
    no = torch.zeros_like(point.energy, dtype=torch.bool)
    used = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return State(point, used, infinite, infinite, zero, torch.ones_like(zero), zero, no, no, no, no)


def terminate(problem: Problem, state: State, options: SolverOptions, known: Run | None, last: bool) -> State:
    """The state with the modules marked that are done; the minima of a known run need not be found again."""
    tolerance = TOLERANCE[problem.dtype] if options.tolerance is None else options.tolerance
    # The gradient costs as much as a solve, and only matters once the weights have settled.
    settled = bool((state.change <= tolerance).any()) or last
    gradient = problem.gradient(state.point) if settled else None
    if options.step_tolerance is None:
        norm = torch.full_like(state.change, torch.inf) if gradient is None else gradient.norm
        small = (norm <= tolerance) & (state.change <= tolerance)
    else:
        small = state.moved <= options.step_tolerance
    converged = state.converged | (small & ~state.rounding)
    rounding = state.rounding | (~converged & (state.stalled >= MOST_STALLED))
    arrived = state.arrived
    if known is not None:
        arrived = arrived | (known.converged & problem.same_basin(state.point, known.point) & ~converged)
    return replace(state, converged=converged, rounding=rounding, arrived=arrived, gradient=gradient)


def step(problem: Problem, state: State, anderson: Anderson | None) -> State:
    """One solve of the modules that are not done: extrapolated, else plain, else line-searched.

    The extrapolation keeps its own history; None takes plain steps only.
    """
    done, point, plain = state.done, state.point, state.point.log_weights
    used, candidate = plain, None
    rejected, searched = state.rejected, state.searched
    if anderson is not None:
        used, candidate = problem.extrapolated(anderson.propose(state.used, plain), plain)
        worse = problem.uphill(point, candidate) & ~done
        if bool(worse.any()):  # take the plain step there
            anderson.forget(worse)
            used = torch.where(worse.unsqueeze(-1), plain, used)
            candidate = choose(worse, problem.solve(plain.exp()), candidate)
            rejected = rejected + worse
    candidate = problem.solve(plain.exp()) if candidate is None else candidate
    worse = problem.uphill(point, candidate) & ~done
    if bool(worse.any()):  # the energy is not concave there
        if anderson is not None:
            anderson.forget(worse)
        candidate = choose(worse, _line_search(problem, point, candidate, worse), candidate)
        rejected, searched = rejected + worse, searched | worse
    no_progress = (point.energy - candidate.energy <= problem.slack(point.energy)) & (state.change >= state.lowest)
    return replace(
        state,
        point=choose(done, point, candidate),
        used=torch.where(done.unsqueeze(-1), state.used, used),
        moved=torch.where(done, state.moved, sum_of_squares(candidate.x - point.x).sqrt()),
        lowest=torch.minimum(state.lowest, state.change),
        stalled=torch.where(no_progress, state.stalled + 1, torch.zeros_like(state.stalled)),
        steps=state.steps + ~done,
        rejected=rejected,
        searched=searched,
    )


def run_from(problem: Problem, weights: Tensor, options: SolverOptions, known: Run | None = None) -> Run:
    """Iterate from initial weights until every module is done; finished modules stay as they are.

    A module whose weights come within ``SAME_BASIN`` of a known strict local minimum's is on its way there: it stops
    and takes the known result.
    """
    anderson = Anderson(depth=min(5, weights.shape[-1])) if options.acceleration else None
    state = init(problem, weights)
    trace = [state.point.energy]
    while True:
        last = len(trace) >= options.max_steps
        state = terminate(problem, state, options, known, last)
        if last or bool(state.done.all()):
            break
        state = step(problem, state, anderson)
        trace.append(state.point.energy)
    gradient = problem.gradient(state.point) if state.gradient is None else state.gradient
    run = Run(
        point=state.point,
        trace=torch.stack(trace, -1),
        steps=state.steps,
        rejected=state.rejected,
        gradient_norm=gradient.norm,
        anchor_share=gradient.anchor,
        weight_change=state.change,
        converged=state.converged,
        rounding=state.rounding,
        searched=state.searched,
        forward_error=torch.full_like(state.change, torch.nan),
    )
    return run if known is None else select(state.arrived, known, run)


def _line_search(problem: Problem, point: Point, candidate: Point, worse: Tensor) -> Point:
    """Backtrack along a plain step to Armijo's sufficient decrease; where there is none, stay."""
    direction = candidate.x - point.x
    slope, size = problem.line_minimum(point, direction)
    slack = problem.slack(point.energy)
    best, pending = point, worse
    for _ in range(40):
        trial = problem.at(point.x + size.to(direction.dtype)[:, None, None] * direction)
        enough = pending & (trial.energy <= point.energy + 1e-4 * size * slope + slack)
        best, pending = choose(enough, trial, best), pending & ~enough
        if not bool(pending.any()):
            break
        size = size / 2
    return best


def select(where: Tensor, one: Run, other: Run) -> Run:
    """Per module, ``one`` where true and ``other`` elsewhere."""
    length = max(one.trace.shape[-1], other.trace.shape[-1])
    one, other = (
        replace(run, trace=torch.cat([run.trace, run.trace[:, -1:].expand(-1, length - run.trace.shape[-1])], -1))
        for run in (one, other)
    )
    return replace(choose(where, one, other), point=choose(where, one.point, other.point))
