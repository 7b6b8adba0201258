"""``poe-merge merge``: the model or the adapter that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inference.models.adapters import AdapterReport, merge_adapters
from inference.models.digest import Progress
from inference.models.merge import MergeReport, merge_checkpoint
from poe_merge.build import custom_sources, designs_of
from poe_merge.config import MergeConfig
from poe_models.weights.task_vectors import TaskVectors


def merge(
    config: MergeConfig, task_vectors: TaskVectors, out: Path, progress: Progress, *, resume: bool
) -> MergeReport | AdapterReport:
    """Merge as a configuration says.

    Args:
        config: The configuration.
        task_vectors: Its base and experts.
        out: The folder to make.
        progress: Told how far the merge is.
        resume: Go on with an interrupted merge.
    """
    designs = designs_of(config, task_vectors.base)
    shared: dict[str, Any] = {
        "out_dtype": config.output_dtype,
        "seed": config.seed,
        "settings": {"preset": config.preset, "config": config.resolved()},
        "code": custom_sources(config),
        "resume": resume,
        "progress": progress,
    }
    if config.adapter is None:
        return merge_checkpoint(task_vectors, designs, out, batch_bytes=config.batch_bytes, **shared)
    return merge_adapters(task_vectors, designs, out, rank=config.adapter[0], **shared)
