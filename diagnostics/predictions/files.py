"""Predictions of several methods on several tasks as one plain file, which reports are made from.

The file is a NumPy ``.npz`` or a ``.safetensors`` with the entries

- ``labels/TASK``: ``(n,)`` integers,
- ``probabilities/TASK/METHOD``: ``(n, classes)``, rows summing to one.

Every method is there for every task; the method "own experts", if there is one, is what each task's own fine-tune says.
A method may have a slash in its name, a task may not. An ``.npz`` keeps the order of methods and tasks, a
``.safetensors`` sorts them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diagnostics.predictions.inputs import Array, Labelled, labelled
from poe_models.printing import Brief

LARGEST, MOST = 32 * 2**30, 100_000
"""Most bytes, unpacked, and entries of a file."""
_ODD_ZIP = (RuntimeError, NotImplementedError, zlib.error, SyntaxError, KeyError, MemoryError, OverflowError, TypeError)
"""Errors that NumPy lets through for encrypted, damaged or oddly compressed entries."""
LABELS, PROBABILITIES = "labels", "probabilities"


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Brief):
    """Class probabilities of methods on the same examples of each task.

    Attributes:
        labels: Task to ``(n,)`` int64.
        probabilities: Method, then task, to ``(n, classes)`` float64.
    """

    labels: Mapping[str, Tensor]
    probabilities: Mapping[str, Mapping[str, Tensor]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.labels)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(self.probabilities)


def predictions_of(labels: Mapping[str, Array], probabilities: Mapping[str, Mapping[str, Array]]) -> Predictions:
    """Check predictions in memory, and put them on the CPU in float64.

    Args:
        labels: Task to ``(n,)`` integers.
        probabilities: Method, then task, to ``(n, classes)``.

    Raises:
        ValueError: If a table is no probabilities, labels do not fit, or a method lacks a task.

    >>> found = predictions_of({"coin": [0, 1]}, {"fair": {"coin": np.full((2, 2), 0.5)}})
    >>> found.tasks, found.methods
    (('coin',), ('fair',))
    """
    if not labels or not probabilities:
        raise ValueError(
            f"`predictions_of(...)`: {len(labels)} tasks and {len(probabilities)} methods. Give one of each at least."
        )
    checked: dict[str, dict[str, Labelled]] = {}
    for method, by_task in probabilities.items():
        if set(by_task) != set(labels):
            odd = sorted(set(by_task) ^ set(labels))[0]
            raise ValueError(
                f"`predictions_of(...)`: {method!r} is about the tasks {', '.join(by_task)}, labels are of "
                f"{', '.join(labels)}; {odd!r} is in one only. Give every method on every task."
            )
        checked[method] = {task: _labelled(method, task, by_task[task], labels[task]) for task in labels}
    first = next(iter(checked.values()))
    return Predictions(
        {task: pair.labels.cpu() for task, pair in first.items()},
        {m: {task: pair.probabilities.cpu() for task, pair in by_task.items()} for m, by_task in checked.items()},
    )


def save_predictions(predictions: Predictions, path: str | Path) -> None:
    """Write predictions to a file that ends in ``.npz`` or ``.safetensors``; one that is there is overwritten.

    Raises:
        ValueError: If it ends otherwise, or a task has a slash in its name.
    """
    slashed = [task for task in predictions.tasks if "/" in task]
    if slashed:
        raise ValueError(
            f"`save_predictions(...)`: the task {slashed[0]!r} has a slash in its name. Name it otherwise."
        )
    tensors = {f"{LABELS}/{task}": values for task, values in predictions.labels.items()}
    for method, by_task in predictions.probabilities.items():
        tensors |= {f"{PROBABILITIES}/{task}/{method}": values for task, values in by_task.items()}
    if _kind(path, "save_predictions") == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        Path(path).write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_predictions(path: str | Path) -> Predictions:
    """Read and check a file of predictions; nothing in it is executed.

    Raises:
        ValueError: If it is not such a file, or its entries do not fit together.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fair = predictions_of({"coin": np.array([0, 1])}, {"fair": {"coin": np.full((2, 2), 0.5)}})
    ...     save_predictions(fair, f"{folder}/coin.npz")
    ...     load_predictions(f"{folder}/coin.npz").methods
    ('fair',)
    """
    try:
        entries = _read(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, EOFError, *_ODD_ZIP) as error:
        raise ValueError(
            f"{path}: cannot be read as predictions ({error}). Make it with `save_predictions`."
        ) from error
    labels: dict[str, Array] = {}
    probabilities: dict[str, dict[str, Array]] = {}
    for name, values in entries.items():
        kind, _, rest = name.partition("/")
        task, _, method = rest.partition("/")
        if kind == LABELS and task and not method:
            labels[task] = values
        elif kind == PROBABILITIES and task and method:
            probabilities.setdefault(method, {})[task] = values
        else:
            raise ValueError(
                f"{path}: the entry {name!r} is neither 'labels/TASK' nor 'probabilities/TASK/METHOD'. Rename it, or "
                "make the file with `save_predictions`."
            )
    try:
        return predictions_of(labels, probabilities)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: str | Path) -> dict[str, Array]:
    if _kind(path, "load_predictions") == ".safetensors":
        return dict(load_file(path))
    with Path(path).open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        _require_small(file.zip)
        return {name: file[name] for name in file.files}


def _require_small(archive: zipfile.ZipFile | None) -> None:
    """Refuse what unpacks to more than fits: a few kilobytes of zip may stand for terabytes."""
    entries = [] if archive is None else archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > LARGEST or len(entries) > MOST:
        raise ValueError(f"{len(entries):,} entries of {size:,} bytes, more than {MOST:,} of {LARGEST:,}")


def _kind(path: str | Path, called: str) -> str:
    kind = Path(path).suffix
    if kind not in (".npz", ".safetensors"):
        raise ValueError(f"`{called}({str(path)!r})`: the name ends in {kind!r}. End it in .npz or .safetensors.")
    return kind


def _labelled(method: str, task: str, probabilities: Array, labels: Array) -> Labelled:
    try:
        return labelled(probabilities, labels, "predictions_of")
    except ValueError as error:
        raise ValueError(f"{method!r} on {task!r}: {error}") from error
