r"""The posterior of scale and shape, by quadrature.

Flat in ``log s``, with the family's prior on the shape, the posterior of one or two numbers is summed on a grid: exact
up to the trapezoid rule, which converges exponentially for a smooth density that vanishes at the grid's ends. The grid
is moved and narrowed until it covers all that is within 20 nats of the mode. Its axes are the log of a typical size,
which is the log scale unless shape and scale trade off, and the log shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diagnostics.estimates import Estimate
from diagnostics.tails.families import Array, Family
from diagnostics.tails.fits import profile
from diagnostics.tails.samples import Values, sample_of
from poe_models.printing import Brief

DEPTH = 20.0
"""Nats below the mode where the posterior is cut off."""
NODES, NODES_ALONE, COARSE_NODES = 49, 401, 25
"""Per axis: of the final grid, of one that has a scale only, and while it is being placed."""
PROFILED = 9
"""Shapes whose likeliest scale is looked for, to place the first grid."""
BLOCK = 1 << 21
"""Entries evaluated at once: 16 MB."""


@dataclass(frozen=True, eq=False, repr=False)
class TailPosterior(Brief):
    """Posterior of a family's parameters on a grid.

    Attributes:
        family: The family.
        scales: Scale of every node, in the units of the residuals, ``(K,)``.
        shapes: Shape of every node, ``(K,)``; ones for scale families.
        weights: Probabilities of the nodes, ``(K,)``.
    """

    family: Family
    scales: Array
    shapes: Array
    weights: Array

    @property
    def scale(self) -> Estimate:
        """Median and central 95 % interval of the scale, in the units of the residuals."""
        return _summary(self.scales, self.weights)

    @property
    def shape(self) -> Estimate | None:
        """Median and central 95 % interval of the shape; None for scale families."""
        return None if self.family.shape is None else _summary(self.shapes, self.weights)

    def draws(self, count: int, seed: int) -> tuple[Array, Array]:
        """Scales and shapes ``(count,)`` of nodes drawn by their probability, systematically and then shuffled.

        They stay nodes: moments over the nodes are exact, and spreading them over their cells would widen a posterior
        in which scale and shape are correlated.
        """
        rng = np.random.default_rng(seed)
        points = (np.arange(count) + rng.random()) / count
        nodes = np.searchsorted(np.cumsum(self.weights), points * self.weights.sum()).clip(max=len(self.weights) - 1)
        chosen = rng.permutation(nodes)
        return self.scales[chosen], self.shapes[chosen]


def tail_posterior(values: Values, family: Family) -> TailPosterior:
    """Posterior of a family's scale and shape from independent signed residuals of any shape.

    >>> from diagnostics.tails.families import GAUSSIAN
    >>> print(tail_posterior(np.linspace(-1.7, 1.7, 101), GAUSSIAN).scale)
    0.995 [0.871, 1.150]
    """
    sample = sample_of(values)
    sizes = np.abs(sample.scaled)
    floor, ceiling = np.array([-np.inf, 0.0]), np.array([np.inf, 0.0])
    if family.shape is not None:
        floor[1], ceiling[1] = np.log(family.shape.bounds)
    low, high = _start(sizes, family, floor[1], ceiling[1])
    settled = False
    while not settled:
        axes = _axes(low, high, COARSE_NODES)
        inside = (density := _log_posterior(sizes, family, *axes)) > density.max() - DEPTH
        box = _box(axes, inside)
        box = np.maximum(box[0], floor), np.minimum(box[1], ceiling)
        cut = _cut(inside, (low, high), (floor, ceiling))
        settled = not cut and bool((box[1] - box[0] >= 0.7 * (high - low)).all())
        low, high = box
    axes = _axes(low, high, NODES_ALONE if family.shape is None else NODES)
    density = _log_posterior(sizes, family, *axes)
    weights = np.exp(density - density.max()).ravel()
    scales, shapes = np.broadcast_arrays(*_parameters(family, *axes))
    return TailPosterior(family, scales.ravel() * sample.unit, shapes.ravel(), weights / weights.sum())


def _start(sizes: Array, family: Family, least: float, most: float) -> tuple[Array, Array]:
    """A box with the likeliest log size of every log shape between two, whatever the outliers."""
    log_shapes = np.linspace(least, most, PROFILED if most > least else 1)
    shapes = np.exp(log_shapes)
    log_sizes = np.log([profile(sizes, family, shape)[0] for shape in shapes]) + family.log_size(shapes)
    return np.array([log_sizes.min() - 3.0, least]), np.array([log_sizes.max() + 3.0, most])


def _axes(low: Array, high: Array, nodes: int) -> tuple[Array, Array]:
    log_sizes, log_shapes = (np.linspace(a, b, nodes if b > a else 1) for a, b in zip(low, high, strict=True))
    return log_sizes, log_shapes


def _parameters(family: Family, log_sizes: Array, log_shapes: Array) -> tuple[Array, Array]:
    """Scales ``(G, H)`` and shapes ``(H,)``; flat in the log size is flat in the log scale."""
    shapes = np.exp(log_shapes)
    return np.exp(log_sizes[:, None] - family.log_size(shapes)), shapes


def _log_posterior(sizes: Array, family: Family, log_sizes: Array, log_shapes: Array) -> Array:
    """Log posterior of log size and log shape in nats, ``(G, H)``, up to a constant."""
    scales, shapes = _parameters(family, log_sizes, log_shapes)
    total = np.zeros(scales.shape)
    rows = max(1, BLOCK // (len(sizes) * len(shapes)))
    for start in range(0, len(scales), rows):
        block = slice(start, start + rows)
        total[block] = family.log_density(sizes[:, None, None], scales[block], shapes).sum(0)
    if family.shape is not None:
        total += family.shape.log_prior(shapes) + log_shapes  # the Jacobian of the logarithm
    return total


def _box(axes: tuple[Array, Array], inside: Array) -> tuple[Array, Array]:
    """The box around the nodes that matter, one step wider; wherever they touch its end, a quarter wider."""
    low, high = np.empty(2), np.empty(2)
    for axis, nodes in enumerate(axes):
        touched = np.flatnonzero(inside.any(1 - axis))
        step = _step(nodes)
        margin = 0.25 * (nodes[-1] - nodes[0])
        low[axis] = nodes[touched[0]] - (margin if touched[0] == 0 else step)
        high[axis] = nodes[touched[-1]] + (margin if touched[-1] == len(nodes) - 1 else step)
    return low, high


def _cut(inside: Array, box: tuple[Array, Array], bounds: tuple[Array, Array]) -> bool:
    """Whether the box ends where the posterior still matters, other than at the bounds of the shape."""
    ends = [
        (inside[0].any(), box[0][0] > bounds[0][0]),
        (inside[-1].any(), box[1][0] < bounds[1][0]),
        (inside[:, 0].any(), box[0][1] > bounds[0][1]),
        (inside[:, -1].any(), box[1][1] < bounds[1][1]),
    ]
    return any(bool(matters and free) for matters, free in ends)


def _step(nodes: Array) -> float:
    return float(nodes[1] - nodes[0]) if len(nodes) > 1 else 0.0


def _summary(values: Array, weights: Array) -> Estimate:
    """Median, central 95 % interval and standard deviation; ends are good to 0.03 standard deviations."""
    nodes, place = np.unique(values, return_inverse=True)
    masses = np.bincount(place, weights)
    below = np.cumsum(masses) - masses / 2
    low, median, high = (float(value) for value in np.exp(np.interp([0.025, 0.5, 0.975], below, np.log(nodes))))
    error = np.sqrt(np.maximum((nodes - nodes @ masses) ** 2 @ masses, 0.0))
    return Estimate(median, low, high, float(error))
