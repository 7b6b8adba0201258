"""Span statistics of a whole model: one pass over the weights, and a small file that stands for them afterwards.

>>> import tempfile
>>> from poe_models.experts import ProductOfExperts
>>> base, tuned = {"fc.weight": torch.zeros(2, 3)}, {"fc.weight": torch.ones(2, 3)}
>>> vectors = TaskVectors(base, {"tuned": tuned})
>>> statistics = collect_statistics(vectors, ProductOfExperts.of(vectors.names))
>>> with tempfile.TemporaryDirectory() as folder:
...     _ = save_statistics(statistics, f"{folder}/stats")
...     same = load_statistics(f"{folder}/stats")
>>> same.modules, statistics_digest(same) == statistics_digest(statistics)
(('fc.weight',), True)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.models.artifacts import read_artifact, write_artifact
from inference.models.design import Designs
from inference.models.digest import Progress, Silent
from inference.models.modules import module_names, read_modules
from inference.models.places import without_places
from inference.models.ranks import ALONE, Ranks
from inference.models.statistics_record import family_of
from poe_models.span import SpanStatistics, concatenate, span_statistics
from poe_models.weights.loading import CheckpointError
from poe_models.weights.task_vectors import TaskVectors

_KIND = "statistics"
_TENSORS = ("gram", "forms", "mean_curvature", "dimension")


def collect_statistics(
    task_vectors: TaskVectors,
    design: Designs,
    *,
    tensors: Collection[str] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> SpanStatistics:
    """Make Span statistics in one pass over the weights, a tensor at a time.

    Where the design's merge is solved in Full coordinates, which is the default, it is solved here as well and the span
    goes through it, so that draws surround what ``merge_checkpoint`` writes; such statistics belong to one energy,
    scale and anchor. Those of a design with ``coordinates="span"`` serve any, and their draws surround its merge, too:
    the MAP in Span coordinates.

    Args:
        task_vectors: Base and experts.
        design: One product or design for all tensors, or a function from the name of a merged tensor. Residual
            maps, the anchor's centre and the coordinates of the merge must be the same for all tensors.
        tensors: Read only these merged tensors.
        progress: Told how far the pass is.
        ranks: The processes that share the pass; each calls this with the same arguments and gets the same.

    Returns:
        Statistics of every module, on the CPU: all that Span coordinates need.

    Raises:
        CheckpointError: If an input has values that are not finite.
        ValueError: If nothing is merged, or the designs do not fit the task vectors or each other.
    """
    progress = progress or Silent()
    designs = family_of(task_vectors, design, tensors)
    nbytes = {name: task_vectors.base.tensors[name].nbytes for name in designs}
    mine = ranks.share(list(nbytes.values()))
    own = {name: design for place, (name, design) in enumerate(designs.items()) if place in mine}
    modules = sum(len(module_names(task_vectors, name)) for name in own)
    progress.begin("statistics", modules, sum(nbytes[name] for name in own))
    parts: dict[str, list[SpanStatistics]] = {}
    for name, each_design in own.items():
        read = read_modules(task_vectors, name, each_design)
        through = each_design.coordinates == "full"
        parts[name] = [
            _on_cpu(span_statistics(each.poe, each.updates, [each.name], through=each.mode if through else None))
            for each in read
        ]
        progress.advance(len(read), nbytes[name])
    made = {name: part for each in ranks.gather(parts) for name, part in each.items()}
    return concatenate([part for name in designs for part in made[name]])


def statistics_digest(statistics: SpanStatistics) -> str:
    """Sha256 of the names, maps and every number: two statistics with the same digest are the same.

    Made again with another number of threads or another library they may differ in their last digits. Where the files
    of a map or a centre are does not count.
    """
    return _digest(statistics, without_places)


def is_digest_of(digest: object, statistics: SpanStatistics) -> bool:
    """Return whether a digest is that of statistics, also one from before places stopped to count."""
    return digest in (statistics_digest(statistics), _digest(statistics, str))


def _digest(statistics: SpanStatistics, told: Callable[[str], str]) -> str:
    maps = tuple(told(text) for text in statistics.residual_maps)
    names = (statistics.modules, statistics.updates, maps, statistics.through)
    digest = hashlib.sha256(repr(names).encode())
    for name in _TENSORS:
        values: Tensor = getattr(statistics, name)
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().to(torch.float64).contiguous().numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def save_statistics(
    statistics: SpanStatistics,
    path: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Save statistics as a new folder, whole or not at all.

    Args:
        statistics: Of all modules.
        path: The folder to make, with ``statistics.safetensors`` and ``statistics.json``.
        about: What decides them besides the checkpoints, as ``describe`` gives it.
        inputs: Digests of the checkpoints they were made from, as ``digest_inputs`` gives them.
        settings: What they were configured with, for the record.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists.
        ValueError: If they are incomplete, for instance made without ranks.
    """
    try:
        _check(statistics)
    except ValueError as error:
        raise ValueError(
            f"`save_statistics(...)`: {error}. Make them with `collect_statistics`, or `span_statistics(ranks=True)`."
        ) from error
    record = {
        "modules": list(statistics.modules),
        "updates": list(statistics.updates),
        "residual_maps": list(statistics.residual_maps),
        "center": statistics.center,
        "through": None if statistics.through is None else list(statistics.through),
        "digest": statistics_digest(statistics),
        "about": None if about is None else dict(about),
        "inputs": None if inputs is None else dict(inputs),
        "settings": None if settings is None else dict(settings),
    }
    return write_artifact(path, _KIND, {name: getattr(statistics, name) for name in _TENSORS}, record)


def load_statistics(path: str | Path) -> SpanStatistics:
    """Load what ``save_statistics`` saved.

    Args:
        path: The folder.

    Returns:
        The statistics, bit for bit.

    Raises:
        CheckpointError: If the folder is missing, corrupt, or holds something else.
    """
    tensors, record = read_artifact(path, _KIND)
    try:
        statistics = SpanStatistics(
            modules=tuple(record["modules"]),
            updates=tuple(record["updates"]),
            residual_maps=tuple(record["residual_maps"]),
            center=record["center"],
            through=None if record["through"] is None else tuple(record["through"]),
            **{name: tensors[name] for name in _TENSORS},
        )
        _check(statistics)
    except (KeyError, ValueError) as error:
        lacks = f"the tensor {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: incomplete statistics: {lacks}. Make them again.") from error
    if not is_digest_of(record["digest"], statistics):
        raise CheckpointError(f"{path}: statistics.json is not about these numbers. Make the statistics again.")
    return statistics


def _on_cpu(part: SpanStatistics) -> SpanStatistics:
    values = {name: getattr(part, name).cpu() for name in _TENSORS}
    return replace(part, **values)


def _check(statistics: SpanStatistics) -> None:
    """Raise ValueError unless all shapes fit the names and all values are finite."""
    modules, size, experts = len(statistics.modules), len(statistics.basis), len(statistics.residual_maps)
    if statistics.through is not None and len(statistics.through) != modules:
        raise ValueError(f"there are {modules} modules, and designs of {len(statistics.through)} merges")
    shapes = {
        "gram": (modules, size, size),
        "forms": (modules, experts, size, size),
        "mean_curvature": (modules, experts),
        "dimension": (modules, experts),
    }
    for name, shape in shapes.items():
        values: Tensor = getattr(statistics, name)
        if tuple(values.shape) != shape or values.dtype != torch.float64:
            raise ValueError(f"{name} is {tuple(values.shape)} {values.dtype}, expected {shape} torch.float64")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
