"""State dicts: which part of a loaded PyTorch file is one, and which tensors can be merged at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from poe_models._checkpoint import CheckpointError


def state_dict_of(loaded: Any, source: str) -> dict[str, Tensor]:
    """Find the state dict in what a PyTorch file holds.

    Either the object itself maps names to tensors, or its entry `"state_dict"` or `"model"` does, every leaf of it a
    tensor. Other entries of such a training checkpoint (optimizer, epoch) are not weights and are left alone.

    Args:
        loaded: the unpickled object.
        source: what to call the file in messages.

    Returns:
        Name to tensor.

    Raises:
        CheckpointError: if there is no such mapping, or more than one.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{source}: holds a {type(loaded).__name__}, not a state dict. Save `model.state_dict()` with `torch.save`."
        )
    if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return check_plain(loaded, source)
    inner = [key for key, value in loaded.items() if _is_state_dict(value)]
    if len(inner) == 1 and inner[0] in {"state_dict", "model"}:
        return check_plain(loaded[inner[0]], source)
    if len(inner) > 1:
        raise CheckpointError(
            f"{source}: holds more than one state dict ({', '.join(map(repr, inner))}). Save the one to merge by "
            "itself."
        )
    odd = [f"{key!r} ({type(value).__name__})" for key, value in loaded.items() if not isinstance(value, Tensor)]
    raise CheckpointError(
        f"{source}: not a state dict: {', '.join(odd[:5]) or 'it is empty'}{', ...' if len(odd) > 5 else ''}. Expected "
        "a dict of tensors, or one under 'state_dict' or 'model' whose every leaf is a tensor."
    )


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(leaf, Tensor) for leaf in value.values())


def check_plain(tensors: Mapping[Any, Tensor], source: str) -> dict[str, Tensor]:
    """Refuse tensors that have no ordinary dense data.

    Args:
        tensors: name to tensor.
        source: what to call their origin in messages.

    Returns:
        The same tensors as a dict.

    Raises:
        CheckpointError: naming the first tensor that is quantised, sparse, without data, or of a foreign subclass.
    """
    for name, tensor in tensors.items():
        plain = type(tensor) in {Tensor, torch.nn.Parameter, torch.nn.Buffer}
        if (
            not isinstance(name, str)
            or not plain
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.layout != torch.strided
        ):
            kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}, device {tensor.device}"
            raise CheckpointError(
                f"{source}: tensor {name!r} is not an ordinary dense tensor with a name ({kind}). Quantised, sparse "
                "and meta tensors cannot be merged: give dense floating weights."
            )
    return dict(tensors)
