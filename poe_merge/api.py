"""Every public name of `poe_merge`, in one module that is imported when the first of them is used."""

import inference
import poe_models
from inference import *  # noqa: F403
from inference.models.merge import Design, MergeReport, OutputError, Plan, Progress, merge_checkpoint, plan
from poe_merge.build import DesignTable, open_task_vectors
from poe_merge.config import ConfigError, MergeConfig, load_config
from poe_merge.presets import PRESETS
from poe_merge.specs import SpecError, format_spec, parse_spec
from poe_models import *  # noqa: F403

__all__ = [
    "PRESETS",
    "ConfigError",
    "Design",
    "DesignTable",
    "MergeConfig",
    "MergeReport",
    "OutputError",
    "Plan",
    "Progress",
    "SpecError",
    "format_spec",
    "load_config",
    "merge_checkpoint",
    "open_task_vectors",
    "parse_spec",
    "plan",
]
__all__ += inference.__all__
__all__ += poe_models.__all__
