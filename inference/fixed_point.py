r"""MAP by reweighted least squares: the solver that the product of experts was made for.

Every energy concave in ``q`` lies below its tangent, so with ``w_i = a_i rho'(q_i / s_i^2) / s_i^2`` at the current
point the quadratic ``sum_i w_i q_i(Z) + eta |Z - Z_0|^2`` majorises the energy, and minimising it never increases
``E`` ([PoE] Algorithm 1; half-quadratic minimisation). With ``eta > 0`` the energy is coercive and the iterates
converge to a stationary point from any start.

Two things are added to the plain iteration. Anderson extrapolation acts on the ``N`` log-weights, which are all that
the iteration carries from step to step; an extrapolated step that raises the energy is replaced by the plain one.
And where an energy is not concave, the plain step is a descent direction and is line-searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from inference.anderson import Anderson
from inference.solution import FixedPointInfo, Solution, Status
from poe_models.experts import ProductOfExperts
from poe_models.operators import sum_of_squares
from poe_models.posterior import Posterior, check_updates, full_posterior
from poe_models.quadratics import Quadratic, quadratic_of
from poe_models.span import span_basis, span_posterior, span_statistics
from poe_models.task_vectors import ModuleUpdates

Start = Literal["ones", "twin", "experts", "center"] | Tensor
"""Where to start: all weights 1 ([PoE]'s released code), the Gaussian twin's weights (``q = 0``), each task vector in
turn, the anchor's centre, or a given point ``(M, *event)``."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Default relative tolerance per dtype; in float32 the gradient's rounding floor is about 5e-7."""

SAME_BASIN = 0.02
"""Largest difference of a log-weight at which a run counts as on its way to a known strict local minimum."""


def fixed_point(
    poe: ProductOfExperts,
    updates: Tensor | ModuleUpdates,
    *,
    coordinates: Literal["full", "span"] = "full",
    starts: Sequence[Start] = ("twin", "experts"),
    max_steps: int = 100,
    tolerance: float | None = None,
    step_tolerance: float | None = None,
    acceleration: bool = True,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Solution[FixedPointInfo]:
    """MAP of the merged update, for a batch of modules of equal shape at once.

    Args:
        poe: the design.
        updates: ``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)`` in the order of ``poe.update_names``, or one
            module of a :class:`~poe_models.task_vectors.TaskVectors`. Never changed.
        coordinates: ``"full"`` solves for the merged update, ``"span"`` for its coefficients on the updates and
            the anchor's centre (a restriction for the Gram maps, the same for Directional).
        starts: where to start; the lowest energy wins. Where every energy is convex in the residual the MAP is
            unique and only the first is used.
        max_steps: reweighted solves per start.
        tolerance: on ``|H Z - b| / |b|`` and on the change of the log-weights; by default 1e-5 in float32 and 1e-10 in
            float64.
        step_tolerance: stop instead when a step moves ``Z`` by less than this Frobenius norm, as [PoE] does.
        acceleration: Anderson extrapolation of the log-weights.
        low_rank: factors ``(..., N, d_out, r)`` and ``(..., N, r, d_in)`` of the updates, if they are adapters.

    Returns:
        The solution, with a status per module. ``value`` has the updates' dtype.

    Raises:
        ValueError: shapes, names or values do not fit, or the design cannot be solved in these coordinates.
    """
    if isinstance(updates, ModuleUpdates):
        updates, low_rank = in_order_of(poe, updates)
    single, dtype = updates.ndim == 3, updates.dtype
    updates = check_updates(updates, poe.update_names)
    options = SolverOptions(tuple(starts), max_steps, tolerance, step_tolerance, acceleration)
    if coordinates == "full":
        solution = solve_posterior(full_posterior(poe, updates, low_rank), options)
        value = solution.value
    else:
        posterior, span = span_posterior(poe, span_statistics(poe, updates))
        solution = solve_posterior(posterior, options)
        coefficients = span.coefficients(solution.value)
        value = torch.einsum("mj,mjab->mab", coefficients.to(updates), span_basis(poe, updates))
        solution = replace(solution, info=replace(solution.info, coefficients=coefficients))
    return replace(solution, value=(value.squeeze(0) if single else value).to(dtype))


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the fixed point; see :func:`fixed_point`."""

    starts: tuple[Start, ...] = ("twin", "experts")
    max_steps: int = 100
    tolerance: float | None = None
    step_tolerance: float | None = None
    acceleration: bool = True

    def __post_init__(self) -> None:
        if not self.starts or self.max_steps < 1:
            raise ValueError(
                f"`fixed_point(starts={self.starts}, max_steps={self.max_steps})`: at least one start and one step."
            )


def solve_posterior(posterior: Posterior, options: SolverOptions | None = None) -> Solution[FixedPointInfo]:
    """MAP of a bound posterior in its own coordinates.

    Args:
        posterior: in Full or Span coordinates.
        options: settings of the solver.

    Returns:
        The solution; ``value`` is ``(M, *event)``.

    Raises:
        ValueError: the posterior has factor experts.
    """
    options = options or SolverOptions()
    if posterior.factors:
        raise ValueError(
            f"`fixed_point(...)`: {posterior.factors[0].name!r} is a FactorExpert; reweighting needs an energy of a "
            "squared residual. Use `minimize` from inference.lbfgs."
        )
    problem = _Problem(posterior, quadratic_of(posterior))
    starts = list(_initial_weights(problem, options.starts))
    if all(expert.rho.is_convex for expert in posterior.experts):
        starts = starts[:1]
    best = _run(problem, starts[0][1], options)
    contraction = _contraction(problem, best.point)
    energies = [best.point.energy]
    winner = torch.zeros_like(best.steps, dtype=torch.long)
    for i, (_, weights) in enumerate(starts[1:], 1):
        run = _run(problem, weights, options, known=replace(best, converged=best.converged & (contraction[0] < 1)))
        energies.append(run.point.energy)
        lower = run.point.energy < best.point.energy - problem.slack(best.point.energy)
        if bool(lower.any()):
            best, winner = _select(lower, run, best), torch.where(lower, i, winner)
            contraction = _contraction(problem, best.point)
    names = tuple(starts[i][0] for i in winner.tolist())
    displacement = problem.quadratic.lift(best.point.x)
    value = displacement if posterior.center is None else posterior.center + displacement
    return Solution(value, _statuses(best), _info(problem, best, contraction, names, torch.stack(energies, -1)))


def plain_iterates(posterior: Posterior, weights: Tensor) -> Iterator[Tensor]:
    """Plain reweighting without end, acceleration or safeguard: the iterates ``Z`` of [PoE] Algorithm 1.

    Args:
        posterior: in Full or Span coordinates.
        weights: initial weights ``(M, E)``; the released code starts with ones.

    Yields:
        ``Z`` after each solve, ``(M, *event)``.
    """
    problem = _Problem(posterior, quadratic_of(posterior))
    while True:
        point = problem.solve(weights)
        displacement = problem.quadratic.lift(point.x)
        yield displacement if posterior.center is None else posterior.center + displacement
        weights = point.log_weights.exp()


def in_order_of(poe: ProductOfExperts, module: ModuleUpdates) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A module's updates, and low-rank factors if it has them, in the order of ``poe.update_names``.

    Raises:
        ValueError: the product is about a task vector that the module does not have.
    """
    missing = [name for name in poe.update_names if name not in module.names]
    if missing:
        raise ValueError(
            f"`fixed_point(poe, {module.name!r})`: the product is about {missing[0]!r}, but the task vectors are "
            f"{', '.join(module.names)}. Give the experts these names, or set `update=`."
        )
    index = [module.names.index(name) for name in poe.update_names]
    low_rank = None if module.low_rank is None else (module.low_rank[0][index], module.low_rank[1][index])
    return module.updates[index], low_rank


@dataclass(frozen=True, eq=False)
class _Point:
    """Where the iteration is: ``x`` ``(M, a, b)``, ``q`` ``(M, E)``, energy ``(M,)``, log-weights there ``(M, E)``."""

    x: Tensor
    q: Tensor
    energy: Tensor
    log_weights: Tensor


@dataclass(frozen=True, eq=False)
class _Run:
    """A finished run from one start."""

    point: _Point
    trace: Tensor
    steps: Tensor
    rejected: Tensor
    gradient_norm: Tensor
    weight_change: Tensor
    converged: Tensor
    rounding: Tensor
    searched: Tensor


class _Problem:
    """A posterior with its least-squares problem: everything that one step needs."""

    def __init__(self, posterior: Posterior, quadratic: Quadratic) -> None:
        self.posterior = posterior
        self.quadratic = quadratic
        self.pulls = quadratic.pulls()
        # A module that nobody changed and nothing anchors stays where it is whatever the shift.
        silent = ~posterior.active.any(-1) & (posterior.anchor_precision == 0)
        self.shift = torch.where(silent, 1.0, posterior.anchor_precision)
        self.dtype = quadratic.targets[0].dtype

    def solve(self, weights: Tensor) -> _Point:
        """Minimise the quadratic with these weights, ``(M, E)``."""
        return self.at(self.quadratic.precision(weights, self.shift).solve(self._weighted(weights, self.pulls)))

    def at(self, x: Tensor) -> _Point:
        q = self.quadratic.residuals(x)
        energy = self.posterior.energy_of(q) + self.shift * sum_of_squares(x)
        weights = self.posterior.weights(q)
        return _Point(x, q, energy, weights.clamp(min=torch.finfo(weights.dtype).tiny).log())

    def half_gradient(self, point: _Point) -> Tensor:
        """``H x - b`` with the weights of ``x`` itself: half the gradient of the energy."""
        weights = point.log_weights.exp()
        return self.quadratic.apply(weights, self.shift, point.x) - self._weighted(weights, self.pulls)

    def same_basin(self, point: _Point, known: _Point) -> Tensor:
        """Whether the log-weights of the active experts are close to a known solution's, ``(M,)``."""
        distance = (point.log_weights - known.log_weights).abs()
        return torch.where(self.posterior.active, distance, 0.0).amax(-1) < SAME_BASIN

    def gradient_norm(self, point: _Point) -> Tensor:
        """``|H x - b| / |b|``; 0 where both vanish. Where pulls cancel to rounding, relative to their sum instead."""
        weights = point.log_weights.exp()
        b = sum_of_squares(self._weighted(weights, self.pulls)).sqrt()
        parts = [weights[:, i] * sum_of_squares(pull).sqrt() for i, pull in enumerate(self.pulls)]
        scale = torch.maximum(b, torch.finfo(self.dtype).eps * sum(parts, torch.zeros_like(b)))
        norm = sum_of_squares(self.half_gradient(point)).sqrt()
        return torch.where(norm > 0, norm / scale, norm)

    def uphill(self, point: _Point, candidate: _Point) -> Tensor:
        """Whether a step raises the energy, ``(M,)``.

        Where the energy cannot tell two points apart any more, an energy that is not concave, whose plain steps may
        overshoot, is judged by the gradient.
        """
        slack = self.slack(point.energy)
        rises = ~(candidate.energy <= point.energy + slack)
        if all(expert.rho.is_concave for expert in self.posterior.experts):
            return rises
        level = (candidate.energy - point.energy).abs() <= slack
        return rises | (level & (self.gradient_norm(candidate) > self.gradient_norm(point)))

    def line_minimum(self, point: _Point, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Slope of the energy along a direction and the step to the minimum of its quadratic model, ``(M,)`` each."""
        weights, curvatures = self.posterior.weights(point.q), self.posterior.curvatures(point.q)
        forces = self.quadratic.forces(point.x)
        bend = self.shift * sum_of_squares(direction)
        for i, (operator, force) in enumerate(zip(self.quadratic.operators, forces, strict=True)):
            along = (force.double() * direction.double()).sum((-2, -1))
            bend = bend + weights[:, i] * operator.quadratic(direction) + 2 * curvatures[:, i] * along.square()
        slope = 2 * (self.half_gradient(point).double() * direction.double()).sum((-2, -1))
        return slope, torch.where(bend > 0, (-slope / (2 * bend)).clamp(max=1.0), 0.5)

    def slack(self, energy: Tensor) -> Tensor:
        """Differences of energies that are only rounding."""
        return 8 * torch.finfo(self.dtype).eps * energy.abs()

    def _weighted(self, weights: Tensor, terms: list[Tensor]) -> Tensor:
        total = torch.zeros_like(terms[0])
        for i, term in enumerate(terms):
            total = total + weights[:, i].to(term.dtype)[:, None, None] * term
        return total


def _initial_weights(problem: _Problem, starts: Sequence[Start]) -> Iterator[tuple[str, Tensor]]:
    posterior, quadratic = problem.posterior, problem.quadratic
    at_zero = torch.zeros_like(posterior.anchor_precision).unsqueeze(-1).expand(-1, len(posterior.experts))
    for start in starts:
        if isinstance(start, Tensor):
            yield "point", posterior.weights(posterior.residuals(start))
        elif start == "ones":
            yield start, torch.ones_like(at_zero)
        elif start == "twin":
            yield start, posterior.weights(at_zero)
        elif start == "center":
            yield start, posterior.weights(quadratic.residuals(torch.zeros_like(quadratic.targets[0])))
        elif start == "experts":
            by_update = {e.update_name: t for e, t in zip(posterior.experts, quadratic.targets, strict=True)}
            for name, target in by_update.items():
                yield f"expert:{name}", posterior.weights(quadratic.residuals(target))
        else:
            raise ValueError(
                f"`fixed_point(starts=...)`: no start is called {start!r}. Known: 'ones', 'twin', 'experts', 'center', "
                "or a tensor."
            )


def _run(problem: _Problem, weights: Tensor, options: SolverOptions, known: _Run | None = None) -> _Run:
    """Iterate from initial weights until every module has converged; finished modules stay as they are.

    A module whose weights come within ``SAME_BASIN`` of a known strict local minimum's is on its way there: it stops
    and takes the known result.
    """
    tolerance = TOLERANCE[problem.dtype] if options.tolerance is None else options.tolerance
    used = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    point = problem.solve(weights)
    trace = [point.energy]
    flags = torch.zeros_like(point.energy, dtype=torch.bool)
    converged, rounding, searched, arrived = flags, flags, flags, flags
    steps, rejected = torch.ones_like(point.energy), torch.zeros_like(point.energy)
    stalled, moved = torch.zeros_like(point.energy), torch.full_like(point.energy, torch.inf)
    lowest = torch.full_like(point.energy, torch.inf)
    anderson = Anderson(depth=min(5, weights.shape[-1]))
    while True:
        change = (point.log_weights - used).abs().amax(-1)
        # The gradient costs as much as a solve, and only matters once the weights have settled.
        settled = bool((change <= tolerance).any()) or len(trace) >= options.max_steps
        gradient = problem.gradient_norm(point) if settled else torch.full_like(change, torch.inf)
        if options.step_tolerance is None:
            small = (gradient <= tolerance) & (change <= tolerance)
        else:
            small = moved <= options.step_tolerance
        converged = converged | (small & ~rounding)
        rounding = rounding | (~converged & (stalled >= 10))
        if known is not None:
            arrived = arrived | (known.converged & problem.same_basin(point, known.point) & ~converged)
        done = converged | rounding | arrived
        if bool(done.all()) or len(trace) >= options.max_steps:
            break
        plain_log = point.log_weights
        proposed = anderson.propose(used, plain_log) if options.acceleration else plain_log
        candidate = problem.solve(proposed.exp())
        worse = problem.uphill(point, candidate) & ~done
        if options.acceleration and bool(worse.any()):
            anderson.forget(worse)
            proposed = torch.where(worse.unsqueeze(-1), plain_log, proposed)
            candidate = _choose(worse, problem.solve(plain_log.exp()), candidate)
            rejected = rejected + worse
            worse = problem.uphill(point, candidate) & ~done
        if bool(worse.any()):
            anderson.forget(worse)
            candidate = _choose(worse, _line_search(problem, point, candidate, worse), candidate)
            rejected, searched = rejected + worse, searched | worse
        moved = torch.where(done, moved, sum_of_squares(candidate.x - point.x).sqrt())
        no_progress = (point.energy - candidate.energy <= problem.slack(point.energy)) & (change >= lowest)
        stalled = torch.where(no_progress, stalled + 1, torch.zeros_like(stalled))
        lowest = torch.minimum(lowest, change)
        point = _choose(done, point, candidate)
        used = torch.where(done.unsqueeze(-1), used, proposed)
        steps = steps + ~done
        trace.append(point.energy)
    run = _Run(point, torch.stack(trace, -1), steps, rejected, gradient, change, converged, rounding, searched)
    return run if known is None else _select(arrived, known, run)


def _line_search(problem: _Problem, point: _Point, candidate: _Point, worse: Tensor) -> _Point:
    """Backtrack along a plain step to Armijo's sufficient decrease; where there is none, stay."""
    direction = candidate.x - point.x
    slope, size = problem.line_minimum(point, direction)
    slack = problem.slack(point.energy)
    best, pending = point, worse
    for _ in range(40):
        trial = problem.at(point.x + size.to(direction.dtype)[:, None, None] * direction)
        enough = pending & (trial.energy <= point.energy + 1e-4 * size * slope + slack)
        best, pending = _choose(enough, trial, best), pending & ~enough
        if not bool(pending.any()):
            break
        size = size / 2
    return best


def _choose(where: Tensor, one: _Point, other: _Point) -> _Point:
    """Per module, ``one`` where true and ``other`` elsewhere."""
    wide, matrix = where.unsqueeze(-1), where[:, None, None]
    return _Point(
        torch.where(matrix, one.x, other.x),
        torch.where(wide, one.q, other.q),
        torch.where(where, one.energy, other.energy),
        torch.where(wide, one.log_weights, other.log_weights),
    )


def _select(where: Tensor, one: _Run, other: _Run) -> _Run:
    """Per module, ``one`` where true and ``other`` elsewhere."""
    length = max(one.trace.shape[-1], other.trace.shape[-1])
    traces = [torch.cat([t, t[:, -1:].expand(-1, length - t.shape[-1])], -1) for t in (one.trace, other.trace)]
    return _Run(
        point=_choose(where, one.point, other.point),
        trace=torch.where(where.unsqueeze(-1), traces[0], traces[1]),
        steps=torch.where(where, one.steps, other.steps),
        rejected=torch.where(where, one.rejected, other.rejected),
        gradient_norm=torch.where(where, one.gradient_norm, other.gradient_norm),
        weight_change=torch.where(where, one.weight_change, other.weight_change),
        converged=torch.where(where, one.converged, other.converged),
        rounding=torch.where(where, one.rounding, other.rounding),
        searched=torch.where(where, one.searched, other.searched),
    )


def _statuses(run: _Run) -> tuple[Status, ...]:
    outcome = []
    for converged, rounding, searched in zip(
        run.converged.tolist(), run.rounding.tolist(), run.searched.tolist(), strict=True
    ):
        if converged:
            outcome.append(Status.CONVERGED_LINE_SEARCH if searched else Status.CONVERGED)
        else:
            outcome.append(Status.ROUNDING if rounding else Status.MAX_STEPS)
    return tuple(outcome)


def _info(
    problem: _Problem, run: _Run, contraction: tuple[Tensor, Tensor], names: tuple[str, ...], energies: Tensor
) -> FixedPointInfo:
    posterior, point = problem.posterior, run.point
    weights = posterior.weights(point.q)
    relative = weights / posterior.weights(torch.zeros_like(point.q))
    active = posterior.active
    top = torch.where(active, relative, -torch.inf).amax(-1)
    bottom = torch.where(active, relative, torch.inf).amin(-1)
    rate, bound = contraction
    scales = torch.stack([expert.scale_squared for expert in posterior.experts], -1)
    return FixedPointInfo(
        experts=tuple(expert.name for expert in posterior.experts),
        energy=point.energy,
        energy_trace=run.trace,
        start=names,
        start_energies=energies,
        weights=weights,
        weight_spread=torch.where(active.any(-1), top / bottom, torch.ones_like(top)),
        inactive=~active,
        residuals=point.q / scales,
        steps=run.steps.long(),
        rejected=run.rejected.long(),
        gradient_norm=run.gradient_norm,
        weight_change=run.weight_change,
        contraction_rate=rate,
        contraction_bound=bound,
        anchor_precision=posterior.anchor_precision,
    )


def _contraction(problem: _Problem, point: _Point) -> tuple[Tensor, Tensor]:
    """Spectral radius of the log-weight map's Jacobian, and [PoE] Eq. 26's bound, ``(M,)`` each.

    With ``f_i = P_i (Z - U_i)``: ``d log w_i / d log w_j = -2 (rho''_i / rho'_i s_i^2) w_j <f_i, H^-1 f_j>``, and
    ``L = 2 sum_i a_i |rho''_i| / s_i^4 |f_i| |H^-1 f_i|``.
    """
    weights = problem.posterior.weights(point.q)
    precision = problem.quadratic.precision(weights, problem.shift)
    forces = problem.quadratic.forces(point.x)
    solved = [precision.solve(force) for force in forces]
    inner = torch.stack(
        [torch.stack([(f.double() * s.double()).sum((-2, -1)) for s in solved], -1) for f in forces], -2
    )
    curvature = problem.posterior.curvatures(point.q)
    jacobian = -2 * inner * curvature.unsqueeze(-2)  # similar to the Jacobian: both are diagonal times symmetric
    rate = torch.linalg.eigvals(jacobian).abs().amax(-1)
    lengths = [sum_of_squares(f).sqrt() * sum_of_squares(s).sqrt() for f, s in zip(forces, solved, strict=True)]
    return rate, 2 * (curvature.abs() * torch.stack(lengths, -1)).sum(-1)
