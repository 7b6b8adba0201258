"""Files beside the weights of a merged folder: config and tokenizer, an index of shards, the record of the merge."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inference.models.disk import real_path
from inference.models.staging import Staging
from poe_models.weights.loading import Checkpoint, CheckpointError
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.weight_files import SAFETENSORS_DTYPES

RECORD = "poe_merge.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json")
_TEXTS = (".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".jinja", ".py")
_KINDS = (*_TEXTS, ".model", ".tiktoken", ".vocab", ".merges", ".bpe", ".spm")
_NAMES = {"LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "vocab", "merges"}
_OURS = ("README.md", RECORD, "adapter_config.json")
_HEADER_BYTES = 50 * 10**6  # safetensors reads no header of more than 100 MB
_ENTRY_BYTES = 100  # of one tensor in a header, beside its name
_RESERVED = "__metadata__"
_LARGEST = 100 * 2**20


def weight_files(base: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Weight files of an output with the names of their tensors: the base's, as safetensors, under different names.

    Names differ in more than their case, for disks that do not tell it apart. One of several files is never called
    ``model.safetensors``, which readers take for the whole model. Files of very many tensors are split.

    Raises:
        CheckpointError: If a tensor has the name that safetensors keeps for itself, or a dtype that it lacks.
    """
    lacking = next((each for each in base.tensors.values() if each.dtype not in SAFETENSORS_DTYPES.values()), None)
    if lacking is not None:
        raise CheckpointError(
            f"{base.source}: tensor {lacking.name!r} is {lacking.dtype}, which safetensors files and merges cannot "
            "hold. Save the base without it, or with it in another dtype."
        )
    if _RESERVED in base.tensors or _RESERVED in base.aliases:
        raise CheckpointError(
            f"{base.source}: a tensor is called {_RESERVED!r}, which safetensors files keep for themselves. Rename it "
            "in base and experts."
        )
    parts = [(file, part) for file, names in base.layout.items() for part in _split(base, names)]
    found: dict[str, tuple[str, ...]] = {}
    taken = {"model.safetensors"} if len(parts) > 1 else set()
    for file, names in parts:
        stem = file.removesuffix(".safetensors")
        if stem == file:  # as transformers calls them
            stem = Path(file).stem.replace("pytorch_model", "model")
        name = next(each for n in range(len(found) + 2) if (each := _numbered(stem, n)).lower() not in taken)
        taken.add(name.lower())
        found[name] = names
    return found


def _split(base: Checkpoint, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of a weight file in parts whose headers are small enough."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = sum(_ENTRY_BYTES + len(json.dumps(each)) for each in base.tied_names(name))
        if parts[-1] and filled + size > _HEADER_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return [tuple(part) for part in parts]


def _numbered(stem: str, number: int) -> str:
    """Name of a safetensors file.

    >>> _numbered("model", 0), _numbered("model", 1)
    ('model.safetensors', 'model-1.safetensors')
    """
    return f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors"


def companion_files(base: Checkpoint) -> list[tuple[Path, str]]:
    """Config, tokenizer and other small files of the base's folder, with their names in it; no weights.

    They are regular files of known kinds that lie in the folder itself, or in the blobs that a snapshot of the Hub's
    cache links to: the output is published, and must not take along what a link leads to elsewhere. A subfolder comes
    along if it holds such files only (a pooling config, say). Those of a base that is an adapter on a model are the
    model's.

    Returns:
        Real paths, links resolved, and names in the output.
    """
    folder = _folder_of(base)
    if folder is None:
        return []
    entries = sorted(folder.iterdir())
    found = [(real_path(path), path.name) for path in entries if _belongs(path, folder)]
    for inner in entries:
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
            files = sorted(inner.iterdir())
            if all(_belongs(path, folder) for path in files):
                found += [(real_path(path), f"{inner.name}/{path.name}") for path in files]
    return found


def left_out(base: Checkpoint) -> list[str]:
    """Files of the base's folder that the merged folder lacks and its user may need.

    These are links that lead out of the folder, and small files of unknown kinds; weights and hidden files are not
    counted.
    """
    folder, copied = _folder_of(base), {name.partition("/")[0] for _, name in companion_files(base)}
    if folder is None:
        return []
    rest = [path for path in sorted(folder.iterdir()) if path.name not in copied and not path.name.startswith(".")]
    return [path.name for path in rest if path.name not in _OURS and not path.name.endswith(_WEIGHTS)]


def _folder_of(base: Checkpoint) -> Path | None:
    """The folder of a base, that of the model if it is an adapter on one; None for a file, or tensors in memory."""
    while isinstance(base, LoraCheckpoint):
        base = base.base
    folder = Path(base.source)
    return folder if base.files and folder.is_dir() else None


def _belongs(path: Path, folder: Path) -> bool:
    """True if a file is a small one of a known kind, and lies in the folder or among the blobs of its snapshot."""
    if path.name.startswith(".") or path.name in _OURS or path.name.endswith(_WEIGHTS):
        return False
    if path.suffix.lower() not in _KINDS and path.name not in _NAMES:
        return False
    real, home = real_path(path), real_path(folder)
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    inside = home in real.parents or (blobs is not None and real.parent == blobs)
    return inside and real.is_file() and real.stat().st_size <= _LARGEST


def write_companions(
    staging: Staging,
    base: Checkpoint,
    files: Mapping[str, Sequence[str]],
    nbytes: int,
    dtype: torch.dtype | None,
    record: Mapping[str, Any],
    prefix: str = "",
) -> list[str]:
    """Write everything that belongs beside the weights.

    Args:
        staging: The output.
        base: The base, whose small files are copied.
        files: Weight files to the names of the tensors that they hold.
        nbytes: Bytes of all tensors.
        dtype: Dtype asked for; None if the base's was kept.
        record: What goes to ``poe_merge.json``.
        prefix: Path of the folder in the output, with a slash at its end.

    Returns:
        Names of the files that were copied, which the record has as well.
    """
    copied = companion_files(base)
    for path, name in copied:
        staging.write(prefix + name, partial(shutil.copyfile, path))
    if dtype is not None and base.config is not None and "config.json" in [name for _, name in copied]:
        staging.write_json(f"{prefix}config.json", _with_dtype(base.config, str(dtype).removeprefix("torch.")))
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(places.items()))}
        staging.write_json(f"{prefix}model.safetensors.index.json", index)
    names = [name for _, name in copied]
    staging.write_record(prefix + RECORD, {**record, "copied": names}, ["tensors"])
    return names


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype entries, those of its parts included, say what is in the weights."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, Mapping) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def statuses(modules: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Number of matrices per status of the solver."""
    return Counter(module["status"] for module in modules)


def summary_of(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over the records of all tensors: per action, per status of the solver, and what rounding took back."""
    actions = Counter(record["action"] for record in tensors)
    updated, rounded_back = rounding_of(tensors)
    summary: dict[str, Any] = {
        "tensors": {action: actions[action] for action in ("merge", "average", "base")},
        "matrices": dict(statuses([module for record in tensors for module in record.get("modules", ())])),
    }
    return summary | ({"rounding": {"updated": updated, "rounded_back": rounded_back}} if updated else {})


def rounding_of(tensors: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Number of entries that the merge changed in half-precision tensors, and of those that rounding took back."""
    rounded = [record["rounding"] for record in tensors if "rounding" in record]
    return sum(each["updated"] for each in rounded), sum(each["rounded_back"] for each in rounded)
