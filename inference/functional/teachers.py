"""Predictions of experts on disk: computed once in the memory of a batch, read as they are needed.

A folder has ``predictions.safetensors`` with the outputs, and the mask of those that count, and ``predictions.json``
with fingerprints of the expert's weights and of the inputs. The outputs are memory-mapped: a step of a fit reads the
rows of its mini-batch, so that a language model's predictions need not fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inference.functional.divergences import Targets
from inference.functional.expert import count_of, prediction_batches, rows_of
from inference.functional.span_model import Forward, SpanModel
from inference.models.artifacts import read_record, versions
from inference.models.digest import file_digest
from inference.models.staging import Staging, check_output
from poe_models.weights.batches import fingerprint
from poe_models.weights.loading import CheckpointError

_KIND, _FILE = "predictions", "predictions.safetensors"
_CHECKED = 4
"""Examples whose predictions are made again when a folder is loaded."""


def save_predictions(
    path: str | Path,
    expert: str,
    model: SpanModel,
    inputs: Any,
    forward: Forward,
    counted: Tensor | None = None,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Save the outputs of one expert on inputs as a new folder, whole or not at all, a batch in memory at a time.

    Args:
        path: The folder to make.
        expert: The task vector.
        model: The network.
        inputs: As in :func:`~inference.functional.prediction_expert`.
        forward: As there.
        counted: Mask ``(n, tokens)`` of the tokens that are observations.
        batch_size: Examples at a time.
        progress: Called with the examples that are done and their number.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists.
        ValueError: If the name is no task vector's, or an output is NaN.
    """
    staging = Staging(check_output(Path(path), []), f"folder of {_KIND}", "run again")
    staging.check(resume=True)  # an interrupted one is written over: nothing of it is kept
    record = {
        "kind": _KIND,
        "expert": expert,
        "examples": count_of(inputs),
        "weights": model.fingerprint(expert),
        "inputs": fingerprint(inputs),
        "versions": versions(),
    }
    batches = prediction_batches(expert, model, inputs, forward, counted, batch_size)
    try:
        with staging.begin({"kind": _KIND}):
            staging.write(_FILE, lambda file: _write(file, batches, count_of(inputs), counted, progress))
            staging.write_json(
                f"{_KIND}.json", {**record, "sha256": file_digest(staging.content / _FILE)}
            )  # last: it says that the rest is there
            staging.publish()
    except BaseException:
        staging.abandon()
        raise
    return staging.out


def load_predictions(path: str | Path, expert: str, model: SpanModel, inputs: Any, forward: Forward) -> Targets:
    """Load what :func:`save_predictions` saved, as ``targets`` of :func:`~inference.functional.functional`.

    The first few predictions are made again, so that another head or forward function is noticed, too.

    Args:
        path: The folder.
        expert: The task vector.
        model: The network.
        inputs: The inputs that they are about.
        forward: Outputs of a batch.

    Returns:
        The predictions; outputs stay on disk until their rows are asked for.

    Raises:
        CheckpointError: If the folder is missing, corrupt, or of another expert, other weights, inputs or outputs.
    """
    record, file = read_record(path, _KIND), Path(path).expanduser() / _FILE
    try:
        if file_digest(file) != record["sha256"]:
            raise ValueError("it is not the file that was saved with its JSON")
        tensors = load_file(file)
        targets = Targets(tensors["outputs"], tensors.get("counted"))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. Save the predictions again.") from error
    now = {"expert": expert, "weights": model.fingerprint(expert), "inputs": fingerprint(inputs)}
    words = {"expert": "another expert", "weights": "other weights of the expert", "inputs": "other inputs"}
    different = [words[key] for key, value in now.items() if record[key] != value]
    if not different and not _again(targets, expert, model, inputs, forward):
        different = ["another forward function or head"]
    if different:
        raise CheckpointError(
            f"{path}: these predictions are of {' and '.join(different)}. Save them again with `save_predictions`, or "
            f"give what they were made with (expert {record['expert']!r}, {record['examples']} examples)."
        )
    return targets


def _again(targets: Targets, expert: str, model: SpanModel, inputs: Any, forward: Forward) -> bool:
    """Whether computing the first predictions again gives the saved ones, up to rounding."""
    rows = torch.arange(min(_CHECKED, count_of(inputs)))
    counted = None if targets.counted is None else targets.counted[rows]
    (found,) = prediction_batches(expert, model, rows_of(inputs, rows), forward, counted, len(rows))
    saved = targets.outputs[rows]
    if found.shape != saved.shape:
        return False
    return torch.allclose(found.cpu().float(), saved, rtol=1e-2, atol=1e-2 * float(saved.abs().mean()))


def _write(
    file: Path,
    batches: Iterator[Tensor],
    count: int,
    counted: Tensor | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a safetensors file of outputs (float32) whose batches are there one after another."""
    first = next(batches)
    shape = (count, *first.shape[1:])
    size = 4 * torch.Size(shape).numel()
    header: dict[str, Any] = {"outputs": {"dtype": "F32", "shape": shape, "data_offsets": (0, size)}}
    if counted is not None:
        header["counted"] = {
            "dtype": "BOOL",
            "shape": tuple(counted.shape),
            "data_offsets": (size, size + counted.numel()),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for outputs in chain([first], batches):
            out.write(outputs.cpu().float().contiguous().numpy().tobytes())
            done += len(outputs)
            if progress is not None:
                progress(done, count)
        if counted is not None:
            out.write(counted.cpu().bool().contiguous().numpy().tobytes())
