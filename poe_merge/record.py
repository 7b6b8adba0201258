"""The record of a merge, ``poe_merge.json``: its configuration, its inputs and its designs taken up again.

Only what ships with the toolkit is built: a file that says so imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inference.models.artifacts import renamed
from inference.models.design import Design
from inference.models.digest import UNDER, Progress, Silent, digest_inputs, file_digest
from inference.models.folder import RECORD
from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.places import resolved
from inference.models.record_shapes import require_merge
from inference.models.statistics_record import changed_input
from inference.reweighting import SolverOptions
from poe_merge.config import MergeConfig, parse_config
from poe_merge.flags import overridden
from poe_merge.settings import POE, ConfigError, Document
from poe_merge.specs import ENERGY, METHOD, PRECISION, RESIDUAL_MAP, SCALE, Kind, is_spec, parse_spec
from poe_merge.stats import Table, checkpoints_of
from poe_models.experts import Anchor, Expert, ProductOfExperts
from poe_models.methods import METHODS, MergingMethod
from poe_models.weights.json_files import read_object
from poe_models.weights.loading import Checkpoint, CheckpointError, model_and_adapter, open_checkpoint
from poe_models.weights.rules import RuleTable
from poe_models.weights.task_vectors import TaskVectors

KEYS = {"tensors", "inputs", "designs", "versions", "rules", "compute_dtype"}
FREE = ("seed", "device", "out_dtype")
"""Settings that do not decide what was merged."""
EXPERT = "expert "


class NotBuiltIn(ValueError):
    """A record names code of the user's own, which it does not hold."""


def read_record(run: Path) -> dict[str, Any]:
    """Read the record of a merge.

    Args:
        run: The merged folder.

    Returns:
        The contents of ``poe_merge.json``.

    Raises:
        ValueError: If there is none, or it is not one.
    """
    path = run / RECORD
    if not path.is_file():
        raise ValueError(f"{run}: no merge, {RECORD} is missing. Give a folder that `poe-merge merge` made.")
    try:
        record = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error} Merge again.") from error
    if record.get("kind") == "adapter":
        raise ValueError(
            f"{path}: the merge is an adapter, and this is about whole models. Merge with `output: model`."
        )
    if not set(record) >= KEYS or not isinstance(record["tensors"], list):
        raise ValueError(f"{path}: not the record of a merge. Give a folder that `poe-merge merge` made.")
    try:
        require_merge(record, str(path))
    except ValueError as error:
        raise ValueError(f"{error} Merge again.") from error
    tensors = record.pop("tensors")
    return {**resolved(renamed(record), run), "tensors": tensors}


def config_of(run: Path, flags: Mapping[str, Any], *, allow_code: bool = False) -> MergeConfig:
    """Configuration that a folder was merged with, with another seed, device or output dtype if they were typed.

    Args:
        run: The merged folder.
        flags: Values of flags, as ``with_flags`` passes them.
        allow_code: Import the modules that the record names.

    Returns:
        The configuration.

    Raises:
        ConfigError: If it was merged in Python or by a merging method, or a flag would change the merge.
    """
    config = (read_record(run).get("settings") or {}).get("config")
    if not isinstance(config, dict):
        raise ConfigError(
            f"--merge {run}: merged in Python, without a configuration to take up. Draw around it there: "
            "`sample_full` or `collect_statistics`, then `MergedEnsemble(..., elsewhere=folder)`."
        )
    if config.get("merge_method") != POE:
        raise ConfigError(
            f"--merge {run}: merged by {config.get('merge_method')}, which has no posterior. Draw around a "
            "product of experts; a method that is random is drawn at several seeds from its configuration."
        )
    document = overridden(Document(config), flags)
    fixed = [origin for place, origin in document.origins.items() if origin.startswith("--") and place[0] not in FREE]
    if fixed:
        raise ConfigError(
            f"{fixed[0]}: the merge in {run} was made with settings of its own, and draws around it have the same. "
            "Leave it out, or merge again with it."
        )
    return parse_config(document, [run.absolute().parent, Path.cwd()], allow_code=allow_code)


def check_inputs(run: Path, task_vectors: TaskVectors, designs: Table, progress: Progress) -> None:
    """Refuse to draw around a merge of other checkpoints, with an error that names one."""
    now = digest_inputs(checkpoints_of(task_vectors, designs), (), progress)
    changed = changed_input(read_record(run)["inputs"], now)
    if changed is not None:
        raise CheckpointError(f"--merge {run}: it was merged from other checkpoints: {changed}. Merge again.")


def task_vectors_of(record: Mapping[str, Any]) -> TaskVectors:
    """Base and experts as they were merged; an error names one that is not what it was."""
    inputs = record["inputs"]
    _require_models_under(record)
    base = _opened("base", inputs)
    experts = {role.removeprefix(EXPERT): _opened(role, inputs, base) for role in inputs if role.startswith(EXPERT)}
    dtype = {"float32": torch.float32, "float64": torch.float64}[record["compute_dtype"]]
    return TaskVectors(base, experts, RuleTable.from_dicts(record["rules"]), dtype)


def _require_models_under(record: Mapping[str, Any]) -> None:
    """Refuse a record of before the models under adapters were inputs, if it needs one: nothing says which it was."""
    config = (record.get("settings") or {}).get("config") or {}
    for entry in config.get("models", ()):
        parts = model_and_adapter(entry["model"])
        role = EXPERT + entry["name"]
        if parts is not None and parts[0] != config.get("base_model") and UNDER + role not in record["inputs"]:
            raise CheckpointError(
                f"{role} is an adapter on a model of its own ({parts[0]}), of which this record of an earlier version "
                "has no digest. Merge again."
            )


def _opened(role: str, inputs: Mapping[str, Any], base: Checkpoint | None = None) -> Checkpoint:
    """A recorded checkpoint, an adapter on its own model if that is not the base; refused if it is not what it was."""
    source = str(inputs[role]["source"])
    if not Path(source).exists():
        raise CheckpointError(
            f"{source} is not there any more; residuals need base and experts. Put it, or a link to it, there."
        )
    under = UNDER + role
    checkpoint = open_checkpoint(source, base=_opened(under, inputs, base) if under in inputs else base)
    found = digest_inputs({role: checkpoint}, [], Silent())[role]
    if found["sha256"] != inputs[role]["sha256"]:
        raise CheckpointError(f"{role} ({found['source']}) has changed since the merge. Merge again.")
    return checkpoint


def design_of(record: Mapping[str, Any], tensor: Mapping[str, Any]) -> Mapping[str, Any]:
    """Design of a recorded tensor, as the record has it."""
    design: Mapping[str, Any] = record["designs"][tensor["design"]]
    return design


def rewritten(run: Path, record: Mapping[str, Any], progress: Progress) -> str | None:
    """Name of a weight file of a merged folder that is not what the merge wrote.

    Args:
        run: The merged folder.
        record: Contents of its ``poe_merge.json``.
        progress: Told about the bytes.

    Returns:
        The first such file; None if all are as they were written, or a record of an earlier version does not say.
    """
    files = {run / name: digest for name, digest in record.get("written", {}).items()}
    progress.begin("checksums", 0, sum(path.stat().st_size for path in files if path.is_file()))
    changed = (path for path, was in files.items() if not path.is_file() or file_digest(path, progress) != was)
    return next((path.relative_to(run).as_posix() for path in changed), None)


def merge_of(record: Mapping[str, Any], base: Checkpoint) -> dict[str, AnyDesign]:
    """Designs of a recorded merge, with which it can be done again.

    Args:
        record: Contents of ``poe_merge.json``.
        base: The open base, which an adapter as the anchor's centre is opened on.

    Returns:
        Name of each merged tensor to its design; tensors that shared one do so again.

    Raises:
        ValueError: If a design is not built in, or was given numbers that a record does not hold.
    """
    designs = [_design(each, record["inputs"], base) for each in record["designs"]]
    return {str(tensor["tensor"]): designs[tensor["design"]] for tensor in record["tensors"] if "design" in tensor}


def unprepared(designs: Mapping[str, AnyDesign]) -> dict[str, AnyDesign]:
    """Designs to merge another model with: their methods without what ``prepare`` saw of the real one.

    Args:
        designs: The design of each tensor.

    Returns:
        The same; tensors that shared a design do so again.
    """
    distinct = {id(each): each for each in designs.values()}
    before = {
        key: each if each.method is None else each.with_method(_before_prepare(each.method))
        for key, each in distinct.items()
    }
    return {tensor: before[id(each)] for tensor, each in designs.items()}


def _before_prepare(method: MergingMethod) -> MergingMethod:
    """The method without what ``prepare`` has filled in: its fields that are None by default are None again."""
    if not is_dataclass(method):
        return method
    bare = replace(method, **{each.name: None for each in fields(method) if each.init and each.default is None})
    return method if bare.ready else bare


def experts_of(design: Mapping[str, Any]) -> ProductOfExperts:
    """Experts of a recorded design, without its anchor; an error names one that is not built in."""
    return ProductOfExperts(
        tuple(
            Expert(
                name=str(each["name"]),
                residual_map=_known(each["residual_map"], RESIDUAL_MAP),
                energy=_known(each["energy"], ENERGY),
                scale=_known(each["scale"], SCALE),
                importance=float(each["importance"]),
                update=None if each["update"] is None else str(each["update"]),
            )
            for each in design["experts"]
        )
    )


def _design(design: Mapping[str, Any], inputs: Mapping[str, Any], base: Checkpoint) -> AnyDesign:
    if "method" in design:
        return MethodDesign(_known(design["method"], METHOD), float(design["scaling"]))
    center, checkpoint = _center(design["anchor"]["center"], inputs, base)
    anchor = Anchor(center, _known(design["anchor"]["precision"], PRECISION))
    solver = design["solver"]
    given = [start for start in solver["starts"] if start not in ("ones", "twin", "experts", "center")]
    if given:
        raise ValueError(f"the solver started from {given[0]}, which a record does not hold.")
    unknown = next((key for key in solver if key not in {each.name for each in fields(SolverOptions)}), None)
    if unknown is not None:
        raise ValueError(f"the solver had the setting {unknown!r}, which this version does not have.")
    return Design(
        ProductOfExperts(experts_of(design).experts, anchor, float(design["temperature"])),
        scaling=float(design["scaling"]),
        coordinates=design["coordinates"],
        options=SolverOptions(**{**solver, "starts": tuple(solver["starts"])}),
        center=checkpoint,
    )


def _center(
    text: str | None, inputs: Mapping[str, Any], base: Checkpoint
) -> tuple[MergingMethod | None, Checkpoint | None]:
    """Centre of the anchor: a method, or a checkpoint that is what it was."""
    if text is None:
        return None, None
    if text.partition("(")[0] in METHODS:
        return _known(text, METHOD), None
    role = f"anchor {text}"
    if role not in inputs and is_spec(text):
        raise NotBuiltIn(f"the anchor's centre {text} is not built in, and a record does not hold its code.")
    if role not in inputs or not Path(text).exists():
        raise ValueError(f"the anchor's centre, {text}, is not in the record, or not there any more.")
    return None, _opened(role, inputs, base)


def _known(text: Any, kind: Kind[Any]) -> Any:
    """The built-in object that a record's text describes; a record never makes anything be imported."""
    if str(text).partition("(")[0] not in kind.registry:
        raise NotBuiltIn(f"{kind.noun} {text} is not built in, and a record does not hold its code.")
    return parse_spec(str(text), kind)
