"""Are the numbers any good: residuals and their tails, calibration, convergence, comparison, figures and a report.

``residuals`` and ``pooled_tails`` say which tail fits; ``calibration``, ``risk_coverage`` and ``detect_shift`` what the
predictions are worth; ``fixed_point_convergence`` and ``chain_convergence`` whether solver and samplers did their work;
``compare_methods`` which merge is better, with intervals. ``diagnostics.plots`` draws each result, ``report`` puts them
on one page (as ``poe-merge diagnose`` does), and ``to_inference_data`` hands draws to ArviZ.

>>> from diagnostics import fit_tails
>>> import numpy as np
>>> fit_tails(np.random.default_rng(0).standard_cauchy(300), seed=0).best.name
'Cauchy'
"""

from diagnostics.arviz_adapter import TooFewDraws, to_inference_data
from diagnostics.chains import ChainConvergence, Ranks, chain_convergence, rank_histogram, surround_verdict
from diagnostics.estimates import Estimate, bootstrap, bootstrap_mean, bootstrap_samples
from diagnostics.predictions.agreement import pareto_front, rank_agreement
from diagnostics.predictions.calibration import (
    Calibration,
    LogitScaling,
    calibration,
    calibration_difference,
    scale_logits,
)
from diagnostics.predictions.comparison import Comparison, MethodSummary, compare_methods
from diagnostics.predictions.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from diagnostics.predictions.files import Predictions, load_predictions, predictions_of, save_predictions
from diagnostics.predictions.reliability import BrierParts, Reliability, brier_parts, reliability
from diagnostics.predictions.selective import RiskCoverage, aurc_difference, risk_coverage
from diagnostics.predictions.shift import (
    Corrupted,
    ShiftComparison,
    ShiftDetection,
    auroc,
    compare_detection,
    detect_shift,
    point_prediction,
    under_corruption,
)
from diagnostics.predictions.soft_labels import SoftLabelScores, soft_label_scores
from diagnostics.report.evaluation import OWN_EXPERTS, JudgedPredictions, judge
from diagnostics.report.report import Page, report
from diagnostics.residual_sets import ExpertResiduals, Residuals
from diagnostics.residuals import Experts, module_residuals, residuals
from diagnostics.sensitivity import GammaSensitivity, gamma_sensitivity, with_gamma
from diagnostics.solver import (
    CoefficientIntervals,
    FixedPointConvergence,
    coefficient_intervals,
    fixed_point_convergence,
    solution_records,
)
from diagnostics.tails import (
    FamilyResult,
    Fit,
    Hill,
    LogDensity,
    NullControl,
    PooledTails,
    Quantiles,
    Surrogates,
    TailComparison,
    TailDraws,
    TailPosterior,
    fit_tails,
    hill,
    log_density,
    maximum_likelihood,
    null_control,
    nuts_posterior,
    pooled_tails,
    quantiles,
    surrogate_residuals,
    tail_posterior,
    tail_program,
    tails_by,
)
from diagnostics.verdicts import Level, Verdict, worst

__all__ = [
    "CORRUPTIONS",
    "OWN_EXPERTS",
    "SEVERITIES",
    "BrierParts",
    "Calibration",
    "ChainConvergence",
    "CoefficientIntervals",
    "Comparison",
    "Corrupted",
    "Corruption",
    "Estimate",
    "ExpertResiduals",
    "Experts",
    "FamilyResult",
    "Fit",
    "FixedPointConvergence",
    "GammaSensitivity",
    "Hill",
    "JudgedPredictions",
    "Level",
    "LogDensity",
    "LogitScaling",
    "MethodSummary",
    "NullControl",
    "Page",
    "PooledTails",
    "Predictions",
    "Quantiles",
    "Ranks",
    "Reliability",
    "Residuals",
    "RiskCoverage",
    "ShiftComparison",
    "ShiftDetection",
    "SoftLabelScores",
    "Surrogates",
    "TailComparison",
    "TailDraws",
    "TailPosterior",
    "TooFewDraws",
    "Verdict",
    "aurc_difference",
    "auroc",
    "bootstrap",
    "bootstrap_mean",
    "bootstrap_samples",
    "brier_parts",
    "calibration",
    "calibration_difference",
    "chain_convergence",
    "coefficient_intervals",
    "compare_detection",
    "compare_methods",
    "corrupt",
    "detect_shift",
    "fit_tails",
    "fixed_point_convergence",
    "gamma_sensitivity",
    "hill",
    "judge",
    "load_predictions",
    "log_density",
    "maximum_likelihood",
    "module_residuals",
    "null_control",
    "nuts_posterior",
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
    "soft_label_scores",
    "solution_records",
    "surrogate_residuals",
    "surround_verdict",
    "tail_posterior",
    "tail_program",
    "tails_by",
    "to_inference_data",
    "under_corruption",
    "with_gamma",
    "worst",
]
