"""What is merged and what is believed about it.

A merge starts from :class:`TaskVectors` (a base checkpoint and its fine-tunes). What each fine-tune claims about the
merged update is an :class:`Expert`: a residual map, an energy and a scale. Their product, with an anchor, becomes a
:class:`Posterior` once it meets the updates; ``program`` writes the same posterior in Pyro.
"""

from poe_models.adapters import LoraCheckpoint
from poe_models.checkpoints import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
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
from poe_models.experts import Anchor, Expert, FactorExpert, ProductOfExperts, TaskArithmetic, average
from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import Posterior, full_posterior
from poe_models.program import log_density, program
from poe_models.residual_maps import RESIDUAL_MAPS, Directional, Identity, InputGram, OutputGram, ResidualMap
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
from poe_models.span import SpanCoordinates, SpanStatistics, span_posterior, span_statistics
from poe_models.task_vectors import ModuleUpdates, TaskVectors
from poe_models.treatments import DEFAULT_RULES, Rule, RuleTable, Treatment
from poe_models.views import View

__all__ = [
    "DEFAULT_RULES",
    "ENERGIES",
    "PRECISIONS",
    "RESIDUAL_MAPS",
    "SCALES",
    "Absolute",
    "AbsolutePrecision",
    "Anchor",
    "AnchorPrecision",
    "Cauchy",
    "Checkpoint",
    "CheckpointError",
    "Custom",
    "Diagonal",
    "Directional",
    "Energy",
    "Expert",
    "FactorExpert",
    "Gaussian",
    "GeneralizedGaussian",
    "Gram",
    "Huber",
    "Identity",
    "InputGram",
    "LoraCheckpoint",
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
    "TaskVectors",
    "TensorInfo",
    "Treatment",
    "View",
    "Welsch",
    "average",
    "full_posterior",
    "log_density",
    "open_checkpoint",
    "program",
    "span_posterior",
    "span_statistics",
]
