"""The section of a report on residuals and their tails."""

from __future__ import annotations

import numpy as np

from diagnostics.plots.tails import (
    plot_families,
    plot_hill,
    plot_log_density,
    plot_mean_squared_residuals,
    plot_quantiles,
    plot_residual_histogram,
)
from diagnostics.report.page import Block, Plot, Section, Table, Text
from diagnostics.residuals import Residuals
from diagnostics.tails import TailComparison, hill, log_density, quantiles
from diagnostics.tails.comparison import with_error
from diagnostics.tails.pooled import NO_SURROGATES, PooledTails
from diagnostics.tails.samples import TRUSTED
from diagnostics.verdicts import Level, Verdict

SURROGATE = "Residuals within modules of the same merge of Gaussian updates"
CENTRED = 0.1
"""Robust scales up to which an offset of the residuals is none."""


def tails_section(residuals: Residuals | None, tails: PooledTails | None, measured: str = "") -> Section:
    """Residuals of the merge, and their tails beside the null control; ``measured`` says by which map."""
    verdicts: list[Verdict] = []
    blocks: list[Block] = [Text(measured)] if measured else []
    if tails is not None:
        verdicts = _tail_verdicts(tails)
        blocks += _tail_blocks(tails)
    if residuals is not None:
        caption = "Squared residual of the experts, module by module, relative to its value if nothing were merged."
        blocks += [Plot(plot_mean_squared_residuals({"this merge": residuals}), caption), _residual_table(residuals)]
    return Section("Residuals and their tails", verdicts, blocks)


def _tail_verdicts(tails: PooledTails) -> list[Verdict]:
    fits = (("tails, pooled", tails.pooled), ("tails within modules", tails.standardised))
    count = len(tails.pooled.values)
    if count < TRUSTED:  # whatever else is said follows from that
        few = f"only {count} residuals, fewer than {TRUSTED}: neither the fits nor the null control are to be trusted."
        return [Verdict("tails", Level.UNKNOWN, few), Verdict("offset", Level.NOTE, _offset(tails.offset))]
    return [
        _null_verdict(tails),
        Verdict("offset", Level.NOTE, _offset(tails.offset)),
        *(Verdict(about, Level.UNKNOWN if each.warnings else Level.NOTE, f"{each.verdict}.") for about, each in fits),
        *(Verdict(about, Level.CAUTION, f"{'; '.join(fit.notes)}.") for about, fit in fits if fit.notes),
    ]


def _null_verdict(tails: PooledTails) -> Verdict:
    if tails.null is None:
        return Verdict("null control", Level.NOTE, f"{NO_SURROGATES}.")
    return Verdict("null control", Level.UNKNOWN if tails.null.warnings else Level.NOTE, f"{tails.null.verdict}.")


def _offset(offset: float) -> str:
    if abs(offset) < CENTRED:
        return "the residuals of a module and expert lie around zero."
    where = "short of" if offset < 0 else "beyond"
    return f"the merge goes {where} the experts by {abs(offset):.2g} robust scales in the median module and expert."


def _tail_blocks(tails: PooledTails) -> list[Block]:
    pooled, own = tails.pooled, tails.standardised
    shown = [own.result(name).fit for name in dict.fromkeys((own.best.name, "Gaussian"))]
    note = (
        "Pooling modules of different size makes a heavy tail out of Gaussians, and rows of different size within a "
        "module do so, too. Read the fits (within modules: each residual less the location and over the robust scale "
        "of its module and expert) beside the null control, the same merge of Gaussian updates with the row and "
        "column sizes of the real ones, and the same fit to what that leaves."
    )
    surrogate = [] if tails.surrogate is None else [_family_table(SURROGATE, tails.surrogate)]
    densities = [log_density(each.values, [result.fit for result in each.results]) for each in (pooled, own)]
    return [
        Text(note),
        _family_table("Pooled residuals, in units of the experts' scales", pooled),
        _family_table("Residuals within modules", own),
        *surrogate,
        Plot(plot_residual_histogram(pooled), "Pooled residuals with fitted densities."),
        Plot(plot_log_density(densities[0]), "The same as log densities: a Gaussian is a parabola."),
        Plot(plot_log_density(densities[1]), "Within modules: what is left of the tail."),
        Plot(
            plot_quantiles([quantiles(own.values, fit) for fit in shown]), "Within modules, against fitted quantiles."
        ),
        Plot(
            plot_hill(hill(own.values)),
            "Within modules, the tail index; a Student-t's is its nu, a Gaussian's keeps growing to the left.",
        ),
        Plot(
            plot_families(own),
            "Within modules, how much worse each family predicts a left-out residual; filled: tied with the best.",
        ),
    ]


def _family_table(caption: str, result: TailComparison) -> Table:
    rows = [
        [
            each.name,
            str(each.scale),
            "" if each.shape is None or each.family.shape is None else f"{each.family.shape.symbol} = {each.shape}",
            with_error(each.loo.elpd, each.error),
            with_error(each.difference, each.difference_error) if each.difference else "0",
            f"{each.weight:.2f}",
            f"{each.loo.pareto_k.max():.2f}",
            "yes" if each.tied else "",
        ]
        for each in result.results
    ]
    header = ("family", "scale", "shape", "elpd, nats", "behind the best", "weight", "Pareto k", "tied")
    return Table(f"{caption}: {len(result.values)} of {result.available}", header, rows)


def _residual_table(residuals: Residuals) -> Table:
    rows = []
    for name, part in residuals.split("expert").items():
        left, weights = part.mean_squared("own"), part.weights()
        if not np.isfinite(weights).any():
            rows.append([name, "", "", "", "silent"])
            continue
        numbers = (np.nanmedian(left), np.nanmin(weights), np.nanmedian(weights), np.nanmax(weights))
        rows.append([name, *(f"{number:.3f}" for number in numbers)])
    header = ("expert", "residual left", "least weight", "median", "most")
    caption = (
        "Each expert over all modules: median share of its squared residual that is left, and its weight relative to "
        "its Gaussian twin's"
    )
    return Table(caption, header, rows)
