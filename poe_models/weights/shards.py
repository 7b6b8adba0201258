"""Weight files of a folder: one alone, or the shards that an index lists."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from poe_models.weights.checkpoint import CheckpointError, read_json
from poe_models.weights.weight_files import SafetensorsFile, TorchFile, WeightFile

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_single(path: Path) -> list[WeightFile]:
    """The weight file of a folder, which an index beside it must agree with.

    Args:
        path: The file, such as ``model.safetensors``.

    Returns:
        The file alone.

    Raises:
        CheckpointError: If there is an index beside it that is broken, or of shards with other tensors: nothing says
            then which of the two is the model.
    """
    file = weight_file(path)
    index = path.with_name(f"{path.name}.index.json")
    if not index.is_file():
        return [file]
    try:
        shards = open_shards(index)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} {path.name} is beside the index: if that is the model, move {index.name} out of the folder."
        ) from error
    ours, theirs = _headers([file]), _headers(shards)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    saves = f"{path.parent}: holds {path.name} and, with {index.name}, shards of another save"
    way_out = f"Move {path.name} out of the folder if the shards are the model, or {index.name} if they are not."
    if differing:
        raise CheckpointError(
            f"{saves}; {len(differing)} tensors are in one of them only, or of another shape or dtype there: "
            f"{', '.join(map(repr, differing[:3]))}{', ...' if len(differing) > 3 else ''}. Programs differ in which "
            f"they read. {way_out}"
        )
    if any(shard.path != path for shard in shards):
        warnings.warn(
            f"{saves} with tensors of the same names and shapes, whose values are not compared; {path.name} is read. "
            f"{way_out}",
            stacklevel=2,
        )
    return [file]


def _headers(parts: Sequence[WeightFile]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor, under all its names."""
    infos = {name: info for part in parts for name, info in part.tensors.items()}
    infos |= {name: infos[target] for part in parts for name, target in part.aliases.items()}
    return {name: (info.shape, info.dtype) for name, info in infos.items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: has no `weight_map` of tensor names to shard files. Copy the file anew.")
    return weight_map


def open_shards(index: Path) -> list[WeightFile]:
    """The shards that an index lists, with the tensors that it lists in each.

    Args:
        index: The file, such as ``model.safetensors.index.json``.

    Returns:
        The shards, by name.

    Raises:
        CheckpointError: If it is no index, or the shards are not in its folder or do not hold what it lists.
    """
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    _refuse_elsewhere(index, shards)
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: lists {len(missing)} of {len(shards)} shards that are not in the folder: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download the missing files."
        )
    parts = {name: weight_file(index.parent / name) for name in shards}
    absent = [
        f"{name!r} (in {shard})"
        for name, shard in weight_map.items()
        if name not in parts[shard].tensors and name not in parts[shard].aliases
    ]
    if absent:
        raise CheckpointError(
            f"{index}: lists {len(absent)} tensors that their shard does not hold: {', '.join(absent[:5])}"
            f"{', ...' if len(absent) > 5 else ''}. Index and shards are from different saves: copy the folder anew."
        )
    listed: dict[str, set[str]] = {shard: set() for shard in parts}
    for name, shard in weight_map.items():
        listed[shard].add(parts[shard].aliases.get(name, name))
    for shard, part in parts.items():
        part.keep(listed[shard])  # what the index does not list there is left over from another save
    return list(parts.values())


def _refuse_elsewhere(index: Path, shards: Sequence[str]) -> None:
    elsewhere = [name for name in shards if Path(name).name != name or name == ".."]
    if elsewhere:
        raise CheckpointError(
            f"{index}: lists shards outside of its own folder, {', '.join(map(repr, elsewhere[:5]))}"
            f"{', ...' if len(elsewhere) > 5 else ''}; subfolders and `..` are not followed. Move the files beside the "
            "index, and write their names without a folder in it."
        )


def weight_file(path: Path) -> WeightFile:
    """Open a weight file by its suffix.

    Args:
        path: The file.

    Returns:
        The file, of which the header is read.

    Raises:
        CheckpointError: If the suffix is unknown, or the file is corrupt or holds code.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return TorchFile(path)
    kind = "GGUF files hold quantised weights" if path.suffix == ".gguf" else f"unknown suffix {path.suffix!r}"
    raise CheckpointError(
        f"`open_checkpoint({str(path)!r})`: {kind}. Supported are .safetensors and {', '.join(_TORCH_SUFFIXES)} files, "
        "and folders of them."
    )
