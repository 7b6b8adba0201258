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
from diagnostics.predictions.agreement import pareto_front, rank_agreement
from diagnostics.predictions.calibration import calibration, calibration_difference, scale_logits
from diagnostics.predictions.comparison import compare_methods
from diagnostics.predictions.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from diagnostics.predictions.evaluation import OWN_EXPERTS, evaluate_predictions
from diagnostics.predictions.files import load_predictions, predictions_of, save_predictions
from diagnostics.predictions.functional_score import functional_score
from diagnostics.predictions.metrics import METRICS, Metric
from diagnostics.predictions.model_divergence import divergence_of_models
from diagnostics.predictions.model_scores import evaluate
from diagnostics.predictions.reliability import reliability
from diagnostics.predictions.selective import risk_coverage
from diagnostics.predictions.shift import auroc, compare_detection, detect_shift, point_prediction, under_corruption
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
    "to_inference_data",
    "under_corruption",
    "with_gamma",
]
