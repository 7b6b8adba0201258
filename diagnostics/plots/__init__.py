"""Figures: each function draws a computed result into the axes it is given, or into new ones, and returns them.

Series differ in colour, line and marker together: figures can be read by the colour-blind and in black and white.

>>> from diagnostics.tails import hill
>>> import numpy as np
>>> axes = plot_hill(hill(np.random.default_rng(0).standard_cauchy(500)))
>>> axes.get_ylabel()
'tail index'

| function | draws | counterpart |
|---|---|---|
| ``plot_residual_histogram`` | residuals with densities of ``fit_tails`` | [PoE] Figures 1, 5 |
| ``plot_log_density`` | the same as log densities, of ``log_density`` | [PoE] Figures 1, 5, 6 |
| ``plot_mean_squared_residuals`` | squared ``residuals`` by module and method | [PoE] Figure 2 |
| ``plot_energy_traces`` | energy along the fixed point, of ``fixed_point_convergence`` | [PoE] Figure 3 |
| ``plot_contraction`` | contraction rate and the bound L by module, of the same | [PoE] Figure 4 |
| ``plot_gamma_scores``, ``plot_gamma_moves`` | the merge over gamma, of ``gamma_sensitivity`` | [PoE] Figure 7 |
| ``plot_alignment`` | cosines of updates with tasks' moments, of ``gram_alignment`` | [BMM] Figure 2 |
| ``plot_search`` | best score of searches along their trials, of ``search`` | [BMM] Figure 3 |
| ``plot_pareto`` | accuracy against ECE with the front, of ``compare_methods`` | [BMM] Figure 4 |
"""

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
from diagnostics.plots.experts import plot_alignment, plot_expert
from diagnostics.plots.predictions import (
    plot_corruptions,
    plot_pareto,
    plot_radar,
    plot_reliability,
    plot_risk_coverage,
)
from diagnostics.plots.search import plot_search
from diagnostics.plots.tails import (
    plot_families,
    plot_hill,
    plot_log_density,
    plot_mean_squared_residuals,
    plot_quantiles,
    plot_residual_histogram,
)

__all__ = [
    "plot_alignment",
    "plot_chain_traces",
    "plot_contraction",
    "plot_corruptions",
    "plot_effective_sizes",
    "plot_energy_traces",
    "plot_expert",
    "plot_expert_weights",
    "plot_families",
    "plot_forest",
    "plot_gamma_moves",
    "plot_gamma_scores",
    "plot_hill",
    "plot_log_density",
    "plot_mean_squared_residuals",
    "plot_pareto",
    "plot_quantiles",
    "plot_r_hat",
    "plot_radar",
    "plot_ranks",
    "plot_reliability",
    "plot_residual_histogram",
    "plot_risk_coverage",
    "plot_search",
]
