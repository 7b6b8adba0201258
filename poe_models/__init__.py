"""What is merged and what is believed about it.

A merge starts from :class:`TaskVectors` (a base checkpoint and its fine-tunes). What each fine-tune claims about the
merged update is an :class:`Expert`: a residual map, an energy and a scale. Their product, with an anchor, becomes a
:class:`Posterior` once it meets the updates; ``program`` writes the same posterior in Pyro.
"""

from poe_models.adapters import LoraCheckpoint
from poe_models.anchors import METHODS, Average, MergingMethod, MetaGPT, ModuleBatch, TaskArithmetic, TaskData, average
from poe_models.checkpoints import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from poe_models.collecting import collect_activations, collect_fisher
from poe_models.energies import (
    ENERGIES,
    Cauchy,
    Custom,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    StudentT,
    Welsch,
)
from poe_models.experts import Anchor, Expert, FactorExpert, ProductOfExperts
from poe_models.module_statistics import ModuleStatistics, open_statistics
from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import Posterior, full_posterior
from poe_models.program import log_density, program
from poe_models.residual_maps import (
    RESIDUAL_MAPS,
    Activation,
    Directional,
    Fisher,
    Identity,
    InputGram,
    Mixed,
    OutputGram,
    ResidualMap,
)
from poe_models.scales import (
    PRECISIONS,
    SCALES,
    Absolute,
    AbsolutePrecision,
    AnchorPrecision,
    NormScaled,
    Relative,
    RelativePrecision,
    Scale,
)
from poe_models.span import SpanCoordinates, SpanStatistics, span_posterior, span_statistics, stored_center
from poe_models.task_vectors import ModuleUpdates, TaskVectors
from poe_models.treatments import DEFAULT_RULES, Rule, RuleTable, Treatment
from poe_models.views import View

__all__ = [
    "DEFAULT_RULES",
    "ENERGIES",
    "METHODS",
    "PRECISIONS",
    "RESIDUAL_MAPS",
    "SCALES",
    "Absolute",
    "AbsolutePrecision",
    "Activation",
    "Anchor",
    "AnchorPrecision",
    "Average",
    "Cauchy",
    "Checkpoint",
    "CheckpointError",
    "Custom",
    "Diagonal",
    "Directional",
    "Energy",
    "Expert",
    "FactorExpert",
    "Fisher",
    "Gaussian",
    "GeneralizedGaussian",
    "Gram",
    "Huber",
    "Identity",
    "InputGram",
    "LoraCheckpoint",
    "MergingMethod",
    "MetaGPT",
    "Mixed",
    "ModuleBatch",
    "ModuleStatistics",
    "ModuleUpdates",
    "NormScaled",
    "Operator",
    "OutputGram",
    "Posterior",
    "ProductOfExperts",
    "RankOne",
    "Relative",
    "RelativePrecision",
    "ResidualMap",
    "Rule",
    "RuleTable",
    "Scale",
    "ScaledIdentity",
    "SpanCoordinates",
    "SpanStatistics",
    "StudentT",
    "TaskArithmetic",
    "TaskData",
    "TaskVectors",
    "TensorInfo",
    "Treatment",
    "View",
    "Welsch",
    "average",
    "collect_activations",
    "collect_fisher",
    "full_posterior",
    "log_density",
    "open_checkpoint",
    "open_statistics",
    "program",
    "span_posterior",
    "span_statistics",
    "stored_center",
]
