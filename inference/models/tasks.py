"""Tasks that judge models or teach merges: batches, and how a model is asked for its outputs.

A user's module for the command line is a Python file with two functions: ``network``, the architecture, and ``tasks``::

    def network(base):                                  # the base's path, as the configuration has it
        return AutoModel.from_pretrained(base)

    def tasks():                                        # any other function as my_tasks.py:NAME
        return [Task("movies", loader, forward=pooled, head=heads["movies"]), Task("mail", ...)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inference.models.outputs import Forward, called, tensor_of
from poe_models.printing import Brief

__all__ = ["Task"]


@dataclass(frozen=True, eq=False, repr=False)
class Task(Brief):
    """One task: its batches, and the outputs of a model for them.

    Attributes:
        name: Name of the task.
        loader: Batches, the same ones in every pass: a ``DataLoader`` that does not shuffle, or a list. A batch is a
            pair of inputs and labels, or a mapping with ``labels``, such as a tokenizer's; inputs alone if it has none.
        forward: Maps the model and a batch to logits ``(b, classes)`` or ``(b, tokens, classes)``, to values ``(b,)``,
            or to the features that ``head`` takes. By default the model is called with the batch's inputs, a mapping as
            keyword arguments.
        head: Maps what ``forward`` gives to logits or values; None if ``forward`` gives these. A module is moved to the
            model's device.
        metrics: Names of the metrics that judge it; empty for those that the evaluation is given for all tasks.

    Raises:
        ValueError: If the name is empty or has a slash, or the loader can be used only once.

    >>> import torch
    >>> task = Task("sign", [(torch.ones(2, 3), torch.tensor([1, 0]))], head=lambda features: -features)
    >>> task.logits(nn.Identity(), task.loader[0])
    tensor([[-1., -1., -1.],
            [-1., -1., -1.]])
    """

    name: str
    loader: Iterable[Any]
    forward: Forward = called
    head: Callable[[Tensor], Tensor] | None = None
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"`Task(name={self.name!r})`: give a name without a slash.")
        if isinstance(self.loader, Iterator):
            raise ValueError(
                f"`Task({self.name!r}, loader=...)`: got an iterator, which gives its batches once, and every model "
                "needs them. Give a DataLoader or a list of batches."
            )

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Outputs of a model for a batch, through the head if there is one.

        Args:
            model: The model, in the mode to run it in.
            batch: A batch of the loader, on the model's device.

        Raises:
            ValueError: If the model gives neither a tensor nor an output with ``logits``.
        """
        found = tensor_of(self.forward(model, batch))
        if self.head is None:
            return found
        head = self.head.to(found.device) if isinstance(self.head, nn.Module) else self.head
        return head(found)
