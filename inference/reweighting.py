"""The loop of ``fixed_point``: its state, step and termination, for all modules of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from inference.anderson import Anderson
from poe_models.least_squares import Quadratic
from poe_models.operators import sum_of_squares
from poe_models.posterior import Posterior
from poe_models.precisions import NotPositiveDefiniteError
from poe_models.records import choose

NamedStart = Literal["ones", "twin", "experts", "center"]
NAMED_STARTS: tuple[NamedStart, ...] = get_args(NamedStart)

Start = NamedStart | Tensor
"""A start: all weights 1 ([PoE]'s released code), the Gaussian twin's weights (``q = 0``), each task vector in
turn, the anchor's centre, or a given point ``(M, *event)``."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Default relative tolerance per dtype; in float32 the gradient's rounding floor is about 5e-7."""

FORWARD_ERROR = {torch.float32: 1e-4, torch.float64: 1e-7}
"""Relative error of ``Z`` by rounding above which a solution does not count as converged, per dtype."""

FLAT = {torch.float32: 1e-4, torch.float64: 1e-7}
"""Least curvature of the energy in any direction, relative to its majoriser's, at a point that counts as a strict
minimum; less is a saddle or cannot be told from one, per dtype."""

REFINEMENTS = 5
"""Steps of iterative refinement, at most."""

MOST_STALLED = 10
"""Steps in a row without progress after which rounding is taken to have stopped a module."""

SAME_BASIN = 0.02
"""Largest difference of a log-weight at which a run counts as on its way to a known strict local minimum."""


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
class Point:
    """Point of the iteration: ``x`` ``(M, a, b)``, ``q`` ``(M, E)``, energy ``(M,)``, log-weights there ``(M, E)``."""

    x: Tensor
    q: Tensor
    energy: Tensor
    log_weights: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """Result of the iteration from one start; see :class:`State` for its fields."""

    point: Point
    trace: Tensor
    steps: Tensor
    rejected: Tensor
    gradient_norm: Tensor
    weight_change: Tensor
    converged: Tensor
    rounding: Tensor
    searched: Tensor
    forward_error: Tensor


class Problem:
    """A posterior with its least-squares problem: everything that one step needs."""

    def __init__(self, posterior: Posterior, quadratic: Quadratic) -> None:
        self.posterior = posterior
        self.quadratic = quadratic
        self.pulls = quadratic.pulls()
        # A module that nobody changed and nothing anchors stays where it is whatever the ridge.
        self.ridge = torch.where(posterior.undetermined, 1.0, posterior.anchor_precision)
        self.dtype = quadratic.targets[0].dtype

    def solve(self, weights: Tensor) -> Point:
        """Minimise the quadratic with these weights, ``(M, E)``."""
        return self.at(self.quadratic.precision(weights, self.ridge).solve(self._weighted(weights, self.pulls)))

    def at(self, x: Tensor) -> Point:
        """The point at ``x``, ``(M, a, b)``."""
        q = self.quadratic.residuals(x)
        energy = self.posterior.energy_of(q) + self.ridge * sum_of_squares(x)
        weights = self.posterior.weights(q)
        return Point(x, q, energy, weights.clamp(min=torch.finfo(weights.dtype).tiny).log())

    def refine(self, run: Run) -> Run:
        """Iterative refinement of the converged modules: residuals in float64, corrections from the factored ``H``.

        The normal equations are formed in the compute dtype, and where the anchor is small beside the experts their
        rounding moves ``Z`` in directions that no residual sees. The last correction, relative to ``Z``, is the error
        that is left; modules in which it does not become small are marked as stopped by rounding.
        """
        point = run.point
        weights = point.log_weights.exp()
        precision = self.quadratic.precision(weights, self.ridge)
        x, error = point.x.double(), torch.full_like(point.energy, torch.inf)
        for _ in range(REFINEMENTS):
            step = precision.solve(self._exact_half_gradient(weights, x).to(self.dtype)).double()
            x = x - step
            size = sum_of_squares(step).sqrt() / sum_of_squares(x).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            error = torch.where(sum_of_squares(step) > 0, size, torch.zeros_like(size))
            if bool((error <= 0.01 * FORWARD_ERROR[self.dtype]).all()):
                break
        refined = choose(run.converged & error.isfinite(), self.at(x.to(self.dtype)), point)
        failed = run.converged & ~(error <= FORWARD_ERROR[self.dtype])
        return replace(
            run,
            point=refined,
            converged=run.converged & ~failed,
            rounding=run.rounding | failed,
            forward_error=torch.where(run.converged, error, torch.nan),
        )

    def _exact_half_gradient(self, weights: Tensor, x: Tensor) -> Tensor:
        """``H x - b`` in float64, expert by expert, so that only one of them is held in float64 at a time."""
        total = self.ridge[:, None, None] * x
        for i, (operator, target) in enumerate(zip(self.quadratic.operators, self.quadratic.targets, strict=True)):
            force = operator.to(torch.float64).apply(x - target)
            total.add_(force.mul_(weights[:, i, None, None]))
        return total

    def half_gradient(self, point: Point) -> Tensor:
        """``H x - b`` with the weights of ``x`` itself: half the gradient of the energy."""
        weights = point.log_weights.exp()
        return self.quadratic.apply(weights, self.ridge, point.x) - self._weighted(weights, self.pulls)

    def same_basin(self, point: Point, known: Point) -> Tensor:
        """Mask of the modules whose log-weights, of active experts, are within ``SAME_BASIN`` of a known solution's."""
        distance = (point.log_weights - known.log_weights).abs()
        return torch.where(self.posterior.active, distance, 0.0).amax(-1) < SAME_BASIN

    def gradient_norm(self, point: Point) -> Tensor:
        """``|H x - b| / |b|``; 0 where both vanish. Where pulls cancel to rounding, relative to their sum instead."""
        weights = point.log_weights.exp()
        b = sum_of_squares(self._weighted(weights, self.pulls)).sqrt()
        parts = [weights[:, i] * sum_of_squares(pull).sqrt() for i, pull in enumerate(self.pulls)]
        scale = torch.maximum(b, torch.finfo(self.dtype).eps * sum(parts, torch.zeros_like(b)))
        norm = sum_of_squares(self.half_gradient(point)).sqrt()
        return torch.where(norm > 0, norm / scale, norm)

    def uphill(self, point: Point, candidate: Point) -> Tensor:
        """Mask of the modules in which a step raises the energy, ``(M,)``.

        Where the energy cannot tell two points apart any more, an energy that is not concave, whose plain steps may
        overshoot, is judged by the gradient.
        """
        slack = self.slack(point.energy)
        rises = ~(candidate.energy <= point.energy + slack)
        if all(expert.rho.concave for expert in self.posterior.experts):
            return rises
        level = (candidate.energy - point.energy).abs() <= slack
        return rises | (level & (self.gradient_norm(candidate) > self.gradient_norm(point)))

    def line_minimum(self, point: Point, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Slope of the energy along a direction and the step to the minimum of its quadratic model, ``(M,)`` each."""
        weights, curvatures = self.posterior.weights(point.q), self.posterior.curvatures(point.q)
        forces = self.quadratic.forces(point.x)
        bend = self.ridge * sum_of_squares(direction)
        for i, (operator, force) in enumerate(zip(self.quadratic.operators, forces, strict=True)):
            along = (force.double() * direction.double()).sum((-2, -1))
            bend = bend + weights[:, i] * operator.quadratic(direction) + 2 * curvatures[:, i] * along.square()
        slope = 2 * (self.half_gradient(point).double() * direction.double()).sum((-2, -1))
        return slope, torch.where(bend > 0, (-slope / (2 * bend)).clamp(max=1.0), 0.5)

    def slack(self, energy: Tensor) -> Tensor:
        """Differences of energies that are only rounding."""
        return 8 * torch.finfo(self.dtype).eps * energy.abs()

    def _weighted(self, weights: Tensor, terms: list[Tensor]) -> Tensor:
        return sum((w.to(t)[:, None, None] * t for w, t in zip(weights.unbind(-1), terms, strict=True)), 0 * terms[0])

    def extrapolated(self, proposed: Tensor, plain: Tensor) -> tuple[Tensor, Point]:
        """The point of extrapolated log-weights; of the plain ones where these have no solution."""
        try:
            return proposed, self.solve(proposed.exp())
        except NotPositiveDefiniteError:
            return plain, self.solve(plain.exp())


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
    gradient = problem.gradient_norm(state.point) if settled else torch.full_like(state.change, torch.inf)
    if options.step_tolerance is None:
        small = (gradient <= tolerance) & (state.change <= tolerance)
    else:
        small = state.moved <= options.step_tolerance
    converged = state.converged | (small & ~state.rounding)
    rounding = state.rounding | (~converged & (state.stalled >= MOST_STALLED))
    arrived = state.arrived
    if known is not None:
        arrived = arrived | (known.converged & problem.same_basin(state.point, known.point) & ~converged)
    return replace(state, converged=converged, rounding=rounding, arrived=arrived)


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
    run = Run(
        point=state.point,
        trace=torch.stack(trace, -1),
        steps=state.steps,
        rejected=state.rejected,
        gradient_norm=problem.gradient_norm(state.point),
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
