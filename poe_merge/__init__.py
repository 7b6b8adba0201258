"""Merge fine-tuned models as a product of experts.

Everything public from `poe_models` (what is merged and believed) and `inference` (from belief to numbers), and the YAML
configuration that the command line `poe-merge` reads::

    import poe_merge as pm

    vectors = pm.TaskVectors("path/to/base", {"mnist": "path/to/mnist", "emoji": "path/to/emoji"})
    poe = pm.ProductOfExperts.of(vectors.names, residual_map=pm.InputGram(), energy=pm.StudentT(4.0))
    pm.merge_checkpoint(vectors, poe, "merged")
"""

from poe_merge._neighbours import check_neighbours

check_neighbours()

import inference  # noqa: E402 (only once it is known to be ours)
import poe_models  # noqa: E402
from inference import *  # noqa: E402, F403
from inference.streaming import Design, MergeReport, OutputError, Plan, Progress, merge_checkpoint, plan  # noqa: E402
from poe_merge.build import DesignTable, open_task_vectors  # noqa: E402
from poe_merge.config import ConfigError, MergeConfig, load_config  # noqa: E402
from poe_merge.presets import PRESETS  # noqa: E402
from poe_merge.specs import SpecError, format_spec, parse_spec  # noqa: E402
from poe_models import *  # noqa: E402, F403

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
