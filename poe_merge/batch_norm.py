"""``poe-merge batch-norm``: a merged folder with running statistics of BatchNorm re-estimated on tasks' inputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inference.models.artifacts import versions
from inference.models.batch_norm import reestimate_batch_norm
from inference.models.digest import Silent, digest_inputs, file_digest
from inference.models.folder import RECORD
from inference.models.staging import Staging, check_output
from inference.models.tasks import Task
from poe_merge.record import read_record
from poe_merge.user_tasks import UserTasks
from poe_models.weights.batches import fingerprint
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.weight_files import SafetensorsFile

__all__ = ["BatchNormReport", "reestimate"]

REASON = "running statistic: re-estimated on inputs by `poe-merge batch-norm`"
CARD = "README.md"


@dataclass(frozen=True)
class BatchNormReport:
    """Result of ``poe-merge batch-norm``.

    Attributes:
        out: The folder.
        tensors: Names of the tensors that were re-estimated.
        batches: Number of batches of each task.
    """

    out: Path
    tensors: tuple[str, ...]
    batches: Mapping[str, int]


def reestimate(
    run: Path,
    out: Path,
    user: UserTasks,
    *,
    submodule: str = "",
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BatchNormReport:
    """Copy a merged folder, with running statistics from the inputs of tasks, one task's batches after the other's.

    Args:
        run: Folder that ``poe-merge merge`` made.
        out: The folder to make.
        user: The module of tasks; labels and heads are not used.
        submodule: Where in the network the checkpoint is.
        device: Where the network runs.
        resume: Write again what an interrupted run left.
        progress: Called with the number of finished batches, and of all.

    Returns:
        The report.

    Raises:
        ValueError: If the folder is no merge, its weights do not fit the network, or statistics cannot be estimated.
    """
    record, merged = read_record(run), open_checkpoint(run)
    staging = Staging(check_output(out, [run], resume=resume), "run")
    staging.check(resume)
    batches = [(task, batch) for task in user.tasks for batch in task.loader]
    network = user.network(str(record["inputs"]["base"]["source"])).to(device)
    prefix = f"{submodule}." if submodule else ""
    load(network, merged, prefix, user.source)
    found = reestimate_batch_norm(network, batches, _forward, progress=progress)
    statistics = fitted(found, merged, prefix)
    counts = {task.name: sum(each is task for each, _ in batches) for task in user.tasks}
    about = {"merged": str(run.resolve()), "tasks": counts, "tensors": len(statistics)}
    seen = [fingerprint(batch) for _, batch in batches]
    inputs = digest_inputs({"merged": merged}, [user.source], Silent())
    state = {"kind": "batch norm", **about, "inputs": inputs, "seen": seen, "versions": versions()}
    with staging.begin(state, merged.check_unchanged):
        if not staging.published:
            write(staging, run, statistics, {**record, "batch_norm": about})
        staging.publish()
    return BatchNormReport(staging.out, tuple(statistics), counts)


def _forward(model: nn.Module, pair: tuple[Task, Any]) -> Any:
    task, batch = pair
    return task.forward(model, batch)


def load(network: nn.Module, merged: Checkpoint, prefix: str, source: Path) -> None:
    """Load merged weights into the network of a user's module.

    Raises:
        ValueError: If the network lacks one of them, or has it in another shape.
    """
    own, aliases = network.state_dict(), merged.aliases
    for name in (*merged.tensors, *aliases):
        value = merged.read(aliases.get(name, name))
        got = own.get(prefix + name)
        if got is None or got.shape != value.shape:
            has = "none of that name" if got is None else f"{tuple(got.shape)}"
            raise ValueError(
                f"{source}: the merge has {name!r} {tuple(value.shape)}, and `network(base)` has {has} at "
                f"{prefix + name!r}. Return the merge's architecture, or say where it is in it: --submodule."
            )
        got.copy_(value)


def fitted(found: Mapping[str, Tensor], merged: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Those statistics that the checkpoint has, by its names and in its dtypes.

    Raises:
        ValueError: If it has none, or a dtype cannot hold one.
    """
    names = {name.removeprefix(prefix): name for name in found if name.startswith(prefix)}
    kept = {name: merged.tensors.get(merged.aliases.get(name, name)) for name in names}
    made = {name: found[names[name]].cpu().to(info.dtype) for name, info in kept.items() if info is not None}
    if not made:
        raise ValueError(
            f"{merged.source}: has none of the network's running statistics ({next(iter(found))} and others). They are "
            "the base's then: save the base with its buffers, and merge again."
        )
    odd = next((name for name, value in made.items() if not bool(value.isfinite().all())), None)
    if odd is not None:
        raise ValueError(
            f"{merged.source}: {odd!r} is too large for {made[odd].dtype}. Merge again with `out_dtype: float32`."
        )
    return made


def write(staging: Staging, run: Path, statistics: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Write every file of the folder: weights with these statistics in them, the record and the card with a note."""
    for path in sorted(path for path in chain(run.iterdir(), run.glob("*/*")) if path.is_file()):
        name = path.relative_to(run).as_posix()
        own = SafetensorsFile(path) if path.suffix == ".safetensors" else None
        if own is not None and not statistics.keys().isdisjoint(own.tensors):
            tensors = {key: statistics[key] if key in statistics else own.read(key) for key in own.tensors}
            staging.save(name, tensors, own.metadata)
        elif name not in (RECORD, CARD):
            staging.write(name, partial(shutil.copyfile, path))
    for tensor in record["tensors"]:
        if tensor["tensor"] in statistics:
            tensor["reason"] = REASON
    for name, was in record.get("written", {}).items():
        if (run / name).is_file() and file_digest(run / name) == was:  # what was changed before stays told
            record["written"][name] = file_digest(staging.content / name)
    staging.write_record(RECORD, record, ["tensors"])
    note = f"Running statistics of BatchNorm: re-estimated on inputs of {', '.join(record['batch_norm']['tasks'])}."
    card = (run / CARD).read_text(encoding="utf-8").rstrip() if (run / CARD).is_file() else ""
    staging.write(CARD, lambda path: path.write_text(f"{card}\n\n{note}\n".lstrip(), encoding="utf-8"))
