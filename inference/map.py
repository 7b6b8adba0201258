r"""MAP by reweighted least squares: [PoE] Algorithm 1 as published, and with acceleration and safeguards.

Every energy concave in ``q`` lies below its tangent, so with ``w_i = a_i rho'(q_i / s_i^2) / s_i^2`` at the current
point the quadratic ``sum_i w_i q_i(Z) + eta |Z - Z_0|^2`` majorises the energy, and minimising it never increases
``E`` ([PoE] Algorithm 1; half-quadratic minimisation). With ``eta > 0`` the energy is coercive and the iterates
converge to a stationary point from any start.

``plain_iterates`` is the algorithm as published. :func:`fixed_point` adds two things. Anderson extrapolation acts on
the ``N`` log-weights, which are all that the iteration carries from step to step; an extrapolated step that raises the
energy is replaced by the plain one. And where an energy is not concave, the plain step is a descent direction and is
line-searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.problem import Point, Problem, Run
from inference.retention import retention
from inference.reweighting import SolverOptions, Start, run_from, select
from inference.solution import FixedPointInfo, Solution, Status
from inference.units import own_units
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior
from poe_models.sums import inner, sum_of_squares

FLAT = {torch.float32: 1e-4, torch.float64: 1e-7}
"""Least curvature of the energy in any direction, relative to its majoriser's, at a point that counts as a strict
minimum; less is a saddle or cannot be told from one, per dtype."""

SWIFT = 0.5
"""Rate of plain steps, a bit each, below which it is only bounded."""


def plain_iterates(posterior: Posterior, weights: Tensor) -> Iterator[Tensor]:
    """[PoE] Algorithm 1: reweighted solves without end, acceleration or safeguard.

    From initial weights ``(M, E)``; the released code starts with ones.

    Yields:
        The iterates ``Z``, ``(M, *event)``.
    """
    problem = quadratic_of(posterior)
    pulls = torch.stack(problem.pulls(), -1)  # P_i (U_i - Z_0), (M, a, b, E)
    while True:
        # Z <- argmin sum_i w_i q_i(Z) + eta |Z - Z_0|^2, solved for the displacement x = Z - Z_0
        precision = problem.precision(weights, posterior.anchor_precision)
        x = precision.solve((pulls * weights[:, None, None].to(pulls)).sum(-1))
        yield problem.lift(x) + (0.0 if posterior.center is None else posterior.center)
        # w_i <- a_i rho'(q_i(Z) / s_i^2) / s_i^2
        weights = posterior.weights(problem.residuals(x))


def fixed_point(
    posterior: Posterior,
    *,
    starts: Sequence[Start] = ("twin", "experts"),
    max_steps: int = 100,
    tolerance: float | None = None,
    step_tolerance: float | None = None,
    acceleration: bool = True,
) -> Solution[FixedPointInfo]:
    """MAP of a posterior by reweighted least squares, all modules of the batch at once.

    Args:
        posterior: In Full or Span coordinates, without factor experts.
        starts: Where to start; the lowest energy wins. Only the first is used where every energy is convex in the
            residual, so that the MAP is unique, or where it led so low that every expert must be within the range in
            which its energy is (:attr:`~poe_models.Energy.convex_below`): no other start can lead lower.
        max_steps: Reweighted solves per start.
        tolerance: On ``|H Z - b| / |b|`` and on the change of the log-weights; by default 1e-5 in float32 and 1e-10 in
            float64.
        step_tolerance: Stop instead when a step moves ``Z`` by less than this Frobenius norm, as [PoE] does.
        acceleration: Whether to extrapolate the log-weights (Anderson).

    Returns:
        The solution in the posterior's coordinates, of which ``posterior.update`` makes merged updates.

    Raises:
        ValueError: If the posterior has factor experts, its modules' operators do not share a factorisation, updates
            of extreme size have a design of absolute ones, or a setting or start cannot be used.
    """
    options = SolverOptions(starts, max_steps, tolerance, step_tolerance, acceleration)
    if posterior.factors:
        raise ValueError(
            f"`fixed_point(...)`: {posterior.factors[0].name!r} is a FactorExpert; reweighting needs an energy of a "
            "squared residual. Use `minimize`."
        )
    own = own_units(posterior, "fixed_point", equivariant=step_tolerance is None)
    given = [own.latents(start) if isinstance(start, Tensor) else start for start in options.starts]
    problem = Problem(own.posterior, quadratic_of(own.posterior))
    return own.solution(_solution(problem, _best_run(problem, replace(options, starts=given))))


@dataclass(frozen=True, eq=False)
class _Best:
    """The run that reached the lowest energy in every module, its start, and the energies of all ``(M, S)``."""

    run: Run
    contraction: Contraction
    start: tuple[str, ...]
    energies: Tensor


def _best_run(problem: Problem, options: SolverOptions) -> _Best:
    """Run from every start that can matter, and keep the lowest energy of each module."""
    starts = _initial_weights(problem, options.starts)
    name, weights = next(starts)
    best = run_from(problem, weights, options)
    contraction = _contraction(problem, best.point)
    names, energies = [name], [best.point.energy]
    winner = torch.zeros_like(best.steps, dtype=torch.long)
    others = () if bool(_lowest_of_all(problem.posterior, best.point).all()) else starts
    for i, (name, weights) in enumerate(others, 1):
        names.append(name)
        run = run_from(problem, weights, options, known=replace(best, converged=best.converged & contraction.strict))
        energies.append(run.point.energy)
        lower = run.point.energy < best.point.energy - problem.slack(best.point.energy)
        if bool(lower.any()):
            best, winner = select(lower, run, best), torch.where(lower, i, winner)
            contraction = _contraction(problem, best.point)
    if options.step_tolerance is None:  # which asks for [PoE]'s iterate as it is
        best = problem.refine(best)
    return _Best(best, contraction, tuple(names[i] for i in winner.tolist()), torch.stack(energies, -1))


def _lowest_of_all(posterior: Posterior, point: Point) -> Tensor:
    """Mask of the modules in which no minimum can be lower than one at this point, ``(M,)``.

    Where the energy is below ``a_i rho(u_i)`` of every expert, with ``rho(r^2)`` convex up to ``r^2 = u_i``, all points
    that are as low or lower lie in a convex set in which the energy is convex: a minimum among them is the only one.
    """
    levels = []
    for expert in posterior.experts:
        level = expert.energy_of(expert.rho.convex_below * expert.scale_squared)
        levels.append(torch.where(expert.active, level, torch.inf))
    level = torch.stack(levels, -1).amin(-1)
    return (point.energy < level) | (level == torch.inf)


@dataclass(frozen=True, eq=False)
class Contraction:
    """Spectral radius of the log-weight map, a bound on it, and whether it is a strict minimum; ``(M,)``."""

    rate: Tensor
    bound: Tensor
    strict: Tensor


def _initial_weights(problem: Problem, starts: Sequence[Start]) -> Iterator[tuple[str, Tensor]]:
    """Make the weights of each start when it is asked for.

    Yields:
        Its name, and the weights ``(M, E)``.

    Raises:
        ValueError: If they are not finite.
    """
    for name, weights in _start_weights(problem, starts):
        _require_finite(problem.posterior, name, weights)
        yield name, weights


def _start_weights(problem: Problem, starts: Sequence[Start]) -> Iterator[tuple[str, Tensor]]:
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
        else:  # "experts"
            by_update = {e.update_name: t for e, t in zip(posterior.experts, quadratic.targets, strict=True)}
            for name, target in by_update.items():
                yield f"expert:{name}", posterior.weights(quadratic.residuals(target))


def _require_finite(posterior: Posterior, start: str, weights: Tensor) -> None:
    bad = (~weights.isfinite()).nonzero().tolist()
    if bad:
        module, expert = bad[0]
        raise ValueError(
            f"`fixed_point(...)`: expert {posterior.experts[expert].name!r} has a weight that is not finite at the "
            f"start {start!r} in {posterior.label(module)}. Its energy needs a finite slope at q = 0, and the "
            "updates a size that their dtype can hold: rescale them, or compute in float64."
        )


def _status(converged: bool, rounding: bool, searched: bool, strict: bool) -> Status:
    if not converged:
        return Status.ROUNDING if rounding else Status.MAX_STEPS
    if not strict:
        return Status.SADDLE
    return Status.CONVERGED_LINE_SEARCH if searched else Status.CONVERGED


def _solution(problem: Problem, best: _Best) -> Solution[FixedPointInfo]:
    posterior, run, point = problem.posterior, best.run, best.run.point
    displacement = problem.quadratic.lift(point.x)
    value = displacement if posterior.center is None else posterior.center + displacement
    weights, active = posterior.weights(point.q), posterior.active
    relative = weights / posterior.weights(torch.zeros_like(point.q))
    top = torch.where(active, relative, -torch.inf).amax(-1)
    bottom = torch.where(active, relative, torch.inf).amin(-1)
    info = FixedPointInfo(
        experts=tuple(expert.name for expert in posterior.experts),
        energy=point.energy,
        energy_trace=run.trace,
        start=best.start,
        start_energies=best.energies,
        weights=weights,
        relative_weights=relative,
        weight_spread=torch.where(active.any(-1), top / bottom, torch.ones_like(top)),
        inactive=~active,
        residuals=point.q / torch.stack([expert.scale_squared for expert in posterior.experts], -1),
        retention=retention(posterior, value, point.q),
        steps=run.steps.long(),
        rejected=run.rejected.long(),
        gradient_norm=run.gradient_norm,
        anchor_share=run.anchor_share,
        weight_change=run.weight_change,
        forward_error=run.forward_error,
        strict_minimum=best.contraction.strict,
        contraction_rate=best.contraction.rate,
        contraction_bound=best.contraction.bound,
        anchor_precision=posterior.anchor_precision,
    )
    flags = (run.converged, run.rounding, run.searched, best.contraction.strict)
    statuses = tuple(_status(*each) for each in zip(*(flag.tolist() for flag in flags), strict=True))
    return Solution(value, statuses, info)


def _contraction(problem: Problem, point: Point) -> Contraction:
    """Contraction of the plain iteration at a solution.

    With ``f_i = P_i (Z - U_i)`` the Jacobian of the log-weight map is
    ``d log w_i / d log w_j = -2 (rho''_i / rho'_i s_i^2) w_j <f_i, H^-1 f_j>``: a diagonal matrix times the Gram matrix
    ``<f_i, H^-1 f_j>``, whose spectrum is real. Relative to ``2 H`` the energy's Hessian is ``1`` less this spectrum:
    positive definite iff the largest eigenvalue is below 1. As ``sum_i w_i P_i <= H`` it is
    ``max_i 2 |rho''_i| q_i / rho'_i s_i^2`` at most, and where that is small enough nothing is solved for.
    """
    curvature, weights = problem.posterior.curvatures(point.q), problem.posterior.weights(point.q)
    parts = torch.where(problem.posterior.active & (curvature != 0), 2 * curvature.abs() * point.q / weights, 0.0)
    most = parts.amax(-1)
    if bool((most <= SWIFT).all()):
        return Contraction(most, most, torch.ones_like(most, dtype=torch.bool))
    precision = problem.precision_near(weights)
    forces = list(problem.quadratic.forces(point.x))
    products, lengths = [], []
    for force in forces:
        solved = precision.solve(force)
        products.append(torch.stack([inner(each, solved) for each in forces], -1))
        lengths.append(sum_of_squares(force).sqrt() * sum_of_squares(solved).sqrt())
    gram = torch.stack(products, -1)
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    spectrum = torch.linalg.eigvalsh(root.mT @ (-2 * curvature.unsqueeze(-1) * root))
    # The bound is [PoE] Eq. 41 in our terms. At a fixed point a step Z -> Z' changes by dZ' = -H^-1 sum_i dw_i f_i with
    # dw_i = (a_i rho''_i / s_i^4) dq_i and dq_i = 2 <f_i, dZ>. The triangle inequality and Cauchy-Schwarz give
    # |dZ'| <= 2 sum_i (a_i |rho''_i| / s_i^4) |H^-1 f_i| |f_i| |dZ|; tightened: each term keeps its own |f_i|, at Z.
    bound = 2 * (curvature.abs() * torch.stack(lengths, -1)).sum(-1)
    return Contraction(spectrum.abs().amax(-1), bound, 1 - spectrum[..., -1] > FLAT[problem.dtype])
