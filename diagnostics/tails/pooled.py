"""Tails of a merge's residuals: pooled, per layer or per task, each beside its null controls.

Pooling modules whose residuals differ in size makes a heavy tail out of Gaussians, so that a pooled fit never stands
alone: beside it are the fit to residuals less the robust location of their own group and over its robust scale, the fit
to simulated Gaussians of each group's location and scale, and the test of `null_control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diagnostics.residuals import Residuals, Unit
from diagnostics.tails.comparison import TailComparison, fit_tails
from diagnostics.tails.families import Array
from diagnostics.tails.null import (
    Groups,
    NullControl,
    location_and_scale,
    members,
    null_control,
    simulated,
    standardised,
    usable_groups,
)
from diagnostics.tails.samples import as_array

__all__ = ["PooledTails", "pooled_tails", "tails_by"]

FEWEST_KEPT = 20
"""What thinning leaves of a group, for the sake of its scale."""


@dataclass(frozen=True, eq=False)
class PooledTails:
    """Tails of several groups of residuals, with what they are to be compared with.

    Attributes:
        pooled: of the residuals as they are.
        standardised: of residuals less the robust location of their group, over its robust scale.
        simulated: of one set of Gaussians with each group's robust location and scale.
        null: whether groups are heavy-tailed themselves.
        offset: median over groups of the location over the scale: below zero where merges fall short of the experts.
        smallest: residuals in the smallest group; over the noisy scale of a few, Gaussians look heavy-tailed, too. The
            test allows for it, the standardised fit does not.
        weight_spread: largest over smallest effective expert weight relative to the Gaussian twin's, of any module: 1
            if the merge's own energy is a Gaussian, or did nothing else; None if the residuals' experts are not known.
    """

    pooled: TailComparison
    standardised: TailComparison
    simulated: TailComparison
    null: NullControl
    offset: float
    smallest: int
    weight_spread: float | None = None

    @property
    def verdict(self) -> str:
        """What the residuals' tails are, in a paragraph."""
        lines = [
            f"pooled: {self.pooled.verdict}",
            f"within groups ({self.offset:+.1f} scales off zero): {self.standardised.verdict}",
            f"Gaussians like the groups: {self.simulated.verdict}",
            f"null control: {self.null.verdict}",
        ]
        if self.weight_spread is not None:
            lines.append(f"effective expert weights, relative to the twin's, differ {self.weight_spread:.3g}-fold")
        return ".\n".join(lines) + "."

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the numbers are not to be trusted; empty if they are."""
        parts = (self.pooled.warnings, self.standardised.warnings, self.null.warnings)
        return tuple(dict.fromkeys(text for part in parts for text in part))


def pooled_tails(
    residuals: Residuals | Groups,
    families: Sequence[str] | None = None,
    *,
    unit: Unit = "scale",
    limit: int = 2000,
    num_simulations: int = 199,
    level: float = 0.01,
    seed: int = 0,
) -> PooledTails:
    """Fit tails to the residuals of a merge, with the controls that a pooled fit needs.

    Args:
        residuals: of a merge, or groups of signed residuals that share a scale.
        families: names; all six by default.
        unit: of a merge's residuals.
        limit: at most about so many residuals, drawn at random from every group; at least 20 are kept of each.
        num_simulations: of the null control.
        level: of the null control.
        seed: of everything that is drawn.

    Returns:
        The fits and the test.

    >>> rng = np.random.default_rng(0)
    >>> groups = [scale * rng.normal(size=60) for scale in (0.1, 0.3, 1.0, 3.0, 10.0)]
    >>> tails = pooled_tails(groups, ["Gaussian", "Student-t"], num_simulations=99)
    >>> tails.pooled.tie_set, tails.standardised.best.name, tails.null.heavy_tailed
    (('Student-t',), 'Gaussian', False)
    """
    groups = residuals.groups(unit) if isinstance(residuals, Residuals) else residuals
    rng = np.random.default_rng(seed)
    thinned = _thinned([as_array(group) for group in members(groups)], limit, rng)
    null = null_control(thinned, num_simulations=num_simulations, level=level, seed=seed)
    kept, _ = usable_groups(thinned)
    samples = (np.concatenate(kept), standardised(kept), np.concatenate(simulated(kept, rng)))
    pooled, own, made = (fit_tails(values, families, limit=limit, seed=seed) for values in samples)
    spread = float(residuals.weight_spread().max()) if isinstance(residuals, Residuals) else None
    offset = float(np.median([location / scale for location, scale in map(location_and_scale, kept)]))
    return PooledTails(pooled, own, made, null, offset, min(map(len, kept)), spread)


def tails_by(
    residuals: Residuals,
    by: Literal["module", "tensor", "expert"],
    families: Sequence[str] | None = None,
    *,
    unit: Unit = "scale",
    limit: int = 2000,
    num_simulations: int = 199,
    level: float = 0.01,
    seed: int = 0,
) -> dict[str, PooledTails]:
    """Tails of each layer or task.

    Args:
        residuals: of a merge.
        by: what is fitted by itself.
        families: see `pooled_tails`.
        unit: see `pooled_tails`.
        limit: of each fit.
        num_simulations: see `pooled_tails`.
        level: of each test; with many modules some are below it by chance.
        seed: of everything that is drawn.

    Returns:
        Name to tails: ``tails_by(residuals("merged", task_vectors, InputGram()), "expert")["mnist"].verdict``.
    """
    return {
        name: pooled_tails(
            part, families, unit=unit, limit=limit, num_simulations=num_simulations, level=level, seed=seed
        )
        for name, part in residuals.split(by).items()
    }


def _thinned(groups: Sequence[Array], limit: int, rng: np.random.Generator) -> list[Array]:
    """About `limit` residuals in all, the same share of every group."""
    share = min(1.0, limit / max(1, sum(len(group) for group in groups)))
    sizes = [max(min(len(group), FEWEST_KEPT), round(share * len(group))) for group in groups]
    return [rng.choice(group, size, replace=False) for group, size in zip(groups, sizes, strict=True)]
