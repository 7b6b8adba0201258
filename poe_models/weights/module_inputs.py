"""Second moments of the inputs of one layer, recorded by a hook as the rows that its weight multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from poe_models.weights.views import View

_Conv = nn.Conv1d | nn.Conv2d


class Recorder(ABC):
    """Sums ``X^T X`` over the rows ``X`` that a layer's weight is multiplied with.

    Args:
        layer: The layer.
        name: Name of its weight, for messages.
        view: The fitted view of the weight.
        shape: Shape of the weight.
        dtype: Dtype of the sums.
    """

    def __init__(self, layer: nn.Module, name: str, view: View, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.layer, self.name, self.view, self.shape, self.dtype = layer, name, view, shape, dtype
        self.counted: Tensor | None = None
        """Positions of the current batch that count, ``(b, T)`` bool; None for all."""
        self._sums: list[Tensor] | None = None
        self._rows = 0

    @abstractmethod
    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Inputs as rows ``(n, d_in)``: one tensor if all blocks see the same, else one for each block."""

    def attach(self) -> RemovableHandle:
        """Listen from now on, until the handle is removed."""
        return self.layer.register_forward_pre_hook(self._listen, with_kwargs=True)

    def moments(self) -> list[Tensor]:
        """``X^T X / n`` for each block of the view, ``(d_in, d_in)``.

        Raises:
            ValueError: If the layer saw no input.
        """
        if self._sums is None or self._rows == 0:
            raise ValueError(
                f"{self.name!r}: the forward pass never reached its layer, so that nothing is known about its inputs. "
                "Run what is fine-tuned, or keep or average the tensor with a rule."
            )
        blocks = len(self.view.block_shapes(self.shape))
        means = [total / self._rows for total in self._sums]
        return means * blocks if len(means) == 1 else means

    def _as_rows(self, x: Tensor) -> Tensor:
        """The positions that count as rows ``(n, d_in)``; all, if the input does not have these positions."""
        if self.counted is not None and x.shape[:-1] == self.counted.shape:
            return x[self.counted.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def _listen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = [each.detach().to(self.dtype) for each in self.rows(args, kwargs)]
        self._rows += len(rows[0])
        if self._sums is None:
            self._sums = [torch.zeros_like(each[:1].mT @ each[:1]) for each in rows]
        for total, each in zip(self._sums, rows, strict=True):
            total.addmm_(each.mT, each)


class _LinearInputs(Recorder):
    @override
    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return [self._as_rows(x)]


class _ConvolutionInputs(Recorder):
    layer: _Conv

    @override
    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        layer = self.layer
        axes = len(layer.kernel_size)
        x = x.unsqueeze(0) if x.ndim == axes + 1 else x
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        lift = (1,) * (2 - axes)  # a 1-D convolution is a 2-D one of height 1
        x = x.unsqueeze(-2) if axes == 1 else x
        patches = nn.functional.unfold(
            x, (*lift, *layer.kernel_size), dilation=(*lift, *layer.dilation), stride=(*lift, *layer.stride)
        )
        return [part.transpose(1, 2).flatten(0, 1) for part in patches.chunk(layer.groups, 1)]


class _AttentionInputs(Recorder):
    layer: nn.MultiheadAttention

    @override
    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        inputs = [given[name] for name in ("query", "key", "value")]
        if len({each.shape for each in inputs}) > 1:
            raise ValueError(
                f"{self.name!r}: query, key and value have different shapes, and one number of rows is wanted for all. "
                "Keep or average the tensor with a rule."
            )
        time_first = not self.layer.batch_first and inputs[0].ndim == 3
        return [self._as_rows(each.transpose(0, 1) if time_first else each) for each in inputs]


def recorder_of(model: nn.Module, name: str, view: View, dtype: torch.dtype) -> Recorder:
    """A recorder, not yet listening, of the layer whose weight is the tensor ``name``, seen by a fitted view.

    Raises:
        ValueError: If the tensor is not the weight of such a layer, or its view is not that of the layer.
    """
    owner, _, attribute = name.rpartition(".")
    layer = model.get_submodule(owner)
    shape = getattr(layer, attribute).shape
    kind: type[Recorder] | None = None
    transposed = False
    if isinstance(layer, nn.MultiheadAttention) and attribute == "in_proj_weight" and view.blocks == 3:
        kind = _AttentionInputs
    elif attribute == "weight" and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        kind = _kind_of(layer)
        transposed = type(layer).__name__ == "Conv1D"
    if kind is None:
        raise ValueError(
            f"{name!r}: what multiplies {attribute!r} of a {type(layer).__name__} is not known. Activations are "
            "collected for Linear, Conv1D, Conv1d and Conv2d weights and for in_proj_weight as three blocks; keep or "
            "average the tensor with a rule."
        )
    if view.stacked or view.transpose != transposed or (kind is _ConvolutionInputs and view.groups != _groups(layer)):
        raise ValueError(
            f"{name!r}: its rule sees it as '{view}', but the columns of a {type(layer).__name__}"
            f"{f' of {_groups(layer)} groups' if _groups(layer) > 1 else ''} are its inputs only as "
            f"'{View(transpose=transposed, groups=_groups(layer))}'. Give it that view with a rule."
        )
    return kind(layer, name, view, shape, dtype)


def _kind_of(layer: nn.Module) -> type[Recorder] | None:
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        return _LinearInputs
    return _ConvolutionInputs if isinstance(layer, nn.Conv1d | nn.Conv2d) else None


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))
