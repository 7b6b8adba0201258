"""Save and load the draws of a whole model: coefficients (Span), mixture weights and seeds (Full), a method's seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.merge_distance import MergeDistance
from inference.models.artifacts import read_artifact, write_artifact
from inference.models.full_draws import check_environment, warn_of_changes
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.models.statistics_files import statistics_digest
from poe_models.span import SpanStatistics
from poe_models.weights.loading import CheckpointError

__all__ = ["load_draws", "save_draws"]

_KIND = "draws"
_STATS, _MERGE = "stats.", "merge."
_DISTANCE = ("displacement", "spread", "length")


def save_draws(draws: ModelDraws, path: str | Path) -> Path:
    """Save draws as a new folder, whole or not at all.

    Args:
        draws: Of a whole model.
        path: The folder to make, with `draws.safetensors` and `draws.json`.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists.
        TypeError: If the draws are not those of a whole model.
    """
    if not isinstance(draws, SpanDraws | FullDraws | MethodDraws):
        raise TypeError(
            f"`save_draws({type(draws).__name__})`: give `SpanDraws`, `FullDraws` or `MethodDraws`; "
            "`SpanDraws.of(draws, posterior)` names the draws of a sampler."
        )
    record: dict[str, Any] = {
        "coordinates": draws.coordinates,
        "modules": list(draws.modules),
        "source": draws.source,
    }
    stats = {_STATS + name: value for name, value in draws.stats.items()}
    tensors = {"squared_norms": draws.squared_norms, **draws.numbers, **stats}
    if isinstance(draws, SpanDraws | FullDraws) and draws.from_merge is not None:
        tensors |= {_MERGE + name: getattr(draws.from_merge, name) for name in _DISTANCE}
    if isinstance(draws, SpanDraws):
        record |= {"updates": list(draws.updates), "through": list(draws.designs)}
        record |= {"sampler": draws.sampler, "temperature": draws.temperature}
        return write_artifact(path, _KIND, tensors, record)
    distinct = list(dict.fromkeys(draws.designs))
    record["designs"] = distinct
    record["design_of_module"] = [distinct.index(text) for text in draws.designs]
    if isinstance(draws, MethodDraws):
        record["experts"] = list(draws.experts)
    else:
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
        `SpanDraws`, `FullDraws` or `MethodDraws`.

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
    modules = len(record["modules"])
    draws: ModelDraws
    own: dict[str, tuple[int, ...]]
    if record["coordinates"] == "span":
        draws = _span(tensors, record)
        own = {"coefficients": (modules, len(draws.basis))}
    elif record["coordinates"] == "seeds":
        draws = _seeds(tensors, record)
        own = {"seeds": ()}
    else:
        draws = _full(tensors, record)
        own = {"weights": (modules, draws.weights.shape[-1]), "seeds": (modules,)}
    start = (draws.num_chains, draws.num_draws)
    shapes: dict[str, tuple[int, ...]] = {name: (*start, *rest) for name, rest in own.items()}
    shapes |= {name: (*start, modules) for name in tensors if name.startswith(_STATS)}
    if isinstance(draws, FullDraws):
        shapes["temperature"] = (modules,)
    shapes |= {name: (modules,) for name in tensors if name.startswith(_MERGE)}
    for name, shape in shapes.items():
        finite = name.startswith((_STATS, _MERGE)) or bool(torch.isfinite(tensors[name]).all())
        if tuple(tensors[name].shape) != shape or not finite:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected finite {shape}")
    if isinstance(draws, SpanDraws) and len(draws.designs) not in (0, modules):
        raise ValueError(f"there are {len(draws.designs)} designs of {modules} modules")
    return draws


def _span(tensors: dict[str, Tensor], record: dict[str, Any]) -> SpanDraws:
    temperature = record["temperature"]
    return SpanDraws(
        **_common(tensors, record),
        from_merge=_distance(tensors, record),
        updates=tuple(record["updates"]),
        coefficients=tensors["coefficients"],
        designs=tuple(record["through"]),
        made_by=record["sampler"],
        temperature=None if temperature is None else float(temperature),
    )


def _full(tensors: dict[str, Tensor], record: dict[str, Any]) -> FullDraws:
    check_environment(record["environment"])
    return FullDraws(
        **_common(tensors, record),
        from_merge=_distance(tensors, record),
        method=record["method"],
        weights=tensors["weights"],
        seeds=tensors["seeds"],
        temperature=tensors["temperature"],
        designs=_designs(record),
        environment=record["environment"],
    )


def _seeds(tensors: dict[str, Tensor], record: dict[str, Any]) -> MethodDraws:
    return MethodDraws(
        **_common(tensors, record),
        seeds=tensors["seeds"],
        experts=tuple(record["experts"]),
        designs=_designs(record),
    )


def _common(tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    stats = {name.removeprefix(_STATS): value for name, value in tensors.items() if name.startswith(_STATS)}
    return {
        "modules": tuple(record["modules"]),
        "squared_norms": tensors["squared_norms"],
        "source": record["source"],
        "stats": stats,
    }


def _distance(tensors: dict[str, Tensor], record: dict[str, Any]) -> MergeDistance | None:
    """How far the draws are from their merge, if that was found out."""
    if not any(name.startswith(_MERGE) for name in tensors):
        return None
    return MergeDistance(tuple(record["modules"]), *(tensors[_MERGE + name] for name in _DISTANCE))


def _designs(record: dict[str, Any]) -> tuple[str, ...]:
    """The design of each module."""
    return tuple(record["designs"][index] for index in record["design_of_module"])
