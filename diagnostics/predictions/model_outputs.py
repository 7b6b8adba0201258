"""Predictions of networks, checkpoints and ensembles on a task, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.predictions.metrics import Kept, class_rows_kept
from inference.models.ensemble import MergedEnsemble
from inference.models.outputs import Rows, class_rows, value_rows
from inference.models.prediction import predicted_classes
from inference.models.predictor import Runner
from inference.models.tasks import Task
from poe_models.weights.batches import require_classes
from poe_models.weights.loading import Checkpoint, CheckpointError, nearest, open_checkpoint
from poe_models.weights.task_vectors import Source

__all__ = ["Model", "OpenModel", "open_model"]

Model = nn.Module | Source | MergedEnsemble | Sequence[str | Path]
"""A network with its weights; a state dict, folder, weight file, adapter or hub id; an ensemble, or folders of one."""
CHUNK_BYTES = 1 << 28
"""Probabilities of an ensemble that are in memory at a time: all its members see these batches, then the next ones."""
_Rows = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model that can be run on tasks.

    Attributes:
        name: Its name.
        network: The architecture, or the model itself; never written to.
        members: Checkpoints of the members, one for a single model; None where the network has its own weights.
        ensemble: The ensemble, if it is one that is not on disk.
        submodule: Where in the network the checkpoints are.
    """

    name: str
    network: nn.Module
    members: tuple[Checkpoint, ...] = ()
    ensemble: MergedEnsemble | None = None
    submodule: str = ""

    def classes(self, task: Task) -> Kept:
        """Numbers kept of class predictions; of an ensemble those of the mean probabilities.

        Raises:
            ValueError: If a batch has no labels or impossible ones, or the outputs cannot be read.
        """
        if self.ensemble is None and len(self.members) < 2:
            runner = self._runner(task, task.loader, _read_classes)
            return Kept.of_classes(runner({}), runner.examples)
        rows, examples, count = [], [], 0
        for first, chunk in _chunks(task, self._mean_probabilities):
            probabilities, labels, own = chunk
            rows.append(class_rows_kept(probabilities.log(), _valid(labels, probabilities, f"batch {first} and later")))
            examples.append(own + count)
            count += int(own.max()) + 1 if len(own) else 0
        return Kept.of_classes(torch.cat(rows), torch.cat(examples))

    def log_probabilities(self, task: Task) -> Tensor:
        """Log probabilities ``(n, classes)`` of the rows that count, which need no labels; of an ensemble of the mean.

        Raises:
            ValueError: If the outputs cannot be read.
        """
        if self.ensemble is None and len(self.members) < 2:
            return self._runner(task, task.loader, class_rows)({})
        return torch.cat([found[0].log() for _, found in _chunks(task, self._mean_probabilities)])

    def values(self, task: Task) -> Kept:
        """Predicted and true values; of an ensemble the mean prediction.

        Raises:
            ValueError: If there are not as many finite labels as values.
        """
        if self.ensemble is not None:
            predicted = self.ensemble.predict_values(
                self.network, task.loader, forward=task.logits, submodule=self.submodule
            ).mean
        else:
            every = [self._runner(task, task.loader, value_rows, member)({}) for member in self.members or (None,)]
            predicted = torch.stack(every).mean(0)
        true = _true_values(task.loader)
        if predicted.numel() != len(true):
            raise ValueError(
                f"values {tuple(predicted.shape)} for {len(true)} labels. Give a forward function or a head with one "
                "value for each example."
            )
        return Kept(torch.stack([predicted.flatten(), true], 1), torch.arange(len(true)), len(true))

    def _mean_probabilities(self, task: Task, batches: Sequence[Any]) -> _Rows:
        """Mean probabilities of all members for some batches, their labels, and which example each row is of."""
        if self.ensemble is not None:
            predictor = self.ensemble.predictor(self.network, batches, forward=task.logits, submodule=self.submodule)
            found = predicted_classes(predictor, self.ensemble.draws, None).probabilities
            return found, predictor.labels, predictor.examples
        total = torch.zeros((), dtype=torch.float64)
        for member in self.members:
            runner = self._runner(task, batches, class_rows, member)
            total = total + runner({}).exp() / len(self.members)
        return total, runner.labels, runner.examples

    def _runner(self, task: Task, loader: Iterable[Any], read: Any, member: Checkpoint | None = None) -> Runner:
        checkpoint = member or (self.members[0] if self.members else None)
        state = {} if checkpoint is None else _state_of(checkpoint, self.network, self.submodule)
        return Runner(self.network, loader, state, {}, task.logits, None, read)


def open_model(
    name: str, model: Model, network: nn.Module | None, base: Checkpoint | None, submodule: str
) -> OpenModel:
    """Open a model by its headers.

    Args:
        name: Its name.
        model: The model.
        network: The architecture that checkpoints and ensembles are loaded into.
        base: Checkpoint that adapters are opened on.
        submodule: Where in the network the checkpoints are.

    Raises:
        ValueError: If there is no network for a checkpoint, no such submodule, or the ensemble has no members.
        CheckpointError: If a checkpoint cannot be opened, or lacks a tensor of the network.
    """
    if isinstance(model, nn.Module):
        return OpenModel(name, model)
    if network is None:
        raise ValueError(
            f"`evaluate(models=...)`: {name!r} is weights without an architecture. Give `network=`, a model of it."
        )
    if isinstance(model, MergedEnsemble):
        return OpenModel(name, network, ensemble=model, submodule=submodule)
    sources = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    if not sources:
        raise ValueError(f"`evaluate(models=...)`: {name!r} has no members. Give the folders of its members.")
    members = tuple(open_checkpoint(source, base=base) for source in sources)
    for member in members:
        _refuse_missing(name, member, network, submodule)
    return OpenModel(name, network, members, submodule=submodule)


def _state_of(checkpoint: Checkpoint, network: nn.Module, submodule: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the network's names; those that the network does not have are not used."""
    prefix = f"{submodule}." if submodule else ""
    own = {name for name, _ in _tensors_of(network)}
    names = [(prefix + name, key) for key in checkpoint.tensors for name in checkpoint.tied_names(key)]
    return {name: checkpoint.read(key) for name, key in names if name in own}


def _tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that a state dict has, those of tied ones twice.

    Yields:
        Pairs of name and tensor.
    """
    own = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
    yield from ((name, own[name]) for name in network.state_dict() if name in own)


def _refuse_missing(model: str, checkpoint: Checkpoint, network: nn.Module, submodule: str) -> None:
    prefix = f"{submodule}." if submodule else ""
    held = {prefix + name for key in checkpoint.tensors for name in checkpoint.tied_names(key)}
    own = list(_tensors_of(network))
    if not any(name.startswith(prefix) for name, _ in own):
        raise ValueError(f"`evaluate(submodule={submodule!r})`: the network has no such submodule with tensors.")
    given = {id(tensor) for name, tensor in own if name in held}
    missing = [name for name, tensor in own if name.startswith(prefix) and id(tensor) not in given]
    if missing:
        more = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"`evaluate(models=...)`: {model!r} ({checkpoint.source}) lacks {missing[0]!r}{more} of the network"
            f"{nearest(missing[0], held)}. Give a model of the network's architecture; if the network is a "
            "checkpoint's with a head on it, say where the checkpoint is in it: `submodule=`."
        )


def _read_classes(model: nn.Module, output: Tensor, batch: Any, index: int) -> Rows:
    rows = class_rows(model, output, batch, index)
    kept = class_rows_kept(rows.values, _valid(rows.labels, rows.values, f"batch {index}"))
    return Rows(kept, None, rows.examples, rows.num_examples)


def _valid(labels: Tensor | None, table: Tensor, where: str) -> Tensor:
    """Labels that are there and in range."""
    if labels is None:
        raise ValueError(
            f"{where} has no integer labels, one for each row of logits. Give them as `labels` of a mapping, or as the "
            "second of a pair."
        )
    require_classes(labels, table.shape[1], where)
    return labels


def _true_values(loader: Iterable[Any]) -> Tensor:
    """Labels of all examples ``(n,)`` float64."""
    found = []
    for index, batch in enumerate(loader):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if pair else None
        if not isinstance(labels, Tensor) or not bool(labels.isfinite().all()):
            raise ValueError(f"batch {index} has no finite labels. Give one value for each example as `labels`.")
        found.append(labels.detach().cpu().double().flatten())
    return torch.cat(found)


def _chunks(task: Task, run: Any) -> Iterator[tuple[int, _Rows]]:
    """Results of runs over the batches, as many at a time as the first one's size lets fit.

    Yields:
        Number of the first batch, and what the run gave.
    """
    chunk: list[Any] = []
    first, most = 0, 1
    for batch in task.loader:
        chunk.append(batch)
        if len(chunk) == most:
            found = run(task, chunk)
            yield first, found
            first, chunk = first + len(chunk), []
            most = max(1, CHUNK_BYTES * most // max(1, found[0].nbytes)) if most == 1 else most
    if chunk:
        yield first, run(task, chunk)
    elif first == 0:
        raise ValueError("the loader has no batches. Give it some data.")
