"""Batches of any kind opened by one helper: mappings, dataclasses, model outputs, named tuples, nested containers.

``BatchEncoding``, which a tokenizer returns, is a mapping that torch's own pytree takes for a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import UnionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

DEEPEST = 50
"""Most levels of containers in a batch."""
IGNORED = -100
"""The label of what does not count, in batches."""


def tensors_of(batch: Any, depth: int = DEEPEST) -> Iterator[Tensor]:
    """Every tensor in a batch, in order.

    Args:
        batch: The batch.
        depth: Most levels of nesting.

    Yields:
        The tensors.

    Raises:
        ValueError: If the batch is nested deeper.
    """
    if isinstance(batch, Tensor):
        yield batch
        return
    if depth == 0:
        raise ValueError(f"a batch of more than {DEEPEST} levels of containers. Give a flat one.")
    for item in _items(batch).values():
        yield from tensors_of(item, depth - 1)


def mapped(change: Callable[[Any], Any], batch: Any, kind: type | UnionType = Tensor) -> Any:
    """The same batch with each of its tensors changed; containers keep their type, and the batch stays as it is.

    Args:
        change: Maps each tensor.
        batch: The batch.
        kind: Type of what is changed, if not tensors.

    >>> mapped(lambda x: x + 1, {"x": [torch.tensor(1), "text"]})
    {'x': [tensor(2), 'text']}
    """
    if isinstance(batch, kind):
        return change(batch)
    parts = _items(batch)
    items = {key: mapped(change, item, kind) for key, item in parts.items()}
    if all(items[key] is item for key, item in parts.items()):
        return batch
    if isinstance(batch, PackedSequence):
        items[1] = batch.batch_sizes  # torch wants these on the CPU
    if isinstance(batch, tuple):
        return type(batch)._make(items.values()) if hasattr(batch, "_make") else type(batch)(items.values())
    if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
        return items
    made = copy.copy(batch)
    for key, item in items.items():
        if isinstance(batch, list | MutableMapping):
            made[key] = item
        else:  # a dataclass, also a frozen one
            object.__setattr__(made, key, item)
    return made


def fingerprint(batch: Any) -> str:
    """Digest of the dtypes, shapes and values of a batch's tensors, which another batch does not have.

    Raises:
        ValueError: If no tensor is found, so that nothing could tell it from another.
    """
    digest, count = hashlib.blake2b(), 0
    for tensor in tensors_of(batch):
        count += 1
        dense = tensor.detach().cpu() if tensor.layout == torch.strided else tensor.detach().cpu().to_dense()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(dense.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data)
    if count == 0:
        raise ValueError(
            f"no tensor is found in a batch of type {type(batch).__name__}. Let the loader give tensors, or containers "
            "of them: tuples, lists, mappings, dataclasses."
        )
    return digest.hexdigest()


def require_classes(labels: Tensor, classes: int, where: str) -> None:
    """Refuse integer labels that name no class.

    >>> require_classes(torch.tensor([0, 2]), 3, "batch 0")

    Raises:
        ValueError: If one is negative, or not below the number of classes; says where it is.
    """
    values = labels.long()  # torch compares no unsigned integers above 8 bits
    outside = (values < 0) | (values >= classes)
    if bool(outside.any()):
        raise ValueError(
            f"{where}: label {int(values[outside][0])} with {classes} classes. Give 0 to {classes - 1}, and leave out "
            f"what has no label (in batches it is {IGNORED})."
        )


def _items(batch: Any) -> dict[Any, Any]:
    """The parts of a container by their keys; nothing of what is none."""
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, tuple | list):
        return dict(enumerate(batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch) if hasattr(batch, each.name)}
    return {}
