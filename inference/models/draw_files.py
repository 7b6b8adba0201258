"""Save and load the draws of a whole model: coefficients (Span), mixture weights and seeds (Full), a method's seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.merge_distance import MergeDistance
from inference.models.artifacts import add_artifact, read_artifact, read_record, write_artifact
from inference.models.digest import file_digest
from inference.models.full_draws import check_environment, warn_of_changes
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.models.staging import Staging
from inference.models.statistics_files import is_digest_of, statistics_digest
from poe_models.span import SpanStatistics
from poe_models.weights.loading import CheckpointError

_KIND = "draws"
_STATS, _MERGE = "stats.", "merge."
_DISTANCE = ("displacement", "spread", "length")


def save_draws(draws: ModelDraws, path: str | Path) -> Path:
    """Save draws as a new folder, whole or not at all.

    Args:
        draws: Of a whole model.
        path: The folder to make, with ``draws.safetensors`` and ``draws.json``.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists.
        TypeError: If the draws are not those of a whole model.
    """
    if not isinstance(draws, ModelDraws):
        raise TypeError(
            f"`save_draws({type(draws).__name__})`: give `SpanDraws`, `FullDraws` or `MethodDraws`; "
            "`SpanDraws.of(draws, posterior)` names the draws of a sampler."
        )
    return write_artifact(path, _KIND, _tensors(draws), _record(draws))


def add_draws(staging: Staging, name: str, draws: ModelDraws, beside: Sequence[str] = ()) -> None:
    """Save draws as a folder of a larger output, with the digests of finished files beside them."""
    digests = {file: file_digest(staging.content / file) for file in beside}
    record = _record(draws) | ({"beside": digests} if digests else {})
    add_artifact(staging, f"{name}/", _KIND, _tensors(draws), record)


def changed_beside(content: Path, name: str) -> Path | None:
    """The first file beside draws that is not what it was when :func:`add_draws` saved them.

    Args:
        content: The larger output.
        name: The draws' folder in it.

    Returns:
        The file; None if all are as they were.

    Raises:
        CheckpointError: If the draws' record cannot be read.
    """
    digests = read_record(content / name, _KIND).get("beside", {})
    files = {content / file: digest for file, digest in digests.items()}
    return next((file for file, was in files.items() if not file.is_file() or file_digest(file) != was), None)


def _tensors(draws: ModelDraws) -> dict[str, Tensor]:
    tensors = {"squared_norms": draws.squared_norms, **draws.numbers}
    if isinstance(draws, FullDraws) and draws.temperature is not None:
        tensors["temperature"] = draws.temperature
    if draws.from_merge is not None:
        tensors |= {_MERGE + name: getattr(draws.from_merge, name) for name in _DISTANCE}
    return tensors | {_STATS + name: value for name, value in draws.stats.items()}


def _record(draws: ModelDraws) -> dict[str, Any]:
    record: dict[str, Any] = {"coordinates": draws.kind, "modules": list(draws.modules), "source": draws.source}
    if isinstance(draws, SpanDraws):
        each = None if draws.temperature is None else draws.temperature.tolist()
        record |= {"followers": dict(draws.followers)} if draws.followers else {}
        return record | {
            "updates": list(draws.updates),
            "through": list(draws.designs),
            "sampler": draws.sampler,
            "temperature": draws.temperatures[0] if len(draws.temperatures) == 1 else each,
        }
    distinct = list(dict.fromkeys(draws.designs))
    record |= {"designs": distinct, "design_of_module": [distinct.index(text) for text in draws.designs]}
    if isinstance(draws, FullDraws):
        return record | {"sampler": draws.sampler, "environment": dict(draws.environment)}
    return record | {"experts": list(draws.labels)}


def load_draws(path: str | Path, source: SpanStatistics | str | None = None) -> ModelDraws:
    """Load what ``save_draws`` saved.

    Full draws are made again bit for bit on the same device type, torch version and number of threads, which the file
    records. Elsewhere a ``RegenerationWarning`` says what holds.

    Args:
        path: The folder.
        source: What the draws should be about: the statistics, or the digest that earlier draws had as ``source``. None
            takes any; an ensemble still compares the norms of all updates.

    Returns:
        ``SpanDraws``, ``FullDraws`` or ``MethodDraws``.

    Raises:
        CheckpointError: If the folder is missing, corrupt, holds something else, or draws of something else.
    """
    tensors, record = read_artifact(path, _KIND)
    if record["coordinates"] == "full" and "sampler" not in record:  # written before it was called so
        record["sampler"] = record.pop("method")
    try:
        draws = _read(tensors, record)
    except (KeyError, ValueError) as error:
        lacks = f"the tensor {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: incomplete draws: {lacks}. Draw them again.") from error
    _require_source(path, draws, source)
    if isinstance(draws, FullDraws):
        warn_of_changes(draws.environment)
    return draws


def _require_source(path: str | Path, draws: ModelDraws, source: SpanStatistics | str | None) -> None:
    """Refuse draws of something else than the source, if there is one."""
    if isinstance(source, SpanStatistics):
        same, expected = is_digest_of(draws.source, source), statistics_digest(source)
    else:
        same, expected = source in (None, draws.source), str(source)
    if not same:
        raise CheckpointError(
            f"{path}: these draws were made from other {'statistics' if draws.kind == 'span' else 'weights'} "
            f"(digest {draws.source[:12]}..., expected {expected[:12]}...). Draw again, or give what they are about."
        )


def _read(tensors: dict[str, Tensor], record: dict[str, Any]) -> ModelDraws:
    draws = _READERS[record["coordinates"]](tensors, record)
    modules, start = len(draws.modules), (draws.num_chains, draws.num_draws)
    own = {name: tuple(value.shape[3:]) for name, value in draws.numbers.items()}
    if isinstance(draws, SpanDraws):
        own["coefficients"] = (len(draws.basis),)
    shapes = {name: (*start, modules, *rest) for name, rest in own.items()}
    if isinstance(draws, MethodDraws):
        shapes["seeds"] = start
    shapes |= {name: (*start, modules) for name in tensors if name.startswith(_STATS)}
    shapes |= {name: (modules,) for name in tensors if name.startswith((_MERGE, "temperature"))}
    for name, shape in shapes.items():
        finite = name.startswith((_STATS, _MERGE)) or bool(torch.isfinite(tensors[name]).all())
        if tuple(tensors[name].shape) != shape or not finite:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected finite {shape}")
    if len(draws.designs) != modules and (draws.designs or not isinstance(draws, SpanDraws)):
        raise ValueError(f"there are {len(draws.designs)} designs of {modules} modules")
    return draws


def _span(tensors: dict[str, Tensor], record: dict[str, Any]) -> ModelDraws:
    heat, modules = record["temperature"], len(record["modules"])
    return SpanDraws(
        **_common(tensors, record),
        designs=tuple(record["through"]),
        sampler=record["sampler"],
        temperature=None if heat is None else torch.tensor(heat, dtype=torch.float64).expand(modules).clone(),
        updates=tuple(record["updates"]),
        coefficients=tensors["coefficients"],
        followers=record.get("followers", {}),
    )


def _full(tensors: dict[str, Tensor], record: dict[str, Any]) -> ModelDraws:
    check_environment(record["environment"])
    return FullDraws(
        **_common(tensors, record),
        designs=_designs(record),
        sampler=record["sampler"],
        temperature=tensors["temperature"],
        weights=tensors["weights"],
        seeds=tensors["seeds"],
        environment=record["environment"],
    )


def _seeds(tensors: dict[str, Tensor], record: dict[str, Any]) -> ModelDraws:
    common, experts = _common(tensors, record), tuple(record["experts"])
    return MethodDraws(**common, designs=_designs(record), seeds=tensors["seeds"], experts=experts)


_READERS = {"span": _span, "full": _full, "seeds": _seeds}


def _common(tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    modules, away = tuple(record["modules"]), None
    if any(name.startswith(_MERGE) for name in tensors):
        away = MergeDistance(modules, *(tensors[_MERGE + name] for name in _DISTANCE))
    return {
        "modules": modules,
        "squared_norms": tensors["squared_norms"],
        "source": record["source"],
        "stats": {name.removeprefix(_STATS): value for name, value in tensors.items() if name.startswith(_STATS)},
        "from_merge": away,
    }


def _designs(record: dict[str, Any]) -> tuple[str, ...]:
    """The design of each module."""
    return tuple(record["designs"][index] for index in record["design_of_module"])
