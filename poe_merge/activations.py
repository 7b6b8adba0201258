"""``poe-merge activations``: second moments of the inputs of every expert's layers, from a user's module of tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from inference.models.artifacts import read_record
from inference.models.digest import Progress, digest_inputs
from inference.models.disk import disk_errors, replace_file
from inference.models.ranks import ALONE, Ranks
from inference.models.tasks import Task
from poe_merge.config import MergeConfig
from poe_merge.user_tasks import UserTasks
from poe_models.weights.batches import fingerprint, mapped
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.collecting import collect_activations
from poe_models.weights.moments import ModuleMoments
from poe_models.weights.task_vectors import TaskVectors

__all__ = ["ActivationsReport", "make_activations"]


RECORD = "activations"
"""Name of the record of what a folder's moments are of."""


@dataclass(frozen=True)
class ActivationsReport:
    """Result of ``poe-merge activations``.

    Attributes:
        out: The folder, for ``Activation(folder)`` and ``Mixed(folder)``.
        collected: Names of the experts whose moments were collected.
        kept: Names of those whose file was there already.
    """

    out: Path
    collected: tuple[str, ...]
    kept: tuple[str, ...]


def make_activations(
    settings: MergeConfig,
    task_vectors: TaskVectors,
    user: UserTasks,
    out: Path,
    *,
    submodule: str = "",
    resume: bool = False,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> ActivationsReport:
    """Run every expert on the batches of its task, and save the moments of each as a file.

    Args:
        settings: The configuration.
        task_vectors: Base and experts.
        user: The module of tasks, which are called like their experts.
        out: The folder.
        submodule: Where in the network the checkpoints are.
        resume: Keep the experts that are there, and collect the others.
        progress: Told about every batch.
        ranks: The processes that divide the experts between them.

    Returns:
        The report, of all processes.

    Raises:
        FileExistsError: If the folder is there and is not gone on with.
        ValueError: If what is there is of other weights, batches or of another submodule, an expert has no task or its
            task no batches, or a layer's inputs are not known.
    """
    tasks = {task.name: task for task in user.tasks}
    lacking = next((name for name in task_vectors.names if name not in tasks), None)
    if lacking is not None:
        raise ValueError(
            f"{user.source}: expert {lacking!r} has no task; there are {', '.join(tasks)}. Give task and expert one "
            "name."
        )
    if out.exists() and not resume:
        raise FileExistsError(f"{out} exists. Give another folder, or go on with it: --resume.")
    there = [name for name in task_vectors.names if (out / f"{quote(name, safe='')}.safetensors").exists()]
    own = ranks.share([1.0] * len(task_vectors.names))
    digests = {
        name: _about(task_vectors.experts[name], [*tasks[name].loader], submodule, progress)
        for place, name in enumerate(task_vectors.names)
        if place in own
    }
    about = {name: digest for each in ranks.gather(digests) for name, digest in each.items()}
    made = read_record(out, RECORD)["made"] if there else {}
    changed = next((name for name in there if made.get(name) != about[name]), None)
    if changed is not None:
        raise ValueError(
            f"{out}: the activations of {changed!r} there are of other weights, batches or of another submodule. Make "
            "them in a new folder."
        )
    network = user.network(settings.base_model).to(task_vectors.device)
    missing = [name for name in task_vectors.names if name not in there]
    if ranks.first and missing:  # before the files: a record of what is not there yet is of no harm
        with disk_errors(out / f"{RECORD}.json"):
            _record(out, {**made, **{name: about[name] for name in missing}})
    ranks.wait()
    own = ranks.share([1.0] * len(missing))
    for name in (missing[place] for place in sorted(own)):
        loader = list(tasks[name].loader)
        progress.begin(f"activations of {name}", len(loader), 0)
        found = _moments(network, task_vectors, name, tasks[name], loader, submodule, lambda: progress.advance(1, 0))
        with disk_errors(out / f"{quote(name, safe='')}.safetensors"):
            ModuleMoments("activations", {name: found}).save(out)
    ranks.wait()
    return ActivationsReport(out, tuple(missing), tuple(there))


def _record(out: Path, made: Mapping[str, str]) -> None:
    """Write whose moments the folder has, whole or not at all."""
    text = json.dumps({"kind": RECORD, "made": made}, indent=1)
    replace_file(out / f"{RECORD}.json", lambda path: path.write_text(text, encoding="utf-8"))


def _about(expert: Checkpoint, batches: Sequence[Any], submodule: str, progress: Progress) -> str:
    """Checksum of everything that decides an expert's moments but the network's code."""
    digests = digest_inputs({"expert": expert}, (), progress)["expert"]["sha256"]
    seen = [fingerprint(batch) for batch in batches]
    return hashlib.sha256(json.dumps([digests, seen, submodule], sort_keys=True).encode()).hexdigest()


def _moments(
    network: nn.Module,
    task_vectors: TaskVectors,
    name: str,
    task: Task,
    loader: Sequence[Any],
    submodule: str,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    prefix, expert = f"{submodule}." if submodule else "", task_vectors.experts[name]
    own = network.state_dict()
    read = {prefix + tensor: expert.read(tensor) for tensor in expert.tensors}
    state = {key: value.to(own[key]) for key, value in read.items() if key in own}

    def forward(model: nn.Module, batch: Any) -> Any:
        advance()
        batch = mapped(lambda x: x.to(device), batch)
        return functional_call(_Through(model, task), {f"model.{key}": value for key, value in state.items()}, (batch,))

    device = next(iter(own.values())).device
    counted = _mask_of if loader and _mask_of(loader[0]) is not None else None
    return collect_activations(network, loader, forward, task_vectors.views, counted=counted, prefix=prefix)


class _Through(nn.Module):
    """A network that is called as its task calls it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self._task = model, task

    @override
    def forward(self, batch: Any) -> Any:
        return self._task.forward(self.model, batch)


def _mask_of(batch: Any) -> Tensor | None:
    """The attention mask of a batch, a mapping or the first of a pair; None if it has none."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    mask = first.get("attention_mask") if isinstance(first, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
