"""A whole merged model as a differentiable function of its modules' merged updates, and batches that never end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from poe_models.methods.method import TaskData
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors


class WholeModel:
    """The base with all experts' updates in memory.

    Args:
        method: Name of the method, for messages.
        modules: The task vectors.

    Raises:
        ValueError: If only modules are given, which are no whole model.
    """

    def __init__(self, method: str, modules: Iterable[ModuleUpdates]) -> None:
        if not isinstance(modules, TaskVectors):
            raise ValueError(
                f"`{method}.prepare({type(modules).__name__})`: it runs the merged model, which takes every tensor of "
                "it. Give `TaskVectors`."
            )
        vectors = modules
        self.names = vectors.names
        self._treatments = vectors.treatments
        self._shapes = {name: info.shape for name, info in vectors.base.tensors.items()}
        self._blocks: dict[str, list[str]] = {}
        self.modules: dict[str, ModuleUpdates] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, treatment in vectors.treatments.items():
            if treatment.action == "merge":
                found = vectors.modules(name)
                self._blocks[name] = [module.name for module in found]
                self.modules |= {module.name: module for module in found}
            elif treatment.action == "average":
                self._fixed[name] = vectors.average(name)
            elif vectors.base.tensors[name].dtype.is_floating_point:
                self._fixed[name] = vectors.base.read(name).to(vectors.device, vectors.dtype)

    def weights(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every floating tensor of the merged model.

        Args:
            updates: The merged update of each module, ``(d_out, d_in)``; gradients flow through.

        Returns:
            Tensors by their names in the base, without the further names of tied ones.
        """
        merged = dict(self._fixed)
        for name, blocks in self._blocks.items():
            view = self._treatments[name].view
            assert view is not None
            merged[name] = view.join([self.modules[b].base + updates[b] for b in blocks], self._shapes[name])
        return merged


def minimise_entropy(
    parameters: Iterable[Tensor],
    updates: Callable[[], Mapping[str, Tensor]],
    model: WholeModel,
    data: TaskData,
    steps: int,
    learning_rate: float,
) -> None:
    """Minimise the entropy of a merged model's predictions, summed over tasks, by Adam (Yang et al., 2024).

    Every step takes one batch of each task; a task that is through begins anew.

    Args:
        parameters: What is learned, in place.
        updates: The merged updates as a function of the parameters; called at each step.
        model: Whose predictions.
        data: Unlabelled batches of every task.
        steps: Number of steps.
        learning_rate: Learning rate of Adam.

    Raises:
        ValueError: If an expert has no loader, a loader is empty, or the predictions are not finite logits.
    """
    missing = [name for name in model.names if name not in data.loaders]
    if missing:
        raise ValueError(
            f"`TaskData(loaders=...)`: there is none for expert {missing[0]!r}, only for {', '.join(data.loaders)}. "
            "Give batches of every expert's task."
        )
    batches = {name: _endless(name, data.loaders[name]) for name in model.names}
    optimiser = torch.optim.Adam(list(parameters), lr=learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            optimiser.zero_grad()
            weights = model.weights(updates())
            losses = [_entropy(name, data.forward(weights, next(batches[name]))) for name in model.names]
            torch.stack(losses).sum().backward()
            optimiser.step()
            if data.progress is not None:
                data.progress(step + 1, steps)


def _entropy(expert: str, logits: Tensor) -> Tensor:
    """Mean entropy in nats of predictions ``(B, K)``."""
    if logits.ndim != 2 or not bool(logits.isfinite().all()):
        what = "NaN or infinite values" if logits.ndim == 2 else f"shape {tuple(logits.shape)}"
        raise ValueError(
            f"`TaskData.forward`: on a batch of expert {expert!r} the logits have {what}. Return finite logits (B, K); "
            "a smaller learning rate keeps the merged model near the experts."
        )
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def _endless(expert: str, loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                f"`TaskData(loaders=...)`: that of expert {expert!r} gave no batches. An iterator is used up by one "
                "pass: give a DataLoader or a list."
            )
