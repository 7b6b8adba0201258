"""The part of a report on solver, chains and sensitivity."""

from __future__ import annotations

import numpy as np

from diagnostics.chains import ChainConvergence, rank_histogram
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
from diagnostics.report.page import Block, Details, Plot, Section, Table, Text
from diagnostics.sensitivity import GammaSensitivity
from diagnostics.solver import CoefficientIntervals, FixedPointConvergence
from diagnostics.verdicts import Verdict
from poe_models.span_labels import MERGE

__all__ = ["convergence_section"]


def convergence_section(
    fixed_point: FixedPointConvergence | None,
    chains: ChainConvergence | None = None,
    coefficients: CoefficientIntervals | None = None,
    around: Verdict | None = None,
    sensitivity: GammaSensitivity | None = None,
) -> Section:
    """Solver, chains and sensitivity, as far as they are there.

    Args:
        fixed_point: Of the merge.
        chains: Of draws.
        coefficients: Of Span draws.
        around: What was found of the centre of the draws.
        sensitivity: To gamma.

    Returns:
        The section.
    """
    verdicts: list[Verdict] = []
    blocks: list[Block] = []
    if fixed_point is not None:
        verdicts += fixed_point.verdicts
        blocks += _solver_blocks(fixed_point)
    if around is not None:
        verdicts.append(around)
    if chains is not None:
        verdicts += chains.verdicts
        blocks += _chain_blocks(chains)
    if coefficients is not None:
        caption = (
            "How much of each task the posterior puts into each module; a wide interval is a task it is unsure of."
            if MERGE not in coefficients.updates
            else "What the posterior adds to the merge of each module: at the merge all are 0 but 'merge', which is 1."
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
            "Each expert's weight over its Gaussian twin's. In a column of one colour the tails changed nothing.",
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
