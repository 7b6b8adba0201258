"""The section of a report on solver, chains and sensitivity."""

from __future__ import annotations

import numpy as np

from diagnostics.chains import ChainConvergence, CoefficientIntervals, rank_histogram
from diagnostics.plots.convergence import (
    plot_chain_traces,
    plot_contraction,
    plot_effective_sizes,
    plot_energy_traces,
    plot_expert_weights,
    plot_forest,
    plot_gamma_moves,
    plot_gamma_scores,
    plot_r_hat,
    plot_ranks,
)
from diagnostics.report.page import Block, Details, Plot, Section, Table, Text
from diagnostics.sensitivity import GammaSensitivity
from diagnostics.solver import FixedPointConvergence
from diagnostics.verdicts import Verdict
from poe_models.span_labels import MERGE


def convergence_section(
    fixed_point: FixedPointConvergence | None,
    chains: ChainConvergence | None = None,
    coefficients: CoefficientIntervals | None = None,
    around: Verdict | None = None,
    sensitivity: GammaSensitivity | None = None,
) -> Section:
    """Solver, chains and sensitivity, as far as there are results.

    Args:
        fixed_point: Convergence of the merge.
        chains: Convergence of draws.
        coefficients: Intervals of Span draws.
        around: Verdict on the distance of the draws from the merge.
        sensitivity: Sensitivity to gamma.
    """
    verdicts: list[Verdict] = [] if fixed_point is None else [*fixed_point.verdicts]
    verdicts += [] if around is None else [around]
    verdicts += [] if chains is None else chains.verdicts
    verdicts += [] if sensitivity is None else [sensitivity.verdict]
    blocks: list[Block] = [
        *([] if fixed_point is None else _solver_blocks(fixed_point)),
        *([] if chains is None else _chain_blocks(chains)),
        *([] if coefficients is None else [_coefficients(coefficients)]),
        *([] if sensitivity is None else _sensitivity_blocks(sensitivity)),
    ]
    return Section("Convergence", verdicts, blocks or [Text("Nothing was solved: every tensor was averaged or kept.")])


def _solver_blocks(result: FixedPointConvergence) -> list[Block]:
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
            "Each expert's weight over its Gaussian twin's. In a column of one colour the tails changed nothing.",
        ),
        Details("Every module's numbers", [_solver_table(result)]),
    ]


def _solver_table(result: FixedPointConvergence) -> Table:
    numbers = zip(result.steps, result.rate, result.bound, result.weight_spread, result.gradient_norm, strict=True)
    rows = [
        [
            name,
            status.name.lower().replace("_", " "),
            str(steps),
            f"{rate:.3g}",
            f"{bound:.3g}",
            f"{spread:.3g}",
            f"{g:.1e}",
        ]
        for name, status, (steps, rate, bound, spread, g) in zip(result.modules, result.status, numbers, strict=True)
    ]
    return Table("Solver", ("module", "status", "steps", "rate", "bound L", "weight spread", "gradient"), rows)


def _chain_blocks(result: ChainConvergence) -> list[Block]:
    sizes = Plot(plot_effective_sizes(result), "How many independent draws the chains are worth, quantity by quantity.")
    if not np.isfinite(result.summary.r_hat).any():
        return [sizes]
    flat = int(np.nanargmax(result.summary.r_hat))
    module, quantity = np.unravel_index(flat, result.summary.r_hat.shape)
    worst = result.values[..., module, quantity]
    names = result.modules[module], result.quantities[quantity]
    return [
        Plot(plot_r_hat(result), "Variance between chains over variance within them; above 1.01 they differ."),
        sizes,
        Plot(
            plot_ranks(rank_histogram(worst[:8], min(20, worst[:8].size))),
            f"Ranks of {names[1]} in {names[0]}, whose R-hat is the largest; flat is good.",
        ),
        Plot(plot_chain_traces(result, *names), f"Its draws, {names[1]} in {names[0]}, chain by chain."),
    ]


def _coefficients(result: CoefficientIntervals) -> Plot:
    caption = (
        "How much of each task the posterior puts into each module; a wide interval is a task it is unsure of."
        if MERGE not in result.updates
        else "What the posterior adds to the merge of each module: at the merge all are 0 but 'merge', which is 1."
    )
    return Plot(plot_forest(result), caption)


def _sensitivity_blocks(result: GammaSensitivity) -> list[Block]:
    moves = Plot(plot_gamma_moves(result), "How far the merge moves with gamma; bands reach over all modules.")
    if result.scores is None:
        return [moves]
    return [moves, Plot(plot_gamma_scores(result), "The score of the merge over gamma.")]
