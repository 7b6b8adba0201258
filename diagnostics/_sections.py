"""The parts of a report, each from results that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics._page import Block, Details, Facts, Gallery, Plot, Section, Table, Text
from diagnostics.chains import ChainConvergence, rank_histogram
from diagnostics.coefficients import CoefficientIntervals
from diagnostics.convergence import FixedPointConvergence
from diagnostics.estimates import Estimate
from diagnostics.judged import JudgedPredictions
from diagnostics.plots.calibration import plot_reliability, plot_risk_coverage
from diagnostics.plots.comparison import plot_pareto, plot_radar
from diagnostics.plots.convergence import (
    plot_chain_traces,
    plot_contraction,
    plot_effective_sizes,
    plot_energy_traces,
    plot_gamma_moves,
    plot_gamma_scores,
    plot_r_hat,
    plot_ranks,
)
from diagnostics.plots.experts import plot_expert_weights, plot_forest
from diagnostics.plots.tails import (
    plot_families,
    plot_hill,
    plot_log_density,
    plot_mean_squared_residuals,
    plot_quantiles,
    plot_residual_histogram,
)
from diagnostics.residuals import Residuals
from diagnostics.sensitivity import GammaSensitivity
from diagnostics.tails import TailComparison, hill, log_density, quantiles
from diagnostics.tails.comparison import with_error
from diagnostics.tails.pooled import PooledTails
from diagnostics.verdicts import Level, Verdict
from inference._folder import rounding_of, short_source

__all__ = ["calibration_section", "comparison_section", "convergence_section", "merge_section", "tails_section"]

EXPERT = "expert "
CENTRED = 0.1
"""Robust scales up to which an offset of the residuals is none."""
MOST_DIAGRAMS, MOST_CURVES = 8, 7
ROUNDED_BACK = 0.1
"""Share of the changed weights that rounding may take back before it is worth a warning."""
ACTIONS = {"merge": "merged", "average": "averaged", "base": "the base's"}


def merge_section(record: Mapping[str, Any]) -> Section:
    """What was merged, from what, by which design.

    Args:
        record: the contents of `poe_merge.json`.

    Returns:
        The section.

    Raises:
        ValueError: the record is not one of a merge.
    """
    try:
        return _merge_section(record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"`merge_section(...)`: not the record of a merge ({type(error).__name__}: {error}). Give the contents of "
            "a `poe_merge.json`."
        ) from error


def _merge_section(record: Mapping[str, Any]) -> Section:
    tensors, inputs = record["tensors"], record["inputs"]
    experts = {role.removeprefix(EXPERT): entry for role, entry in inputs.items() if role.startswith(EXPERT)}
    actions = Counter(ACTIONS[tensor["action"]] for tensor in tensors)
    entries = {word: sum(int(t["numel"]) for t in tensors if ACTIONS[t["action"]] == word) for word in actions}
    facts = [
        ("Base", short_source(str(inputs["base"]["source"]))),
        *((f"Expert {name}", text) for name, text in zip(experts, _sources(experts.values()), strict=True)),
        ("Tensors", ", ".join(f"{n} {action}" for action, n in actions.items())),
        ("Parameters", ", ".join(f"{n:,} {action}" for action, n in entries.items())),
        ("Computed in", f"{record['compute_dtype']} on {record['device']}, seed {record['seed']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    blocks: list[Block] = [
        Facts(facts),
        *(_design_table(index, design, len(record["designs"])) for index, design in enumerate(record["designs"])),
        Details("Treatment of each tensor", [_treatments(tensors)]),
        Details("Digests of the inputs", [_digests(inputs)]),
    ]
    return Section("What was merged", _rounding(tensors), blocks)


def _sources(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Short names of the experts' sources, with the folder where they would be the same."""
    sources = [str(entry["source"]) for entry in entries]
    short = [short_source(source) for source in sources]
    if len(set(short)) == len(short):
        return short
    return ["/".join(Path(source).parts[-2:]) for source in sources]


def _design_table(index: int, design: Mapping[str, Any], count: int) -> Table:
    anchor = design["anchor"]
    center = "the base" if anchor["center"] is None else short_source(str(anchor["center"]))
    name = "Design" if count == 1 else f"Design {index + 1}"
    caption = (
        f"{name}: anchor {anchor['precision']} around {center}, temperature {design['temperature']:g}, lambda "
        f"{design['scaling']:g}, {design['coordinates']} coordinates"
    )
    rows = [
        [str(expert[key]) for key in ("name", "residual_map", "energy", "scale")] + [f"{expert['importance']:g}"]
        for expert in design["experts"]
    ]
    return Table(caption, ("expert", "residual map", "energy", "scale", "importance"), rows)


def _treatments(tensors: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            str(t["tensor"]),
            "x".join(map(str, t["shape"])),
            ACTIONS[t["action"]],
            str(t["view"] or ""),
            str(t["reason"]),
        ]
        for t in tensors
    ]
    return Table("Tensors", ("tensor", "shape", "treatment", "seen as", "reason"), rows)


def _digests(inputs: Mapping[str, Any]) -> Table:
    rows = [
        [str(role), str(file), str(digest)]
        for role, entry in inputs.items()
        for file, digest in entry.get("sha256", {}).items()
    ]
    return Table("Sha256 of the inputs", ("input", "file", "sha256"), rows)


def _rounding(tensors: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    updated, back = rounding_of(tensors)
    if not updated:
        return []
    share = back / updated
    text = f"rounding to the output's dtype left {share:.1%} of the {updated:,} changed weights at the base's value"
    if share <= ROUNDED_BACK:
        return [Verdict("rounding", Level.GOOD, f"{text}.")]
    return [Verdict("rounding", Level.CAUTION, f"{text}: write float32, or raise lambda.")]


def convergence_section(
    fixed_point: FixedPointConvergence | None,
    chains: ChainConvergence | None = None,
    coefficients: CoefficientIntervals | None = None,
    sensitivity: GammaSensitivity | None = None,
) -> Section:
    """Solver, chains and sensitivity, as far as they are there.

    Args:
        fixed_point: of the merge.
        chains: of draws.
        coefficients: of Span draws.
        sensitivity: to gamma.

    Returns:
        The section.
    """
    verdicts: list[Verdict] = []
    blocks: list[Block] = []
    if fixed_point is not None:
        verdicts += fixed_point.verdicts
        blocks += _solver_blocks(fixed_point)
    if chains is not None:
        verdicts += chains.verdicts
        blocks += _chain_blocks(chains)
    if coefficients is not None:
        caption = (
            "How much of each task the posterior puts into each module; a wide interval is a task it is unsure of."
        )
        blocks.append(Plot(plot_forest(coefficients), caption))
    if sensitivity is not None:
        verdicts.append(sensitivity.verdict)
        blocks.append(
            Plot(plot_gamma_moves(sensitivity), "How far the merge moves with gamma; bands reach over all modules.")
        )
        if sensitivity.scores is not None:
            blocks.append(Plot(plot_gamma_scores(sensitivity), "The score of the merge over gamma."))
    return Section("Convergence", verdicts, blocks or [Text("Nothing was solved: every tensor was averaged or kept.")])


def _solver_blocks(result: FixedPointConvergence) -> list[Block]:
    rows = [
        [
            name,
            str(status.name).lower().replace("_", " "),
            str(steps),
            f"{rate:.3g}",
            f"{bound:.3g}",
            f"{spread:.3g}",
            f"{g:.1e}",
        ]
        for name, status, steps, rate, bound, spread, g in zip(
            result.modules,
            result.status,
            result.steps,
            result.rate,
            result.bound,
            result.weight_spread,
            result.gradient_norm,
            strict=True,
        )
    ]
    header = ("module", "status", "steps", "rate", "bound L", "weight spread", "gradient")
    return [
        Plot(
            plot_energy_traces(result),
            "Energy after each reweighted solve, above its final value. Straight lines down are linear convergence.",
        ),
        Plot(
            plot_contraction(result),
            "How much a plain step contracts at the solution. L bounds the exact rate; below 1 it proves contraction.",
        ),
        Plot(
            plot_expert_weights(result),
            "Each expert's weight over its Gaussian twin's. Equal columns: the tails changed nothing between experts.",
        ),
        Details("Every module's numbers", [Table("Solver", header, rows)]),
    ]


def _chain_blocks(result: ChainConvergence) -> list[Block]:
    blocks: list[Block] = [
        Plot(plot_effective_sizes(result), "How many independent draws the chains are worth, quantity by quantity.")
    ]
    if not np.isfinite(result.statistics.r_hat).any():
        return blocks
    flat = int(np.nanargmax(result.statistics.r_hat))
    module, quantity = np.unravel_index(flat, result.statistics.r_hat.shape)
    worst = result.values[..., module, quantity]
    names = result.modules[module], result.quantities[quantity]
    return [
        Plot(plot_r_hat(result), "Variance between chains over variance within them; above 1.01 they differ."),
        *blocks,
        Plot(
            plot_ranks(rank_histogram(worst[:8], min(20, worst[:8].size))),
            f"Ranks of {names[1]} in {names[0]}, whose R-hat is the largest; flat is good.",
        ),
        Plot(plot_chain_traces(result, *names), f"Its draws, {names[1]} in {names[0]}, chain by chain."),
    ]


def calibration_section(result: JudgedPredictions) -> Section:
    """Every method's scores by task, reliability diagrams, and selective prediction.

    Args:
        result: of `judge`.

    Returns:
        The section.
    """
    note = (
        "Brackets are 95 % bootstrap intervals over examples. ECE has 20 bins; the last column is what it would be for "
        "predictions as sure as these if they were calibrated, which is not zero."
    )
    blocks: list[Block] = [Text(note), *(_score_table(result, task) for task in result.tasks)]
    shown = list(result.reliability.items())[:MOST_DIAGRAMS]
    caption = "all tasks together: below the diagonal it is too sure."
    blocks.append(Gallery([Plot(plot_reliability(curve, method), f"{method}, {caption}") for method, curve in shown]))
    if len(shown) < len(result.reliability):
        blocks.append(Text(f"Diagrams of the first {len(shown)} of {len(result.reliability)} methods are shown."))
    curves = dict(list(result.selective.items())[:MOST_CURVES])
    caption = (
        "Error rate among the examples each method is surest of, all tasks together; AURC is the area, lower is better."
    )
    if len(curves) < len(result.selective):
        caption += f" The first {len(curves)} of {len(result.selective)} methods."
    return Section("Calibration", result.verdicts, [*blocks, Plot(plot_risk_coverage(curves), caption)])


def comparison_section(result: JudgedPredictions) -> Section:
    """Methods side by side: means and worst tasks, ranks, the Pareto front, accuracies by task.

    Args:
        result: of `judge`.

    Returns:
        The section.
    """
    found = result.comparison
    header = ("method", "accuracy", "worst task", "", "normalised", "NLL, nats", "Brier", "ECE", "rank", "on the front")
    rows = [
        [
            each.method,
            _interval(each.accuracy),
            _interval(each.worst),
            each.worst_task,
            "" if each.normalised is None else _interval(each.normalised),
            *(_interval(score) for score in (each.nll, each.brier, each.ece)),
            f"{each.rank.value:.2f}",
            f"{each.front:.0%}",
        ]
        for each in found.summaries()
    ]
    caption = (
        "Means over tasks. Normalised: accuracy over the own expert's. Rank by accuracy, mean over tasks. On the "
        "front: share of resamples in which no other method is both as accurate and as well calibrated."
    )
    pareto = "Accuracy against calibration with 95 % intervals; below and to the right is better."
    blocks: list[Block] = [Table(caption, header, rows), Plot(plot_pareto(found), pareto)]
    if len(found.tasks) >= 3:
        blocks.append(Plot(plot_radar(found), "Accuracy of the first seven methods on each task; outwards is better."))
    return Section("Comparison", [result.winner], blocks)


def _score_table(result: JudgedPredictions, task: str) -> Table:
    columns = ("accuracy", "nll", "brier", "ece", "ece_if_calibrated")
    rows = [
        [method, *(_interval(by_task[task].scores[name]) for name in columns)]
        for method, by_task in result.calibrations.items()
    ]
    size = next(iter(result.calibrations.values()))[task].num_examples
    return Table(
        f"{task}, {size} examples", ("method", "accuracy", "NLL, nats", "Brier", "ECE", "ECE if calibrated"), rows
    )


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def tails_section(residuals: Residuals | None, tails: PooledTails | None) -> Section:
    """Residuals of the merge, and their tails beside the null controls.

    Args:
        residuals: of the merge.
        tails: of the residuals.

    Returns:
        The section.
    """
    verdicts: list[Verdict] = []
    blocks: list[Block] = []
    if tails is not None:
        verdicts, blocks = _tail_verdicts(tails), _tail_blocks(tails)
    if residuals is not None:
        caption = "What is left of the experts' wishes, module by module; 1 is what merging nothing would leave."
        blocks += [Plot(plot_mean_squared_residuals({"this merge": residuals}), caption), _residual_table(residuals)]
    return Section("Residuals and their tails", verdicts, blocks)


def _tail_verdicts(tails: PooledTails) -> list[Verdict]:
    fits = (("tails, pooled", tails.pooled), ("tails within modules", tails.standardised))
    named = (*fits, ("null control", tails.null))
    return [
        Verdict("offset", Level.NOTE, _offset(tails.offset)),
        *(Verdict(about, Level.UNKNOWN if each.warnings else Level.NOTE, f"{each.verdict}.") for about, each in named),
        *(Verdict(about, Level.CAUTION, f"{'; '.join(fit.notes)}.") for about, fit in fits if fit.notes),
    ]


def _offset(offset: float) -> str:
    if abs(offset) < CENTRED:
        return "the residuals of a module and expert lie around zero."
    where = "short of" if offset < 0 else "beyond"
    return f"the merge goes {where} the experts by {abs(offset):.2g} robust scales in the median module and expert."


def _tail_blocks(tails: PooledTails) -> list[Block]:
    pooled, own = tails.pooled, tails.standardised
    shown = [own.result(name).fit for name in dict.fromkeys((own.best.name, "Gaussian"))]
    note = (
        "Pooling modules of different size makes a heavy tail out of Gaussians: read the pooled fit beside the one "
        "within modules (each residual less the location and over the robust scale of its module and expert), the "
        "simulated Gaussians, and the null control."
    )
    densities = [log_density(each.values, [result.fit for result in each.results]) for each in (pooled, own)]
    return [
        Text(note),
        _family_table("Pooled residuals, in units of the experts' scales", pooled),
        _family_table("Residuals within modules", own),
        _family_table(
            "Simulated Gaussians with the location and scale of each module and expert, pooled", tails.simulated
        ),
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
