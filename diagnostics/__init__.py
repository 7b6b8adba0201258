"""Diagnostics of merges: residuals and their tails, calibration, convergence, comparison, figures and a report.

``residuals`` and ``pooled_tails`` fit the tails of a merge's residuals; ``calibration``, ``risk_coverage`` and
``detect_shift`` score predictions, ``evaluate`` runs models on tasks and ``compare_methods`` compares predictions;
``fixed_point_convergence`` and ``chain_convergence`` judge solver and samplers. Results print in a few lines, have
verdicts or warnings where they can be wrong, and tables have ``to_dataframe()``. ``diagnostics.plots`` draws each
result, ``report`` puts them on one page (as ``poe-merge diagnose`` does), and ``to_inference_data`` converts draws for
ArviZ. The classes of results are in the modules of the functions that make them.

>>> from diagnostics import fit_tails
>>> import numpy as np
>>> fit_tails(np.random.default_rng(0).standard_cauchy(300), seed=0).best.name
'Cauchy'
"""

from diagnostics.alignment import gram_alignment
from diagnostics.arviz_adapter import TooFewDraws, to_inference_data
from diagnostics.chains import chain_convergence, coefficient_intervals, rank_histogram, surround_verdict
from diagnostics.estimates import Estimate, bootstrap
from diagnostics.predictions import (
    CORRUPTIONS,
    METRICS,
    OWN_EXPERTS,
    SEVERITIES,
    Metric,
    auroc,
    calibration,
    calibration_difference,
    compare_detection,
    compare_methods,
    corrupt,
    detect_shift,
    divergence_of_models,
    evaluate,
    evaluate_predictions,
    functional_score,
    load_predictions,
    pareto_front,
    point_prediction,
    predictions_of,
    rank_agreement,
    reliability,
    risk_coverage,
    save_predictions,
    scale_logits,
    under_corruption,
)
from diagnostics.report.report import report
from diagnostics.residuals import module_residuals, residuals
from diagnostics.sensitivity import gamma_sensitivity, with_gamma
from diagnostics.solver import fixed_point_convergence, solution_records
from diagnostics.tails import (
    fit_tails,
    hill,
    log_density,
    maximum_likelihood,
    null_control,
    pooled_tails,
    quantiles,
    surrogate_residuals,
    tail_posterior,
    tails_by,
)
from diagnostics.verdicts import Level, Verdict

__all__ = [
    "CORRUPTIONS",
    "METRICS",
    "OWN_EXPERTS",
    "SEVERITIES",
    "Estimate",
    "Level",
    "Metric",
    "TooFewDraws",
    "Verdict",
    "auroc",
    "bootstrap",
    "calibration",
    "calibration_difference",
    "chain_convergence",
    "coefficient_intervals",
    "compare_detection",
    "compare_methods",
    "corrupt",
    "detect_shift",
    "divergence_of_models",
    "evaluate",
    "evaluate_predictions",
    "fit_tails",
    "fixed_point_convergence",
    "functional_score",
    "gamma_sensitivity",
    "gram_alignment",
    "hill",
    "load_predictions",
    "log_density",
    "maximum_likelihood",
    "module_residuals",
    "null_control",
    "pareto_front",
    "point_prediction",
    "pooled_tails",
    "predictions_of",
    "quantiles",
    "rank_agreement",
    "rank_histogram",
    "reliability",
    "report",
    "residuals",
    "risk_coverage",
    "save_predictions",
    "scale_logits",
    "solution_records",
    "surrogate_residuals",
    "surround_verdict",
    "tail_posterior",
    "tails_by",
    "to_inference_data",
    "under_corruption",
    "with_gamma",
]
