"""Experts that see a merged model's outputs: predictions on a few unlabelled inputs, or any loss, as factors.

:func:`functional` compares with what an expert predicts; :func:`prediction_expert` takes any function of the outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.functional.divergences import Divergence, KullbackLeibler, Targets
from inference.functional.span_model import Forward, SpanModel
from poe_models.experts import FactorExpert
from poe_models.limits import require_positive
from poe_models.printing import Brief
from poe_models.weights.batches import mapped, tensors_of


@dataclass(frozen=True, eq=False, repr=False)
class OutputEnergy(Brief):
    """The function of a factor expert over examples: coefficients ``(..., M, K)`` and rows ``(b,)`` to ``(..., b)``.

    Attributes:
        model: The network as a function of coefficients.
        forward: Outputs of a batch of inputs.
        inputs: Inputs of all ``n`` examples: a tensor ``(n, ...)``, or a mapping or sequence of such.
        divergence: Nats per example of outputs and targets.
        targets: What the divergence compares with, indexed by rows as the inputs are; None if it compares with nothing.
        importance: Factor on the energy.
    """

    model: SpanModel
    forward: Forward
    inputs: Any
    divergence: Divergence
    targets: Any
    importance: float = 1.0

    def outputs(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Outputs ``(b, ..., C)`` under merged weights, of one draw's coefficients ``(M, K)``."""
        inputs = rows_of(self.inputs, rows, coefficients.device)
        found = self.model.call(coefficients, self.forward, inputs)
        if found.ndim < 2 or len(found) != len(rows):
            raise ValueError(
                f"the forward function gave {tuple(found.shape)} for {len(rows)} examples: expected logits "
                "(n, classes) or (n, tokens, classes), one row for each example."
            )
        return found

    def cost(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Nats per example ``(b,)`` of outputs, the importance included."""
        targets = None if self.targets is None else rows_of(self.targets, rows, outputs.device)
        try:
            found = self.importance * self.divergence(outputs, targets)
        except IndexError as error:  # as of a cross-entropy
            raise ValueError(
                f"the divergence cannot compare outputs {tuple(outputs.shape)} with its targets: {error} Give labels "
                f"of 0 to {outputs.shape[-1] - 1}."
            ) from error
        if found.shape != rows.shape:
            raise ValueError(
                f"the divergence gave {tuple(found.shape)} for {len(rows)} examples. Sum over all but the first "
                "dimension."
            )
        return found

    def __call__(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Nats per example; leading dimensions are draws, one forward pass for each."""
        draws = coefficients.reshape(-1, *coefficients.shape[-2:])
        found = torch.stack([self.cost(self.outputs(draw, rows), rows) for draw in draws])
        return found.reshape(*coefficients.shape[:-2], len(rows))


def prediction_expert(
    name: str,
    model: SpanModel,
    inputs: Any,
    forward: Forward,
    divergence: Divergence,
    targets: Any = None,
    *,
    importance: float = 1.0,
    subsample_size: int | None = None,
    batch_size: int | None = 64,
) -> FactorExpert:
    """A researcher's own function of the merged model's outputs as an expert: entropy, a few-shot loss, a constraint.

    Args:
        name: Of the expert.
        model: The network as a function of coefficients.
        inputs: Inputs of ``n`` examples: a tensor ``(n, ...)``, or a mapping or sequence of such, or a list of batches
            of equal trailing shapes from :func:`joined_batches`.
        forward: Outputs ``(b, ..., C)`` of the network and a batch of inputs.
        divergence: Outputs and targets to nats per example, ``(b,)``.
        targets: What it compares with, such as labels ``(n,)``.
        importance: ``a``, factor on the sum; the experts' relative voice.
        subsample_size: Examples in a mini-batch of the Pyro program.
        batch_size: Examples at a time in sums over all.

    Raises:
        ValueError: If there are no examples, or the importance is not positive.

    Example:
        >>> entropy = lambda logits, _: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        >>> few_shot = lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    """
    count = count_of(inputs)
    if targets is not None and count_of(targets) != count:
        raise ValueError(
            f"`prediction_expert({name!r})`: {count_of(targets)} targets for {count} inputs. Give as many."
        )
    require_positive(f"prediction_expert({name!r}, ", importance=importance)
    energy = OutputEnergy(model, forward, inputs, divergence, targets, importance)
    limit = None if batch_size is None else min(batch_size, count)
    return FactorExpert(name, energy, "span", "examples", count, subsample_size, limit)


def functional(
    expert: str,
    model: SpanModel,
    inputs: Any,
    forward: Forward,
    divergence: Divergence | None = None,
    *,
    targets: Targets | None = None,
    counted: Tensor | None = None,
    name: str | None = None,
    importance: float = 1.0,
    subsample_size: int | None = None,
    batch_size: int | None = 64,
) -> FactorExpert:
    """An expert over predictions on unlabelled inputs of its task: the energy ``a sum_x D(x; Z)`` in nats.

    Args:
        expert: The task vector whose predictions are the target.
        model: The network as a function of coefficients.
        inputs: As in :func:`prediction_expert`.
        forward: As there.
        divergence: ``D``; default :class:`~inference.functional.divergences.KullbackLeibler`.
        targets: The expert's predictions, if they are already there; by default they are computed once, in batches.
        counted: Mask ``(n, tokens)`` of the tokens that are observations; not with ``targets``, which have theirs.
        name: Of the factor; default ``<expert>/predictions``.
        importance: As in :func:`prediction_expert`.
        subsample_size: As there.
        batch_size: As there.

    Raises:
        ValueError: If the name is no task vector's, or predictions are NaN or of other shapes than expected.
    """
    if targets is not None and counted is not None:
        raise ValueError(f"`functional({expert!r})`: give the mask with the targets: `Targets(outputs, counted)`.")
    if targets is None:
        targets = predictions(expert, model, inputs, forward, counted, batch_size)
    else:
        _require_same_classes(expert, model, inputs, forward, targets)
    return prediction_expert(
        name or f"{expert}/predictions",
        model,
        inputs,
        forward,
        divergence or KullbackLeibler(),
        targets,
        importance=importance,
        subsample_size=subsample_size,
        batch_size=batch_size,
    )


def predictions(
    name: str,
    model: SpanModel,
    inputs: Any,
    forward: Forward,
    counted: Tensor | None = None,
    batch_size: int | None = 64,
) -> Targets:
    """Outputs of one expert on inputs, a batch at a time; arguments as in :func:`functional`.

    Raises:
        ValueError: If the name is no task vector's, or an output is NaN.
    """
    return Targets(torch.cat(list(prediction_batches(name, model, inputs, forward, counted, batch_size))), counted)


def prediction_batches(
    name: str, model: SpanModel, inputs: Any, forward: Forward, counted: Tensor | None, batch_size: int | None
) -> Iterator[Tensor]:
    """Outputs of one expert on inputs; arguments and errors as in :func:`predictions`.

    Yields:
        Outputs ``(b, ..., C)`` of one batch after another.
    """
    if name not in model.names:
        raise ValueError(f"`functional({name!r})`: no such task vector. There are {', '.join(model.names)}.")
    count, own = count_of(inputs), model.expert(name)
    for rows in torch.arange(count).split(batch_size or count):
        with torch.no_grad():
            outputs = model.call(own, forward, rows_of(inputs, rows, own.device), averages=name)
        seen = outputs if counted is None else outputs[counted[rows.to(counted.device)]]
        if bool(seen.isnan().any()):
            raise ValueError(
                f"`functional({name!r})`: the expert's outputs are NaN in the batch of rows {int(rows[0])} to "
                f"{int(rows[-1])}. Look at these inputs, or at the checkpoint."
            )
        yield outputs


@torch.no_grad()
def _require_same_classes(expert: str, model: SpanModel, inputs: Any, forward: Forward, targets: Targets) -> None:
    first = model.call(model.expert(expert), forward, rows_of(inputs, torch.arange(1), model.span.transform.device))
    if first.shape[1:] != targets.outputs.shape[1:] and first.ndim > 1:
        raise ValueError(
            f"`functional({expert!r}, targets=...)`: targets of {tuple(targets.outputs.shape[1:])} classes, and "
            f"outputs of {tuple(first.shape[1:])} per example. Give the predictions of a model with the same head."
        )


def rows_of(data: Any, rows: Tensor, device: torch.device | None = None) -> Any:
    """Some rows of tensors, or of mappings, sequences and dataclasses of tensors, on a device (default: their own)."""
    return mapped(lambda each: each[rows.to(each.device)].to(device or each.device), data)


def count_of(data: Any) -> int:
    """Number of examples.

    Raises:
        ValueError: If there are none, or the tensors differ in it.
    """
    counts = {len(each) if each.ndim else 0 for each in tensors_of(data)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"inputs of {sorted(counts) or 'no'} examples: give tensors with one row for each example, one at least."
        )
    return counts.pop()


def joined_batches(batches: Sequence[Any]) -> Any:
    """Batches of a loader as one set of inputs.

    Args:
        batches: Tensors, or mappings or sequences of tensors, of equal trailing shapes.

    Raises:
        ValueError: If there are none, or they differ in their trailing shapes.

    >>> joined_batches([{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 3)}])["x"].shape
    torch.Size([3, 3])
    """
    if not batches:
        raise ValueError("`joined_batches([])`: no batches. Give one at least.")
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: joined_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(joined_batches(list(part)) for part in zip(*batches, strict=True))
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(f"`joined_batches(...)`: batches of shapes {sorted(shapes)}. Pad all inputs to one length.")
    return torch.cat(list(batches))


def example_digests(inputs: Any) -> set[str]:
    """One digest for the inputs of each example, by their values: the same inputs have the same elsewhere.

    >>> len(example_digests(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])))
    2
    """

    def digest(row: int) -> str:
        found = hashlib.sha256()
        for each in tensors_of(rows_of(inputs, torch.tensor([row]))):
            found.update(each.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]

    return {digest(row) for row in range(count_of(inputs))}
