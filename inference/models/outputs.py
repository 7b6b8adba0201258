"""Rows of a model's output: one for each example, or each token under the attention mask.

The conventions are those of transformers: an output has ``logits``; positions whose label is -100 (torch's
``ignore_index``) or whose attention mask is 0 do not count; a causal language model's logits at one position are about
the label of the next.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poe_models.weights.batches import IGNORED

Forward = Callable[[nn.Module, Any], Any]
"""From a model and a batch of the loader to a tensor, or a model output with ``logits``."""
_CAUSAL = re.compile(r"ForCausalLM|LMHeadModel")
_FORWARD = "`forward=lambda model, batch: ...`"


@dataclass(frozen=True, eq=False)
class Rows:
    """One row for each example or token that counts.

    Attributes:
        values: Log probabilities ``(n, classes)``, or values ``(n, *shape)``; float64 on the CPU.
        labels: ``(n,)`` integers, where the batch has them.
        examples: ``(n,)`` int64, the position in the batch of each row's example.
        num_examples: Number of examples of the batch, those without a row that counts included.
    """

    values: Tensor
    labels: Tensor | None
    examples: Tensor
    num_examples: int


def called(model: nn.Module, batch: Any) -> Tensor:
    """Call a model with a batch, a mapping as keyword arguments, or with the first of a pair; gives its logits.

    Labels are left out, but for an encoder-decoder, which makes its decoder's inputs of them.

    Raises:
        ValueError: If the batch does not fit the model, or the output has no logits.
    """
    output = output_of(model, batch)
    if isinstance(output, Tensor) and output.ndim > 2:
        raise ValueError(
            f"`predict(...)`: the model gives a tensor {tuple(output.shape)}, which may be logits of tokens or a "
            f"hidden state. Give {_FORWARD} that returns logits (b, classes) or (b, tokens, classes)."
        )
    return tensor_of(output)


def output_of(model: nn.Module, batch: Any) -> Any:
    """Whatever a model gives for a batch, a mapping as keyword arguments, or for the first of a pair.

    Raises:
        ValueError: If the batch does not fit the model.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, Mapping):
        needed = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        inputs = {key: value for key, value in inputs.items() if key != "labels" or needed}
        _check_arguments(model, inputs)
        return model(**inputs)
    return _called_with(model, inputs)


def _called_with(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor; anything else that the model does not take is one error."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    try:
        return model(inputs)
    except (TypeError, AttributeError) as error:
        given, taker = type(inputs).__name__, type(model).__name__
        raise ValueError(
            f"`predict(...)`: a batch is of type {given}, with which `{taker}` cannot be called: {error}. "
            f"Give {_FORWARD} that calls the model with the batch's tensors."
        ) from error


def tensor_of(output: Any) -> Tensor:
    """The logits of a model output, or the tensor itself.

    Raises:
        ValueError: If there are none, as from a model without a head.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = output if isinstance(output, Tensor) else found
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 0:
        return found
    has = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    hidden = "last_hidden_state" in has
    head = " The model has no head: a hidden state is no prediction. Give the model with its head, or" if hidden else ""
    raise ValueError(
        f"`predict(...)`: a batch gave {type(output).__name__}{has}, in which no logits are found.{head or ' Give'} "
        f"{_FORWARD} that returns one tensor: logits, or to `predict_values` embeddings or regressions."
    )


def _check_arguments(model: nn.Module, inputs: Mapping[Any, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        raise ValueError(
            f"`predict(...)`: the batches are mappings with {', '.join(map(str, inputs))}, which do not fit "
            f"`{type(model).__name__}.forward`: {error}. Give `forward=lambda model, batch: model(batch[...])`, or "
            "what fits."
        ) from error


def class_rows(model: nn.Module, logits: Tensor, batch: Any, index: int) -> Rows:
    """Log probabilities of the examples or tokens of a batch that count, with their labels.

    Args:
        model: The model, which may be a causal language model.
        logits: ``(b, classes)`` or ``(b, tokens, classes)``; -inf rules a class out.
        batch: The batch.
        index: Its number.

    Raises:
        ValueError: If the logits are no such table, NaN, or leave no class.
    """
    if logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        way = "values: `predict_values`" if logits.shape[-1] == 1 else f"logits by {_FORWARD}"
        raise ValueError(
            f"`predict(...)`: batch {index} gave a tensor {tuple(logits.shape)}, expected logits (b, classes) or (b, "
            f"tokens, classes), of two classes at least. Predict {way}."
        )
    labels, mask = labels_of(batch, logits.shape[:-1]), _mask_of(model, batch, logits.shape[:-1])
    if logits.ndim == 3 and labels is not None and _CAUSAL.search(type(model).__name__):
        logits, labels, mask = logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]
    rows = _counted(logits, logits.shape[:-1], labels, mask)
    values = rows.values.log_softmax(-1)
    if bool(values.isnan().any()):
        raise ValueError(
            f"`predict(...)`: batch {index}: a member gives logits that are NaN, +inf, or -inf for every class. Its "
            "weights may be far from the experts': lower the temperature, or raise the anchor's precision."
        )
    return replace(rows, values=values)


def value_rows(model: nn.Module, values: Tensor, batch: Any, index: int) -> Rows:
    """Values of the examples of a batch, or of its tokens that count; arguments and errors as ``class_rows``."""
    mask = _mask_of(model, batch, values.shape[:-1]) if values.ndim == 3 else None
    rows = _counted(values, values.shape[:1] if mask is None else mask.shape, None, mask)
    if not bool(rows.values.isfinite().all()):
        raise ValueError(
            f"`predict_values(...)`: batch {index}: a member gives values that are NaN or infinite. Its weights may be "
            "far from the experts': lower the temperature, or raise the anchor's precision."
        )
    return rows


def labels_of(batch: Any, shape: torch.Size) -> Tensor | None:
    """Integer labels of a mapping, or of a pair of inputs and labels; None if there are none.

    Raises:
        ValueError: If those of a mapping have as many axes as the rows, but are not as many.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if pair else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    if labels.shape == shape:
        return labels
    if isinstance(batch, Mapping) and labels.ndim == len(shape):
        raise ValueError(
            f"`predict(...)`: labels {tuple(labels.shape)} for logits {tuple(shape)} without their classes. Give one "
            "label for each row of logits, or leave them out of the batches."
        )
    return None


def _mask_of(model: nn.Module, batch: Any, shape: torch.Size) -> Tensor | None:
    """The attention mask, of the decoder's tokens if there is one; None where it is not about these rows."""
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = (
        inputs.get("decoder_attention_mask" if decodes else "attention_mask") if isinstance(inputs, Mapping) else None
    )
    return mask if isinstance(mask, Tensor) and mask.shape == shape else None


def _counted(values: Tensor, leading: torch.Size, labels: Tensor | None, mask: Tensor | None) -> Rows:
    """The rows of values with these leading axes that are neither ignored nor padding."""
    counts = torch.ones(leading, dtype=torch.bool)
    for kept in (None if labels is None else labels != IGNORED, mask):
        counts = counts if kept is None else counts & kept.cpu().bool()
    own = None if labels is None else labels.cpu()[counts].long()
    examples = counts.nonzero()[:, 0]
    return Rows(values.detach().cpu()[counts].double(), own, examples, leading[0])
