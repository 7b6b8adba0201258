"""A folder that `poe-merge merge` made, taken up again: its configuration, and whether its inputs are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.models.digest import Progress, digest_inputs
from inference.models.folder import RECORD
from inference.models.statistics_record import changed_input
from poe_merge.config import POE, MergeConfig, parse_config
from poe_merge.flags import overridden
from poe_merge.settings import ConfigError, Document
from poe_merge.stats import Table, checkpoints_of
from poe_models.weights.loading import CheckpointError
from poe_models.weights.task_vectors import TaskVectors

KEYS = {"tensors", "inputs", "designs", "versions", "rules", "compute_dtype"}
FREE = ("seed", "device", "out_dtype")
"""Settings that do not decide what was merged."""


def read_record(run: Path) -> dict[str, Any]:
    """Read the record of a merge.

    Args:
        run: the merged folder.

    Returns:
        The contents of `poe_merge.json`.

    Raises:
        ValueError: there is none, or it is not one.
    """
    path = run / RECORD
    if not path.is_file():
        raise ValueError(f"{run}: no merge, {RECORD} is missing. Give a folder that `poe-merge merge` made.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}). Merge again.") from error
    if not isinstance(record, dict) or not set(record) >= KEYS or not isinstance(record["tensors"], list):
        raise ValueError(f"{path}: not the record of a merge. Give a folder that `poe-merge merge` made.")
    return record


def config_of(run: Path, flags: Mapping[str, Any]) -> MergeConfig:
    """The configuration that a folder was merged with.

    Args:
        run: The merged folder.
        flags: What was given on the command line, as `with_flags` passes it.

    Returns:
        The configuration, with another seed, device or output dtype if they were given.

    Raises:
        ConfigError: If it was merged in Python or by a merging method, or a flag would change the merge.
    """
    config = (read_record(run).get("settings") or {}).get("config")
    if not isinstance(config, dict):
        raise ConfigError(
            f"--merge {run}: merged in Python, without a configuration to take up. Draw around it there: "
            "`sample_full` or `collect_statistics`, then `MergedEnsemble(..., elsewhere=folder)`."
        )
    if config.get("merge_method") != POE:
        raise ConfigError(
            f"--merge {run}: merged by {config.get('merge_method')}, which has no posterior. Draw around a "
            "product of experts; a method that is random is drawn at several seeds from its configuration."
        )
    document = overridden(Document(config), flags)
    fixed = [origin for place, origin in document.origins.items() if origin.startswith("--") and place[0] not in FREE]
    if fixed:
        raise ConfigError(
            f"{fixed[0]}: the merge in {run} was made with settings of its own, and draws around it have the same. "
            "Leave it out, or merge again with it."
        )
    return parse_config(document, [run.absolute().parent, Path.cwd()])


def check_inputs(run: Path, task_vectors: TaskVectors, designs: Table, progress: Progress) -> None:
    """Refuse to draw around a merge of other checkpoints.

    Args:
        run: The merged folder.
        task_vectors: Base and experts.
        designs: The design of each tensor.
        progress: Told how far the checksums are.

    Raises:
        CheckpointError: If one is not what it was; names it.
    """
    now = digest_inputs(checkpoints_of(task_vectors, designs), (), progress)
    changed = changed_input(read_record(run)["inputs"], now)
    if changed is not None:
        raise CheckpointError(f"--merge {run}: it was merged from other checkpoints: {changed}. Merge again.")
