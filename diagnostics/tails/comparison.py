"""Families of tails fitted to residuals and compared by leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diagnostics.arviz_adapter import LeaveOneOut, compare_leave_one_out, leave_one_out
from diagnostics.estimates import Estimate, interval_columns
from diagnostics.tails.families import FAMILIES, Array, Family, families_named
from diagnostics.tails.fits import Fit, maximum_likelihood
from diagnostics.tails.posteriors import TailPosterior, tail_posterior
from diagnostics.tails.samples import Sample, Values, sample_of
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


TIE = 2.0
"""Standard errors within which families are tied."""
SMALL = 4.0
"""Nats below which standard errors of a difference are not reliable (Sivula et al., 2020, arXiv 2008.10296)."""
DOMINATED = 0.5
"""Share of the variance of a difference that one residual may have before its standard error means little."""
CLEAR = 4.0
"""Standard errors beyond which a difference is clear."""
FEWEST_DRAWS = 100
"""Posterior draws of a family."""


@dataclass(frozen=True, eq=False, repr=False)
class FamilyResult(Brief):
    """One family's fits and its place among the others; elpd and differences in nats, summed over residuals.

    Attributes:
        fit: Fit of greatest likelihood.
        posterior: Posterior of scale and shape.
        loo: Pointwise leave-one-out densities and their Pareto k.
        error: Standard error of the elpd.
        difference: Difference to the best family, zero or above.
        difference_error: Standard error of the difference.
        weight: Stacking weight.
    """

    fit: Fit
    posterior: TailPosterior
    loo: LeaveOneOut
    error: float
    difference: float
    difference_error: float
    weight: float

    @property
    def family(self) -> Family:
        """The family."""
        return self.fit.family

    @property
    def name(self) -> str:
        """Name of the family."""
        return self.fit.family.name

    @property
    def scale(self) -> Estimate:
        """Posterior of the scale, in the units of the residuals."""
        return self.posterior.scale

    @property
    def shape(self) -> Estimate | None:
        """Posterior of the shape; None for scale families."""
        return self.posterior.shape

    @property
    def tied(self) -> bool:
        """Whether the difference to the best family is within two standard errors."""
        return self.difference <= TIE * self.difference_error


@dataclass(frozen=True, eq=False, repr=False)
class TailComparison(Brief):
    """Families of tails compared on the same residuals.

    Attributes:
        results: Results of every family, the best first.
        values: The residuals they were fitted to, ``(n,)``.
        available: Number of residuals before ``limit``.
        warnings: Reasons not to trust the numbers; empty if there are none.
        notes: Remarks on single families.
    """

    results: tuple[FamilyResult, ...]
    values: Array
    available: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> FamilyResult:
        """The family of the largest elpd."""
        return self.results[0]

    @property
    def tie_set(self) -> tuple[str, ...]:
        """Names of the families within two standard errors of the best, the best first."""
        return tuple(result.name for result in self.results if result.tied)

    @property
    def trusted(self) -> bool:
        """Whether there are no warnings."""
        return not self.warnings

    def result(self, family: str) -> FamilyResult:
        """The result of one family, by name.

        Raises:
            ValueError: If it was not fitted.
        """
        for result in self.results:
            if result.name == family:
                return result
        names = ", ".join(result.name for result in self.results)
        raise ValueError(f"`TailComparison.result({family!r})`: not fitted. Fitted: {names}.")

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """Difference ``sum_j d_j`` of the elpd of two families, and its standard error ``sqrt(n var(d))``, in nats."""
        pointwise = self.result(one).loo.pointwise - self.result(other).loo.pointwise
        return float(pointwise.sum()), math.sqrt(len(pointwise) * float(pointwise.var()))

    @property
    def verdict(self) -> str:
        """The comparison in a sentence, with its uncertainty."""
        parts = []
        for result in self.results:
            if result.family.shape is not None and result.shape is not None and result.name in self.tie_set:
                parts.append(f"{result.family.shape.symbol} = {result.shape} ({result.name})")
        if len(self.tie_set) > 1:
            parts.append(f"tied within two standard errors: {', '.join(self.tie_set)}")
        beaten = [result for result in self.results if not result.tied]
        if beaten:
            gap = with_error(beaten[0].difference, beaten[0].difference_error)
            parts.append(f"{self.best.name} over {beaten[0].name} by {gap} elpd")
        doubt = f" (not to be trusted: {'; '.join(self.warnings)})" if self.warnings else ""
        return "; ".join(parts) + doubt

    def to_dataframe(self) -> pd.DataFrame:
        """One row per family, the best first; nats, central 95 % intervals, largest Pareto k."""
        import pandas as pd

        rows = [
            {
                **interval_columns({"scale": r.scale} | ({} if r.shape is None else {"shape": r.shape})),
                "log_likelihood": r.fit.log_likelihood,
                "elpd": r.loo.elpd,
                "elpd_error": r.error,
                "difference": r.difference,
                "difference_error": r.difference_error,
                "weight": r.weight,
                "pareto_k": r.loo.pareto_k.max(),
                "tied": r.tied,
            }
            for r in self.results
        ]
        return pd.DataFrame(rows, pd.Index([r.name for r in self.results], name="family"))


def fit_tails(
    values: Values,
    families: Sequence[str] | None = None,
    *,
    limit: int | None = 2000,
    num_draws: int = 1000,
    seed: int = 0,
) -> TailComparison:
    """Fit families of tails to residuals and compare them by leave-one-out.

    Scores are expected log predictive densities of one residual given the others, by Pareto-smoothed importance
    sampling on draws of the exact posterior. Standard errors take the residuals as independent; rows of one module
    share the merged update, so that they say less than their number. Every family is centred at zero, where an expert
    wants the residual.

    Args:
        values: Signed residuals of any shape.
        families: Names; all six of ``FAMILIES`` by default.
        limit: At most so many residuals, drawn at random; None for all.
        num_draws: Number of posterior draws per family.
        seed: Seed of the draws and of the choice of residuals.

    Raises:
        ValueError: If there are too few draws.

    >>> import numpy as np
    >>> heavy = np.random.default_rng(0).standard_t(2.0, 500)
    >>> fit_tails(heavy, ["Gaussian", "Student-t", "Cauchy"]).tie_set
    ('Student-t',)
    """
    chosen = FAMILIES if families is None else families_named(families)
    if num_draws < FEWEST_DRAWS:
        raise ValueError(
            f"`fit_tails(num_draws={num_draws})`: importance sampling smooths the largest fifth of the weights. Give "
            f"{FEWEST_DRAWS} draws or more; 1000 are usual."
        )
    whole = sample_of(values)
    sample = whole.limited(limit, seed)
    fits = {family.name: maximum_likelihood(sample.values, family) for family in chosen}
    posteriors = {family.name: tail_posterior(sample.values, family) for family in chosen}
    loos = {name: _leave_one_out(sample.values, posterior, num_draws, seed) for name, posterior in posteriors.items()}
    rows = compare_leave_one_out(loos)
    results = tuple(FamilyResult(fits[name], posteriors[name], loos[name], **row) for name, row in rows.items())
    warnings, notes = _warnings(sample, results), _notes(sample, results)
    return TailComparison(results, sample.values, len(whole.values), warnings, notes)


def with_error(value: float, error: float) -> str:
    """A number and its standard error, to two digits of the error.

    >>> with_error(41.27, 9.3), with_error(-1285.1, 41.0)
    ('41.3 ± 9.3', '-1285 ± 41')
    """
    if not (0 < error < math.inf):
        return f"{value:.4g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _leave_one_out(values: Array, posterior: TailPosterior, num_draws: int, seed: int) -> LeaveOneOut:
    scales, shapes = posterior.draws(num_draws, seed)
    return leave_one_out(posterior.family.log_density(values, scales[:, None], shapes[:, None]))


def _dominated(differences: Array) -> bool:
    squares = (differences - differences.mean()) ** 2
    return bool(squares.max() > DOMINATED * squares.sum())


def _warnings(sample: Sample, results: tuple[FamilyResult, ...]) -> tuple[str, ...]:
    """Reasons to doubt the best families themselves."""
    unreliable = [r for r in results if r.tied and r.loo.unreliable]
    texts = [
        f"Pareto k above {r.loo.good_k:.2f} for {_residuals(r.loo.unreliable)} under {r.name}"
        for r in unreliable
        if r.loo.unreliable > 0.01 * len(sample.values)
    ]
    return (*sample.warnings, *texts)


def _notes(sample: Sample, results: tuple[FamilyResult, ...]) -> tuple[str, ...]:
    notes = []
    best = results[0].loo.pointwise
    close = [result for result in results[1:] if result.difference < CLEAR * result.difference_error]
    alone = [result.name for result in close if _dominated(best - result.loo.pointwise)]
    if alone:
        notes.append(f"one residual decides about {', '.join(alone)}: the standard error of that means little")
    for result in results:
        if result.loo.unreliable:
            count = result.loo.unreliable
            many = f"{count} residual{' has' if count == 1 else 's have'} Pareto k above {result.loo.good_k:.2f}"
            notes.append(f"{many} ({result.name})")
    for result in results:
        if not result.tied and result.difference < SMALL:
            notes.append(f"{result.name} is behind by less than {SMALL:g} nats, little whatever the standard error")
    return tuple(notes)


def _residuals(count: int) -> str:
    return f"{count} residual{'s' * (count > 1)}"
