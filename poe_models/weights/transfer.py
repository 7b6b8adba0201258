"""Stored tensors on their way to a GPU: through pinned memory, read while it works on what came before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poe_models.weights.fitting import keys_of

if TYPE_CHECKING:
    from poe_models.weights.checkpoint import Checkpoint
    from poe_models.weights.task_vectors import TaskVectors

READERS = 4
"""Threads that read ahead."""


def sent(stored: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A stored tensor on a device, where it is widened, so that no more than its own bytes travel.

    Args:
        stored: As it is in its file, on the CPU.
        device: Where to.
        dtype: What it is widened to.

    Returns:
        The tensor; that of the file itself if it is there already.
    """
    if device.type == "cuda":
        stored = stored.pin_memory().to(device, non_blocking=True)
    return stored.to(device, dtype)


class ReadAhead:
    """Reads the tensors of the next batch from the files of all models while a GPU works on the present one.

    What is read stays in pinned memory until its batch is done: twice the stored bytes of a batch, of all models. Only
    safetensors files are read ahead, not adapters and the models under them; and nothing for other devices, whose cores
    the reading would take from the work.

    Args:
        task_vectors: Base and experts.
        batches: Names of the tensors of each batch, in the order of the work.

    >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.eye(2)}
    >>> from poe_models.weights.task_vectors import TaskVectors
    >>> with ReadAhead(TaskVectors(base, {"tuned": tuned}), [["fc.weight"]]) as ahead:
    ...     ahead.begin(0)
    """

    def __init__(self, task_vectors: TaskVectors, batches: Sequence[Sequence[str]]) -> None:
        self._vectors, self._batches = task_vectors, batches
        self._useful = task_vectors.device.type == "cuda"
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
        self._begun: dict[int, None] = {}

    def begin(self, place: int) -> None:
        """Hear that the work on a batch begins: forget those before it, and read the next one.

        Args:
            place: Of the batch, in ``batches``.
        """
        if not self._useful:
            return
        for done in [each for each in self._begun if each < place]:
            self._forget(done)
        for each in range(place, min(place + 2, len(self._batches))):
            if each not in self._begun:
                self._begun[each] = None
                for checkpoint, names in self._sources(each):
                    checkpoint.read_ahead(names, self._pool)

    def _sources(self, place: int) -> list[tuple[Checkpoint, list[str]]]:
        base, names = self._vectors.base, self._batches[place]
        experts = self._vectors.experts.values()
        used = [name for name in names if self._vectors.treatments[name].action != "base"]
        keys = [(each, [key for name in used for key in keys_of(base, each, name)]) for each in experts]
        return [(base, list(names)), *keys]

    def _forget(self, place: int) -> None:
        del self._begun[place]
        for checkpoint, names in self._sources(place):
            checkpoint.forget(names)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for place in list(self._begun):
            self._forget(place)
