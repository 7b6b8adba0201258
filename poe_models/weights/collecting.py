"""Moments of a model's modules on data: exact diagonal Fisher information, second moments of inputs.

Both are collected for the tensors that a merge sees as matrices and in the orientation it sees them, so that blocks of
fused projections, GPT-2's transposed ``Conv1D`` and flattened convolutions come out as
:class:`~poe_models.weights.task_vectors.ModuleUpdates` has them::

    for name, model in tuned_models.items():
        fisher[name] = collect_fisher(model, loaders[name], forward, vectors.views)
    poe = ProductOfExperts.of(vectors.names, Fisher(ModuleMoments("fisher", fisher)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poe_models.weights.batches import mapped, require_classes, tensors_of
from poe_models.weights.checkpoint import nearest
from poe_models.weights.module_inputs import recorder_of
from poe_models.weights.task_vectors import block_names
from poe_models.weights.views import View

Forward = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to logits, ``(b, classes)``."""
Progress = Callable[[int, int], None]
"""Called with the number of finished batches and of all batches, 0 if that is unknown."""


def collect_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Forward,
    views: Mapping[str, View],
    *,
    labels: Callable[[Any], Tensor] | None = None,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Exact diagonal Fisher information, ``mean_b sum_c p(c | x_b) (d log p(c | x_b) / d W)^2``.

    Gradients are squared for one example and one class at a time: nothing is summed before it is squared, so the result
    does not depend on the size of batches. That takes as many backward passes as there are classes, or one for each
    example if ``labels`` are given.

    Args:
        model: Model with the expert's weights; it runs in evaluation mode and is left as it was.
        loader: Batches; their tensors must have the examples along the first axis.
        forward: Logits of a batch, ``(b, classes)``; several rows of one example (tokens) are added up.
        views: Tensors to collect for, by their name in the checkpoint: ``TaskVectors.views``.
        labels: Classes of a batch, one for each row of its logits: gives the *empirical* Fisher information, with the
            labels in place of the expectation over the model's own predictions.
        prefix: Prefix of the model's names before those of the checkpoint, such as ``"bert."``.
        dtype: Dtype of the sums.
        progress: Called after each batch.

    Returns:
        Fisher information ``(d_out, d_in)`` of each module, by name.

    Raises:
        ValueError: If the model lacks a tensor, there are no batches, or batches, logits or labels have other shapes.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> found = collect_fisher(model, [torch.tensor([[2.0]])], lambda model, x: model(x), {"weight": View()})
    >>> found["weight"]  # p (1 - p) x^2
    tensor([[1.],
            [1.]])
    """
    parameters = _tensors_of(model, views, prefix)
    names, tensors = list(parameters), list(parameters.values())
    sums = [torch.zeros_like(tensor, dtype=dtype) for tensor in tensors]
    count = 0
    with evaluating(model), _requiring_gradients(model, tensors), torch.enable_grad():
        for batch in _reported(loader, progress):
            for example in _examples(batch):
                given = None if labels is None else labels(example)
                for probability, log_probability in _terms(forward(model, example), given):
                    gradients = torch.autograd.grad(log_probability, tensors, retain_graph=True, allow_unused=True)
                    for total, gradient in zip(sums, gradients, strict=True):
                        if gradient is not None:
                            total.add_(gradient.detach().to(dtype).square_(), alpha=probability)
                count += 1
    return _blocks(views, {name: total.div_(count) for name, total in zip(names, sums, strict=True)})


def collect_activations(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    views: Mapping[str, View],
    *,
    counted: Callable[[Any], Tensor | None] | None = None,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Second moments ``X X^T / n`` of the inputs of linear layers and convolutions, over all rows of all examples.

    Rows are tokens or positions; a convolution's are the patches that its kernel sees. They are recorded by hooks while
    the model runs in evaluation mode, without gradients.

    Args:
        model: Model with the expert's weights; it is left as it was.
        loader: Batches.
        forward: Runs the model on a batch; its result is not used.
        views: Tensors to collect for, by their name in the checkpoint: ``TaskVectors.views``.
        counted: Positions ``(b, T)`` of a batch that count, such as its attention mask, so that padding does not; all
            where it gives None.
            Layers whose inputs do not have these leading axes (convolutions, pooled features) count all.
        prefix: Prefix of the model's names before those of the checkpoint, such as ``"bert."``.
        dtype: Dtype of the sums; float64 where inputs differ by orders of magnitude.
        progress: Called after each batch.

    Returns:
        Second moments ``(d_in, d_in)`` of each module, by name; blocks that see the same inputs share one tensor.

    Raises:
        ValueError: If a tensor is not the weight of a layer whose inputs are known, a layer is never reached, or there
            are no batches.

    >>> model = nn.Linear(2, 3)
    >>> found = collect_activations(model, [torch.eye(2)], lambda model, x: model(x), {"weight": View()})
    >>> found["weight"]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    tensors = _tensors_of(model, views, prefix)
    recorders = {
        name: recorder_of(model, prefix + name, view.fitted(tensors[name].shape), dtype) for name, view in views.items()
    }
    handles = [recorder.attach() for recorder in recorders.values()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in _reported(loader, progress):
                mask = None if counted is None else counted(batch)
                for recorder in recorders.values():
                    recorder.counted = None if mask is None else mask.bool()
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for name, recorder in recorders.items():
        blocks = recorder.moments()
        found |= zip(block_names(name, len(blocks)), blocks, strict=True)
    return found


def _tensors_of(model: nn.Module, views: Mapping[str, View], prefix: str) -> dict[str, Tensor]:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in views:
        if prefix + name not in own:
            raise ValueError(
                f"the model has no parameter {prefix + name!r}{nearest(prefix + name, own)}. Give "
                "the `prefix` that its names have before the checkpoint's, or the model of this architecture."
            )
    if not views:
        raise ValueError("`views={}`: no tensors to collect for. Give `TaskVectors.views`.")
    return {name: own[prefix + name] for name in views}


def _terms(logits: Any, labels: Tensor | None) -> Iterator[tuple[float, Tensor]]:
    # The weight of a squared gradient and the log probability to differentiate, of each row and class of one example.
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"`forward(model, batch)` gave {got} for one example. Return logits (rows, classes).")
    log_probabilities = logits.log_softmax(-1)
    if labels is None:
        for row in log_probabilities:
            yield from zip(row.exp().tolist(), row, strict=True)
        return
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`labels(batch)` gave {tuple(labels.shape)} for one example with logits {tuple(logits.shape)}. Return one "
            "class for each row."
        )
    require_classes(labels, logits.shape[1], "`labels(batch)`")
    yield from ((1.0, row[label]) for row, label in zip(log_probabilities, labels.tolist(), strict=True))


def _examples(batch: Any) -> Iterator[Any]:
    # Each example of a batch, as a batch of one.
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    sizes = {len(leaf) for leaf in tensors_of(batch) if leaf.ndim > 0}
    if len(sizes) != 1:
        raise ValueError(
            f"a batch ({type(batch).__name__}) has tensors of lengths {sorted(sizes)}, and Fisher information is "
            "collected example by example. Give batches of tensors with the examples along the first axis."
        )
    for index in range(sizes.pop()):
        one = slice(index, index + 1)
        yield mapped(partial(_taken, one), batch)


def _taken(rows: slice, tensor: Tensor) -> Tensor:
    return tensor[rows] if tensor.ndim > 0 else tensor


def _blocks(views: Mapping[str, View], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = views[name].fitted(tensor.shape).split(tensor)
        blocks = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        found |= zip(block_names(name, len(blocks)), blocks, strict=True)
    return found


def _reported(loader: Iterable[Any], progress: Progress | None) -> Iterator[Any]:
    done, total = 0, len(loader) if isinstance(loader, Sized) else 0
    for done, batch in enumerate(loader, 1):
        yield batch
        if progress is not None:
            progress(done, total)
    if done == 0:
        raise ValueError(
            "`loader` gave no batches. An iterator is used up after one pass: give a DataLoader or a list."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; each module then has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _requiring_gradients(model: nn.Module, wanted: list[Tensor]) -> Iterator[None]:
    """Within the block only the wanted parameters require gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(any(parameter is each for each in wanted))
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
