"""From belief to numbers: the MAP of a product of experts, its posterior, and whole merged checkpoints.

``posterior = poe.bind(updates)`` binds a design to modules, and everything else takes the posterior, in Full or Span
coordinates: ``fixed_point(posterior)`` is its MAP, ``laplace(posterior)`` the Gaussian there, ``gibbs``,
``slice_sample`` and ``nuts`` draw from it (``gibbs(posterior, num_samples, generator=...)``), ``log_evidence``
integrates it, and ``minimize(posterior)`` serves experts that are only a function.
``merge_checkpoint(task_vectors, poe, out)`` merges a whole model, ``merge(task_vectors, poe)`` in memory,
and ``merge_adapters(task_vectors, poe, out)`` adapters into one adapter. ``reestimate_batch_norm(network, batches)``
gives a merged network running statistics of its own.

For whole models: ``collect_statistics`` makes the one pass that Span coordinates need, ``sample_full`` draws merged
updates themselves, ``MethodDraws`` are seeds of a random merging method, and a ``MergedEnsemble`` turns any of these
draws into models. Both kinds of posterior draws surround what ``merge_checkpoint`` writes, and ``distance_from_merge``
says whether they do. ``temper`` chooses the temperature, ``compare_designs`` ranks designs by their evidence
(``leave_one_expert_out`` by what the others predict), and ``hierarchical`` infers scales and tails.
"""

from inference.draws import Draws
from inference.evidence.designs import DesignEvidence, EvidenceTable, compare_designs
from inference.evidence.estimate import (
    Evidence,
    LeaveOneExpertOut,
    UntrustedEvidence,
    leave_one_expert_out,
    log_evidence,
)
from inference.gibbs import gibbs
from inference.hierarchical.sampler import HierarchicalDraws, HierarchicalModel, hierarchical
from inference.laplace import DenseLaplace, Laplace, laplace
from inference.logit_temperature import fit_ensemble_temperature, fit_logit_temperature
from inference.map import fixed_point, plain_iterates
from inference.merge_distance import MergeDistance
from inference.minimize import minimize
from inference.models.adapters import AdapterReport, merge_adapters
from inference.models.batch_norm import reestimate_batch_norm
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MemberPredictor, MergedEnsemble, Prediction, ValuePrediction
from inference.models.full_draws import RegenerationWarning, noise_control, sample_full
from inference.models.in_memory import merge
from inference.models.merge import MergeReport, merge_checkpoint, plan
from inference.models.method_design import MethodDesign
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.models.statistics_files import collect_statistics, load_statistics, save_statistics, statistics_digest
from inference.models.surrounding import distance_from_merge
from inference.models.tasks import Task
from inference.nuts import nuts
from inference.propriety import require_proper
from inference.reweighting import SolverOptions
from inference.slice import slice_sample
from inference.solution import Solution, Status
from inference.tempering import TemperaturePoint, Tempering, temper, temperature_range

__all__ = [
    "AdapterReport",
    "DenseLaplace",
    "Design",
    "DesignEvidence",
    "Draws",
    "Evidence",
    "EvidenceTable",
    "FullDraws",
    "HierarchicalDraws",
    "HierarchicalModel",
    "Laplace",
    "LeaveOneExpertOut",
    "MemberPredictor",
    "MergeDistance",
    "MergeReport",
    "MergedEnsemble",
    "MethodDesign",
    "MethodDraws",
    "ModelDraws",
    "Prediction",
    "RegenerationWarning",
    "Solution",
    "SolverOptions",
    "SpanDraws",
    "Status",
    "Task",
    "TemperaturePoint",
    "Tempering",
    "UntrustedEvidence",
    "ValuePrediction",
    "collect_statistics",
    "compare_designs",
    "distance_from_merge",
    "fit_ensemble_temperature",
    "fit_logit_temperature",
    "fixed_point",
    "gibbs",
    "hierarchical",
    "laplace",
    "leave_one_expert_out",
    "load_draws",
    "load_statistics",
    "log_evidence",
    "merge",
    "merge_adapters",
    "merge_checkpoint",
    "minimize",
    "noise_control",
    "nuts",
    "plain_iterates",
    "plan",
    "reestimate_batch_norm",
    "require_proper",
    "sample_full",
    "save_draws",
    "save_statistics",
    "slice_sample",
    "statistics_digest",
    "temper",
    "temperature_range",
]
