"""Writing of safetensors files: fast for very many tensors, and the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import TensorSpec, serialize_file
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, the same bytes every time.

    It is what the function of this name in safetensors writes, without an array made of each tensor on the way, but for
    the order of the metadata, which is random there.

    Args:
        tensors: Names to tensors; those that share memory are each written.
        path: The file; one that is there is replaced.
        metadata: Its ``__metadata__``.
    """
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in held.items()
    }
    serialize_file(specs, path, metadata=metadata)
    if metadata is not None and len(metadata) > 1:
        _put_in_order(path)


def _put_in_order(path: Path) -> None:
    """Sort the metadata of a file that was just written; its header stays as long as it was."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
