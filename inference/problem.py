"""A posterior with its least-squares problem: what one step of ``fixed_point`` solves, and how exact that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from inference.summed_residuals import SummedResiduals
from poe_models.least_squares import NormalMatrix, Quadratic
from poe_models.posterior import Posterior
from poe_models.precisions import NotPositiveDefiniteError, Precision
from poe_models.records import choose
from poe_models.sums import row_blocks, sum_of_squares

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Default relative tolerance per dtype; in float32 the gradient's rounding floor is about 5e-7."""

FORWARD_ERROR = {torch.float32: 1e-4, torch.float64: 1e-7}
"""Relative error of ``Z`` by rounding above which a solution does not count as converged, per dtype."""

REFINEMENTS = 5
"""Steps of iterative refinement, at most."""

MEASURED = 32
"""Rows on which the error of ``Z`` by rounding is measured before anything is refined."""

SAME_BASIN = 0.02
"""Largest difference of a log-weight at which a run counts as on its way to a known strict local minimum."""


@dataclass(frozen=True, eq=False)
class Point:
    """Point of the iteration: ``x`` ``(M, a, b)``, ``q`` ``(M, E)``, energy ``(M,)``, log-weights there ``(M, E)``."""

    x: Tensor
    q: Tensor
    energy: Tensor
    log_weights: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """Result of the iteration from one start; see :class:`State` and :class:`Gradient` for its fields."""

    point: Point
    trace: Tensor
    steps: Tensor
    rejected: Tensor
    gradient_norm: Tensor
    anchor_share: Tensor
    weight_change: Tensor
    converged: Tensor
    rounding: Tensor
    searched: Tensor
    forward_error: Tensor


@dataclass(frozen=True, eq=False)
class Gradient:
    """Half of the energy's gradient in units of what pulls, ``(M,)`` each.

    Attributes:
        norm: ``|H x - b| / |b|``; 0 where both vanish. Where pulls cancel to rounding, relative to their sum instead.
        anchor: ``ridge |x|``, relative to the same.
    """

    norm: Tensor
    anchor: Tensor


class Problem:
    """A posterior with its least-squares problem: everything that one step needs."""

    def __init__(self, posterior: Posterior, quadratic: Quadratic) -> None:
        self.posterior = posterior
        self.quadratic = quadratic
        self.pulls = quadratic.pulls()
        # A module that nobody changed and nothing anchors stays where it is whatever the ridge.
        self.ridge = torch.where(posterior.undetermined, 1.0, posterior.anchor_precision)
        self.dtype = quadratic.targets[0].dtype
        self.residuals = SummedResiduals(posterior, quadratic, self.pulls)
        self._factored: tuple[Tensor, Precision] | None = None
        self._summed: tuple[Tensor, NormalMatrix] | None = None

    def solve(self, weights: Tensor) -> Point:
        """Minimise the quadratic with these weights, ``(M, E)``."""
        self._factored = None  # before the next is made beside it
        precision = self._normal(weights).factored()
        self._factored = weights, precision
        return self.at(precision.solve(self._weighted(weights)))

    def _normal(self, weights: Tensor) -> NormalMatrix:
        """``H`` with these weights, ``(M, E)``: the last, where they differ by rounding."""
        if self._summed is not None:
            rounding = 2 * torch.finfo(self.dtype).eps
            if bool(((weights - self._summed[0]).abs() <= rounding * weights).all()):
                return self._summed[1]
        self._summed = None  # before the next is made beside it
        self._summed = weights, self.quadratic.normal(weights, self.ridge)
        return self._summed[1]

    def precision_near(self, weights: Tensor) -> Precision:
        """``H`` with these weights, or the last that was factored if its log-weights are within the tolerance."""
        if self._factored is not None:
            close = (weights - self._factored[0]).abs() <= TOLERANCE[self.dtype] * weights
            if bool(close.all()):
                return self._factored[1]
        return self.quadratic.precision(weights, self.ridge)

    def at(self, x: Tensor) -> Point:
        """The point at ``x``, ``(M, a, b)``."""
        q = self.residuals.at(x)
        energy = self.posterior.energy_of(q) + self.ridge * sum_of_squares(x)
        weights = self.posterior.weights(q)
        return Point(x, q, energy, weights.clamp(min=torch.finfo(weights.dtype).tiny).log())

    def refine(self, run: Run) -> Run:
        """Iterative refinement of the converged modules: residuals in float64, corrections from the factored ``H``.

        The normal equations are formed in the compute dtype, and where the anchor is small beside the experts their
        rounding moves ``Z`` in directions that no residual sees. The last correction, relative to ``Z``, is the error
        that is left; modules in which it does not become small are marked as stopped by rounding. Given the weights
        rows of ``Z`` are solved for one by one, so a few of them say first whether there is anything to correct.
        """
        point = run.point
        weights = point.log_weights.exp()
        precision = self.precision_near(weights)
        error = self._measured_error(weights, precision, point.x)
        if bool((error <= 0.5 * FORWARD_ERROR[self.dtype]).logical_or(~run.converged).all()):
            return replace(run, forward_error=torch.where(run.converged, error, torch.nan))
        x = point.x.double()
        for _ in range(REFINEMENTS):
            step = precision.solve(self.quadratic.exact_half_gradient(weights, self.ridge, x).to(self.dtype)).double()
            x = x - step
            error = _relative(step, x)
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

    def _measured_error(self, weights: Tensor, precision: Precision, x: Tensor) -> Tensor:
        """Error of ``x`` by rounding, relative to it, from a few rows in float64, ``(M,)``; infinite where unknown."""
        picked = self.quadratic.picked(MEASURED, x)
        if picked is None:
            return torch.full_like(self.ridge, torch.inf)
        few, some = picked
        step = precision.solve(few.exact_half_gradient(weights, self.ridge, some.double()).to(self.dtype))
        telling = some.numel() * sum_of_squares(x) <= 100 * x.numel() * sum_of_squares(some)  # no rows of zeros
        return torch.where(telling, _relative(step, some), torch.inf)

    def half_gradient(self, point: Point) -> Tensor:
        """``H x - b`` with the weights of ``x`` itself: half the gradient of the energy."""
        weights = point.log_weights.exp()
        return self._normal(weights).apply(point.x) - self._weighted(weights)

    def same_basin(self, point: Point, known: Point) -> Tensor:
        """Mask of the modules whose log-weights, of active experts, are within ``SAME_BASIN`` of a known solution's."""
        distance = (point.log_weights - known.log_weights).abs()
        return torch.where(self.posterior.active, distance, 0.0).amax(-1) < SAME_BASIN

    @cached_property
    def _pull_lengths(self) -> Tensor:
        """``|P_i target_i|``, ``(M, E)``."""
        known = [expert.pull_squared if self.quadratic.known_pulls else None for expert in self.posterior.experts]
        pairs = zip(self.pulls, known, strict=True)
        return torch.stack([sum_of_squares(p) if each is None else each for p, each in pairs], -1).sqrt()

    def gradient(self, point: Point) -> Gradient:
        """Size of the gradient at a point, with the weights of the point itself."""
        weights = point.log_weights.exp()
        b = self._weighted(weights)
        parts = (weights * self._pull_lengths).sum(-1)
        scale = torch.maximum(sum_of_squares(b).sqrt(), torch.finfo(self.dtype).eps * parts)
        norm = sum_of_squares(self._normal(weights).apply(point.x).sub_(b)).sqrt()
        anchor = self.ridge * sum_of_squares(point.x).sqrt()
        return Gradient(torch.where(norm > 0, norm / scale, norm), torch.where(anchor > 0, anchor / scale, anchor))

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
        return rises | (level & (self.gradient(candidate).norm > self.gradient(point).norm))

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
        """Differences of energies that are only rounding, of sums of residuals as well."""
        return 8 * torch.finfo(self.dtype).eps * (energy.abs() + self._summed_energy)

    @cached_property
    def _summed_energy(self) -> Tensor:
        """Energy of merging nothing of the experts whose residuals are summed up, ``(M,)``."""
        return self.posterior.energy_of(torch.where(self.residuals.summed, self.residuals.at_zero, 0.0))

    def _weighted(self, weights: Tensor) -> Tensor:
        """``b``, the weighted sum of the pulls, ``(M, a, b)``."""
        total, factors = torch.empty_like(self.pulls[0]), weights.to(self.dtype)[..., None, None].unbind(-3)
        for rows in row_blocks(total):  # few at a time, which stay in the processor's cache
            part = torch.mul(self.pulls[0][..., rows, :], factors[0], out=total[..., rows, :])
            for pull, factor in zip(self.pulls[1:], factors[1:], strict=True):
                part += pull[..., rows, :] * factor  # rounded each: opposite pulls cancel exactly
        return total

    def extrapolated(self, proposed: Tensor, plain: Tensor) -> tuple[Tensor, Point]:
        """The point of extrapolated log-weights; of the plain ones where these have no solution."""
        try:
            return proposed, self.solve(proposed.exp())
        except NotPositiveDefiniteError:
            return plain, self.solve(plain.exp())


def _relative(step: Tensor, x: Tensor) -> Tensor:
    """Length of a step relative to ``x``, ``(M,)``; 0 of none."""
    return sum_of_squares(step).sqrt() / sum_of_squares(x).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
