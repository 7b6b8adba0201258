"""The merges of a table, each a configuration as `poe-merge merge` takes it, with the settings of its paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.papers.setups import Setup
from inference.models.disk import replace_file
from inference.models.in_memory import merge
from poe_merge.build import designs_of
from poe_merge.config import MergeConfig, parse_config
from poe_merge.settings import Document
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.task_vectors import TaskVectors

TABLE_5 = "PoE, Table 5"
REGMEAN = "RegMean"
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "average": {"merge_method": "Average()", "tensors": "all"},
    "task arithmetic": {"merge_method": "TaskArithmetic(scale=0.3)", "tensors": "all"},
    "TIES": {"merge_method": "Ties(density=0.2, scale=0.3, combine='sum')", "tensors": "all"},
    "TSV-M": {"merge_method": "TSVM(scale=1.0)"},
    "OutputGram, Cauchy": {"parameters": {"residual_map": "OutputGram", "energy": "Cauchy", "eta": 0.1}},
    "InputGram, Cauchy": {"parameters": {"residual_map": "InputGram", "energy": "Cauchy", "eta": 0.1}},
}
"""Merges of every table. Task arithmetic and TIES at λ = .3, over all parameters, as the published rows have them."""


def configurations(setup: Setup, moments: Path | None = None) -> dict[str, Mapping[str, Any]]:
    """Merges of a table by name, the paper's preset first where there is one.

    Args:
        setup: The table.
        moments: Second moments of the experts' inputs, for RegMean; None leaves it out.
    """
    preset = {TABLE_5: {"preset": setup.preset}} if setup.preset else {}
    regmean = {REGMEAN: {"merge_method": f"RegMean({str(moments)!r})"}} if moments else {}
    return {**preset, **CONFIGURATIONS, **regmean}


def config_of(setup: Setup, configuration: Mapping[str, Any], device: str = "cpu") -> MergeConfig:
    """A configuration with the table's models.

    Args:
        setup: The table.
        configuration: Method or parameters.
        device: Where merges are computed.
    """
    models = [{"model": model, "name": task} for task, model in setup.experts.items()]
    data = {"base_model": setup.base, "models": models, "device": device, **configuration}
    return parse_config(Document(data))


def task_vectors(config: MergeConfig, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> TaskVectors:
    """Task vectors of opened models under the treatments of a configuration."""
    return TaskVectors(base, dict(experts), rules=config.rule_table(), device=config.device)


def merged_file(config: MergeConfig, base: Checkpoint, experts: Mapping[str, Checkpoint], path: Path) -> Path:
    """Merge, and write the weights.

    Args:
        config: The configuration.
        base: The opened base.
        experts: Task to its opened expert.
        path: Of the file, which is replaced.
    """
    vectors = task_vectors(config, base, experts)
    state = _once(merge(vectors, designs_of(config, vectors.base)))
    replace_file(path, lambda part: save_file(state, part))
    return path


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors under one of their names."""
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        kept.setdefault(tensor.data_ptr() or id(tensor), (name, tensor.contiguous()))
    return dict(kept.values())
