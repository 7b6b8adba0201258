"""Recognise quantised weights, which cannot be subtracted from one another, and tell them from integer buffers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from poe_models._checkpoint import CheckpointError, TensorInfo

# Names that only a quantiser writes, and what they belong to.
_MARKERS = (
    (r"(^|\.)(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[\w.]+)$", "bitsandbytes 4-bit"),
    (r"(^|\.)(SCB|weight_format)$", "bitsandbytes int8"),
    (r"(^|\.)weight_packed$", "compressed-tensors"),
    (r"(^|\.)weight_scale_inv$", "block-scaled fp8"),
    (r"(^|\.)W_q$", "HQQ"),
)
_SUB_BYTE = re.compile(r"\.(u?int[1-7]$|qu?int|bits)")
_PACKED = (torch.int8, torch.uint8)
# Integer tensors with two or more axes that are tables and masks rather than packed weights, by the end of their name.
_BUFFER = re.compile(r"(bias|mask|ids?|index|indices|table|tracked|buffer|state|positions?|counts?|offsets?)$")


def refuse_quantised(source: str, tensors: Iterable[TensorInfo], config: dict[str, Any] | None) -> None:
    """Raise if a checkpoint's header or config says that its weights are quantised.

    Integer buffers (position ids, counters, masks) are no weights and pass.

    Args:
        source: what to call the checkpoint in the message.
        tensors: its headers.
        config: its `config.json`, or None.

    Raises:
        CheckpointError: naming the kind of quantisation and the tensor or the config key.
    """
    if config is not None and config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        raise _error(source, f"config.json has `quantization_config` (method {method!r})")
    for info in tensors:
        kind = quantisation_of(info)
        if kind is not None:
            raise _error(source, f"tensor {info.name!r} ({str(info.dtype).removeprefix('torch.')}) is {kind}")


def quantisation_of(info: TensorInfo) -> str | None:
    """Name the kind of quantisation a tensor belongs to.

    Args:
        info: header of one tensor.

    Returns:
        The kind, or None for ordinary weights and for integer buffers.

    >>> quantisation_of(TensorInfo("fc.weight", (4, 4), torch.int8))
    'packed integer weights'
    >>> quantisation_of(TensorInfo("position_ids", (1, 512), torch.int64)) is None
    True
    """
    for pattern, kind in _MARKERS:
        if re.search(pattern, info.name):
            return kind
    dtype = str(info.dtype)
    if "float8" in dtype or "float4" in dtype:
        return "fp8 or fp4 weights"
    if _SUB_BYTE.search(dtype):
        return "packed integer weights"
    integer = not (info.dtype.is_floating_point or info.dtype.is_complex or info.dtype == torch.bool)
    last = info.name.rpartition(".")[2]
    if integer and len(info.shape) >= 2 and (last == "weight" or (info.dtype in _PACKED and not _BUFFER.search(last))):
        return "packed integer weights"
    return None


def _error(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"`open_checkpoint({source!r})`: {what}: quantised weights cannot be merged. Give the checkpoint in a floating "
        "dtype (float32, bfloat16 or float16), for instance the one it was quantised from."
    )
