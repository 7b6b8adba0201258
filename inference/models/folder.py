"""Files beside the weights of a merged folder: config and tokenizer, an index of shards, the record of the merge."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inference.models.staging import Staging
from poe_models.weights.loading import Checkpoint

RECORD = "poe_merge.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json")
_OURS = ("README.md", RECORD, "adapter_config.json")
_LARGEST = 100 * 2**20
_HUB_FOLDER = re.compile(r"models--([^/\\]+)--([^/\\]+)")


def weight_files(base: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Weight files of an output with the names of their tensors: the base's, as safetensors, under different names."""
    found: dict[str, tuple[str, ...]] = {}
    for file, names in base.layout.items():
        stem = file.removesuffix(".safetensors")
        if stem == file:  # as transformers calls them
            stem = Path(file).stem.replace("pytorch_model", "model")
        number = next(n for n in range(len(found) + 1) if _numbered(stem, n) not in found)
        found[_numbered(stem, number)] = names
    return found


def _numbered(stem: str, number: int) -> str:
    """Name of a safetensors file.

    >>> _numbered("model", 0), _numbered("model", 1)
    ('model.safetensors', 'model-1.safetensors')
    """
    return f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors"


def companion_files(base: Checkpoint) -> list[tuple[Path, str]]:
    """Config, tokenizer and other small files of the base's folder, with their names in it; no weights.

    A subfolder comes along if it holds small files only (a pooling config, say).
    """
    folder = Path(base.source)
    if not base.files or not folder.is_dir():
        return []
    found = [(path, path.name) for path in sorted(folder.iterdir()) if path.is_file() and _small(path)]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(inner.iterdir())
        if all(path.is_file() and _small(path) for path in files):
            found += [(path, f"{inner.name}/{path.name}") for path in files]
    return found


def _small(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in _OURS
    return not hidden and not path.name.endswith(_WEIGHTS) and path.stat().st_size <= _LARGEST


def write_companions(
    staging: Staging,
    base: Checkpoint,
    files: Mapping[str, Sequence[str]],
    nbytes: int,
    dtype: torch.dtype | None,
    record: Mapping[str, Any],
    prefix: str = "",
) -> None:
    """Write everything that belongs beside the weights.

    Args:
        staging: The output.
        base: The base, whose small files are copied.
        files: Weight files to the names of their tensors, tied ones included.
        nbytes: Bytes of all tensors.
        dtype: Dtype asked for; None if the base's was kept.
        record: What goes to ``poe_merge.json``.
        prefix: Path of the folder in the output, with a slash at its end.
    """
    for path, name in companion_files(base):
        staging.write(prefix + name, partial(shutil.copyfile, path))
    if dtype is not None and base.config is not None:
        staging.write_json(f"{prefix}config.json", _with_dtype(base.config, str(dtype).removeprefix("torch.")))
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(places.items()))}
        staging.write_json(f"{prefix}model.safetensors.index.json", index)
    staging.write_json(prefix + RECORD, record)


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


def hub_id(source: str) -> str | None:
    """The Hub's id of a downloaded model.

    >>> hub_id("/cache/models--org--name/snapshots/0123abc")
    'org/name'
    """
    found = _HUB_FOLDER.search(source)
    return f"{found[1]}/{found[2]}" if found else None


def short_source(source: str) -> str:
    """A checkpoint's name without the folders of the machine it was on."""
    path = Path(source)
    generic = path.stem in ("model", "pytorch_model", "adapter_model")
    return hub_id(source) or (f"{path.parent.name}/{path.name}" if generic else path.name)
