"""Save and load the draws of a whole model: coefficients (Span), or mixture weights and seeds (Full)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference._artifacts import read_artifact, write_artifact
from inference.full_draws import check_environment, warn_of_changes
from inference.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.statistics_files import statistics_digest
from poe_models.checkpoints import CheckpointError
from poe_models.span import SpanStatistics

__all__ = ["load_draws", "save_draws"]

_KIND = "draws"
_STATS = "stats."


def save_draws(draws: ModelDraws, path: str | Path) -> Path:
    """Save draws as a new folder, whole or not at all.

    Args:
        draws: Of a whole model.
        path: The folder to make, with `draws.safetensors` and `draws.json`.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists.
        TypeError: If the draws are neither Span nor Full draws.
    """
    if not isinstance(draws, SpanDraws | FullDraws):
        raise TypeError(
            f"`save_draws({type(draws).__name__})`: give `SpanDraws` or `FullDraws`; `SpanDraws.of(draws, coordinates, "
            "statistics)` names the draws of a sampler."
        )
    record: dict[str, Any] = {
        "coordinates": draws.coordinates,
        "modules": list(draws.modules),
        "source": draws.source,
    }
    stats = {_STATS + name: value for name, value in draws.stats.items()}
    tensors = {"squared_norms": draws.squared_norms, **draws.numbers, **stats}
    if isinstance(draws, SpanDraws):
        record["updates"] = list(draws.updates)
    else:
        distinct = list(dict.fromkeys(draws.designs))
        record["designs"] = distinct
        record["design_of_module"] = [distinct.index(text) for text in draws.designs]
        record["method"] = draws.method
        record["environment"] = dict(draws.environment)
    return write_artifact(path, _KIND, tensors, record)


def load_draws(path: str | Path, source: SpanStatistics | str | None = None) -> ModelDraws:
    """Load what `save_draws` saved.

    Full draws are made again bit for bit on the same device type, torch version and number of threads, which the file
    records. Elsewhere a `RegenerationWarning` says what holds.

    Args:
        path: The folder.
        source: What the draws should be about: the statistics, or the digest that earlier draws had as `source`. None
            takes any; an ensemble still compares the norms of all updates.

    Returns:
        `SpanDraws` or `FullDraws`.

    Raises:
        CheckpointError: If the folder is missing, corrupt, holds something else, or draws of something else.
    """
    tensors, record = read_artifact(path, _KIND)
    try:
        draws = _read(tensors, record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path}: incomplete draws ({type(error).__name__}: {error}). Draw them again."
        ) from error
    expected = statistics_digest(source) if isinstance(source, SpanStatistics) else source
    if expected is not None and draws.source != expected:
        raise CheckpointError(
            f"{path}: these draws were made from other {'statistics' if draws.coordinates == 'span' else 'weights'} "
            f"(digest {draws.source[:12]}..., expected {expected[:12]}...). Draw again, or give what they are about."
        )
    if isinstance(draws, FullDraws):
        warn_of_changes(draws.environment)
    return draws


def _read(tensors: dict[str, Tensor], record: dict[str, Any]) -> ModelDraws:
    modules = tuple(record["modules"])
    stats = {name.removeprefix(_STATS): value for name, value in tensors.items() if name.startswith(_STATS)}
    draws: ModelDraws
    if record["coordinates"] == "span":
        updates = tuple(record["updates"])
        draws = SpanDraws(
            modules, tensors["squared_norms"], record["source"], updates, tensors["coefficients"], stats=stats
        )
        shapes = {"coefficients": (*draws.coefficients.shape[:2], len(modules), len(updates) + 1)}
    else:
        draws = FullDraws(
            modules=modules,
            squared_norms=tensors["squared_norms"],
            source=record["source"],
            stats=stats,
            method=record["method"],
            weights=tensors["weights"],
            seeds=tensors["seeds"],
            temperature=tensors["temperature"],
            designs=tuple(record["designs"][index] for index in record["design_of_module"]),
            environment=record["environment"],
        )
        check_environment(draws.environment)
        start = draws.weights.shape[:2]
        experts = draws.weights.shape[-1]
        shapes = {"weights": (*start, len(modules), experts), "seeds": (*start, len(modules))}
        shapes["temperature"] = (len(modules),)
    shapes |= {name: (draws.num_chains, draws.num_draws, len(modules)) for name in tensors if name.startswith(_STATS)}
    for name, shape in shapes.items():
        finite = name.startswith(_STATS) or bool(torch.isfinite(tensors[name]).all())
        if tuple(tensors[name].shape) != shape or not finite:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected finite {shape}")
    return draws
