"""Tails of a merge's residuals: pooled, per layer or per task, each beside its null control.

Pooling modules whose residuals differ in size makes a heavy tail out of Gaussians, and within a module rows that differ
in size do the same, so that a fit never stands alone: beside it are the same fit to the residuals of a merge of
Gaussian surrogates, and the test of ``null_control``, if there are surrogates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.residuals import Residuals, Unit
from diagnostics.tails.comparison import TailComparison, fit_tails
from diagnostics.tails.families import Array
from diagnostics.tails.null import (
    Groups,
    NullControl,
    location_and_scale,
    named_groups,
    null_control,
    standardised,
    usable_groups,
)
from diagnostics.tails.surrogates import Surrogates
from poe_models.printing import Brief

FEWEST_KEPT = 20
"""Smallest size of a group after thinning, for the sake of its scale."""
NO_SURROGATES = (
    "not known: nothing says how heavy-tailed the same merge of Gaussian updates would look; rows of different size "
    "alone make a heavy tail (`surrogate_residuals` makes such merges)"
)


@dataclass(frozen=True, eq=False, repr=False)
class PooledTails(Brief):
    """Tails of several groups of residuals, beside those of a merge of Gaussian surrogates.

    Attributes:
        pooled: Fits to the residuals as they are.
        standardised: Fits to residuals less the robust location of their group, over its robust scale.
        surrogate: The same of the first merge of Gaussian surrogates; None without any.
        null: Test against all such merges; None without any.
        offset: Median over groups of the location over the scale: below zero where merges fall short of the experts.
        smallest: Residuals in the smallest group; over the noisy scale of a few, Gaussians look heavy-tailed, too. The
            test allows for it, the standardised fit does not.
        weight_spread: Largest over smallest effective expert weight relative to the Gaussian twin's, of any module: 1
            if the merge's own energy is a Gaussian, or did nothing else; None if the residuals' experts are not known.
    """

    pooled: TailComparison
    standardised: TailComparison
    surrogate: TailComparison | None
    null: NullControl | None
    offset: float
    smallest: int
    weight_spread: float | None = None

    @property
    def verdict(self) -> str:
        """The fits and the null control in a paragraph."""
        lines = [
            f"pooled: {self.pooled.verdict}",
            f"within groups ({self.offset:+.1f} scales off zero): {self.standardised.verdict}",
        ]
        if self.surrogate is not None:
            lines.append(f"one merge of Gaussian updates, within groups: {self.surrogate.verdict}")
        lines.append(f"null control: {NO_SURROGATES if self.null is None else self.null.verdict}")
        if self.weight_spread is not None:
            lines.append(f"effective expert weights, relative to the twin's, differ {self.weight_spread:.3g}-fold")
        return ".\n".join(lines) + "."

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust the numbers; empty if there are none."""
        parts = (self.pooled.warnings, self.standardised.warnings, () if self.null is None else self.null.warnings)
        return tuple(dict.fromkeys(text for part in parts for text in part))


def pooled_tails(
    residuals: Residuals | Groups,
    families: Sequence[str] | None = None,
    *,
    surrogates: Surrogates | None = None,
    unit: Unit = "scale",
    limit: int = 2000,
    level: float = 0.05,
    seed: int = 0,
) -> PooledTails:
    """Fit tails to the residuals of a merge, with the control that a fit needs.

    Args:
        residuals: Residuals of a merge, or of one layer or task of it (``Residuals.split``), or groups of signed
            residuals that share a location and a scale.
        families: Names of families; all six by default.
        surrogates: Residuals of the same merge of Gaussian updates, made by ``surrogate_residuals``.
        unit: Unit of a merge's residuals.
        limit: About the largest number of residuals of a fit, drawn at random from every group; at least 20 are kept of
            each. The null control is about all residuals.
        level: Level of the null control.
        seed: Seed of all random choices.

    Returns:
        The fits, and the test if there are surrogates.

    Raises:
        ValueError: If there are surrogates, but the residuals are groups without modules.

    >>> rng = np.random.default_rng(0)
    >>> groups = [scale * rng.normal(size=60) for scale in (0.1, 0.3, 1.0, 3.0, 10.0)]
    >>> tails = pooled_tails(groups, ["Gaussian", "Student-t"])
    >>> tails.pooled.tie_set, tails.standardised.best.name, tails.null is None
    (('Student-t',), 'Gaussian', True)
    """
    if surrogates is not None and not isinstance(residuals, Residuals):
        raise ValueError("`pooled_tails(surrogates=...)`: groups have no modules. Give the `Residuals` of the merge.")
    groups = residuals.groups(unit) if isinstance(residuals, Residuals) else residuals
    null = made = None
    if isinstance(residuals, Residuals) and surrogates is not None:
        null = null_control(residuals, surrogates, unit=unit, level=level)
        made = _kept(surrogates.of(residuals).residuals[0].groups(unit), limit, seed)
    kept = _kept(groups, limit, seed)
    pooled = fit_tails(np.concatenate(kept), families, limit=limit, seed=seed)
    own = fit_tails(standardised(kept), families, limit=limit, seed=seed)
    surrogate = None if made is None else fit_tails(standardised(made), families, limit=limit, seed=seed)
    spread = float(residuals.weight_spread().max()) if isinstance(residuals, Residuals) else None
    offset = float(np.median([location / scale for location, scale in map(location_and_scale, kept)]))
    return PooledTails(pooled, own, surrogate, null, offset, min(map(len, kept)), spread)


def _kept(groups: Groups, limit: int, seed: int) -> list[Array]:
    """About ``limit`` residuals in all, the same share of every usable group."""
    rng = np.random.default_rng(seed)
    named = named_groups(groups)
    share = min(1.0, limit / max(1, sum(map(len, named.values()))))
    sizes = {name: max(min(len(group), FEWEST_KEPT), round(share * len(group))) for name, group in named.items()}
    thinned = {name: rng.choice(group, sizes[name], replace=False) for name, group in named.items()}
    return list(usable_groups(thinned)[0].values())
