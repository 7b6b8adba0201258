"""Class probabilities scored: calibration, selective prediction, shift, and methods compared on the same examples.

Every number is an :class:`~diagnostics.estimates.Estimate` with a bootstrap interval over examples, by an explicit
seed. ``evaluate`` runs models on tasks and scores them; ``evaluate_predictions`` is about a file of predictions
(``load_predictions``) of several methods on several tasks.
"""

from diagnostics.predictions.agreement import pareto_front, rank_agreement
from diagnostics.predictions.calibration import (
    Calibration,
    LogitScaling,
    calibration,
    calibration_difference,
    scale_logits,
)
from diagnostics.predictions.comparison import Comparison, compare_methods
from diagnostics.predictions.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from diagnostics.predictions.evaluation import OWN_EXPERTS, Evaluation, evaluate_predictions
from diagnostics.predictions.files import Predictions, load_predictions, predictions_of, save_predictions
from diagnostics.predictions.functional_score import FunctionalScore, functional_score
from diagnostics.predictions.metrics import METRICS, Metric
from diagnostics.predictions.model_divergence import divergence_of_models
from diagnostics.predictions.model_scores import ModelScores, evaluate
from diagnostics.predictions.reliability import Reliability, reliability
from diagnostics.predictions.selective import RiskCoverage, risk_coverage
from diagnostics.predictions.shift import (
    Corrupted,
    CorruptionScores,
    ShiftComparison,
    ShiftDetection,
    auroc,
    compare_detection,
    detect_shift,
    point_prediction,
    under_corruption,
)

__all__ = [
    "CORRUPTIONS",
    "METRICS",
    "OWN_EXPERTS",
    "SEVERITIES",
    "Calibration",
    "Comparison",
    "Corrupted",
    "Corruption",
    "CorruptionScores",
    "Evaluation",
    "FunctionalScore",
    "LogitScaling",
    "Metric",
    "ModelScores",
    "Predictions",
    "Reliability",
    "RiskCoverage",
    "ShiftComparison",
    "ShiftDetection",
    "auroc",
    "calibration",
    "calibration_difference",
    "compare_detection",
    "compare_methods",
    "corrupt",
    "detect_shift",
    "divergence_of_models",
    "evaluate",
    "evaluate_predictions",
    "functional_score",
    "load_predictions",
    "pareto_front",
    "point_prediction",
    "predictions_of",
    "rank_agreement",
    "reliability",
    "risk_coverage",
    "save_predictions",
    "scale_logits",
    "under_corruption",
]
