"""``poe-merge stats``: Span statistics in one pass over the weights, and their check against a merge."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inference.models.artifacts import read_record
from inference.models.design import Design
from inference.models.digest import Progress, check_unchanged, digest_inputs, files_of
from inference.models.disk import real_path
from inference.models.method_design import AnyDesign
from inference.models.plan import inputs_of
from inference.models.ranks import ALONE, Ranks, require_same_files
from inference.models.staging import check_output
from inference.models.statistics_files import collect_statistics, load_statistics, save_statistics
from inference.models.statistics_record import describe, require_same
from poe_merge.build import custom_sources
from poe_merge.config import MergeConfig
from poe_models.span import SpanStatistics
from poe_models.weights.loading import Checkpoint
from poe_models.weights.task_vectors import TaskVectors

Table = Callable[[str], Design]
"""The design of each tensor."""


@dataclass(frozen=True)
class StatisticsReport:
    """Result of ``poe-merge stats``.

    Attributes:
        out: The folder.
        statistics: Saved there.
        seconds: Wall time.
    """

    out: Path
    statistics: SpanStatistics
    seconds: float


def make_statistics(
    settings: MergeConfig,
    task_vectors: TaskVectors,
    designs: Table,
    out: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> StatisticsReport:
    """Make the one pass over the weights and save the Span statistics as a new folder, whole or not at all.

    Args:
        settings: The configuration, for the record.
        task_vectors: Base and experts.
        designs: The design of each tensor.
        out: The folder to make.
        progress: Told how far it is.
        ranks: The processes that share the pass; the first writes the folder.

    Returns:
        The report.

    Raises:
        OutputError: If the folder exists or would overwrite an input.
        CheckpointError: If an input has values that are not finite, or is a copy of the base.
        ValueError: If nothing is merged, or the designs do not fit each other.
    """
    began = time.monotonic()
    checkpoints = checkpoints_of(task_vectors, designs)
    if ranks.first:
        check_apart(out, checkpoints)
    about = describe(task_vectors, designs)
    inputs = digest_inputs(checkpoints, custom_sources(settings), progress) if ranks.first else {}
    if ranks.first:
        task_vectors.refuse_copies()
    require_same_files(ranks, checkpoints.values())
    statistics = collect_statistics(task_vectors, designs, progress=progress, ranks=ranks)
    check_unchanged(checkpoints.values())
    folder, told = real_path(out), {"preset": settings.preset, "config": settings.resolved()}
    if ranks.first:
        folder = save_statistics(statistics, out, about=about, inputs=inputs, settings=told)
    ranks.wait()
    return StatisticsReport(folder, statistics, time.monotonic() - began)


def checked_statistics(path: Path, task_vectors: TaskVectors, designs: Table, progress: Progress) -> SpanStatistics:
    """Load the statistics of a folder once it is clear that they are about these checkpoints and designs."""
    statistics = load_statistics(path)
    about = describe(task_vectors, designs)
    inputs = digest_inputs(checkpoints_of(task_vectors, designs), (), progress)
    require_same(path, read_record(path, "statistics"), about, inputs)
    return statistics


def checkpoints_of(task_vectors: TaskVectors, designs: Callable[[str], AnyDesign]) -> dict[str, Checkpoint]:
    """Base, experts and the anchors' checkpoints by their role: everything that is read."""
    merged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
    return inputs_of(task_vectors, list({id(design): design for design in map(designs, merged)}.values()))


def check_apart(out: Path, checkpoints: dict[str, Checkpoint], *, resume: bool = False) -> Path:
    """Refuse an output folder that exists, but one to resume, or that an input is part of; return its whole path."""
    sources = [Path(checkpoint.source) for checkpoint in checkpoints.values() if checkpoint.files]
    return check_output(
        out, [*sources, *(file for each in checkpoints.values() for file in files_of(each))], resume=resume
    )
