r"""Experts on predictions in a configuration: a user's module of tasks beside the product in weight space.

::

    functional:
      tasks: my_tasks.py                # network(base) and tasks(), as for poe-merge evaluate; labels are not used
      importance: 1.0
      tied: layers\.(\d+)             # one coefficient for each expert and layer; each module's own without

The design of ``parameters`` is the product in weight space, and its merge the centre of the span.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.functional import SpanModel, fit, functional, joined_batches, merge_designs
from inference.functional.expert import example_digests, rows_of
from inference.models.modules import module_names
from inference.models.outputs import IGNORED
from inference.models.staging import check_output
from inference.models.tasks import Task
from poe_merge.build import DesignTable
from poe_merge.config import ConfigError, MergeConfig
from poe_merge.user_tasks import read_tasks
from poe_models.experts import FactorExpert
from poe_models.weights.task_vectors import TaskVectors

if TYPE_CHECKING:
    from inference.models.averages import ModelDesigns
    from inference.models.design import Design
    from inference.models.method_design import AnyDesign
    from poe_merge.progress import Bars


SEEN = "inputs_of_the_fit"
"""Key of a record's settings: task to digests of the inputs that a fit has seen."""


def fitted_designs(
    config: MergeConfig, vectors: TaskVectors, out: Path, resume: bool, bars: Bars
) -> tuple[ModelDesigns[AnyDesign], Path, dict[str, list[str]]]:
    """Fit the merge of a configuration with experts on predictions.

    Args:
        config: The configuration.
        vectors: Base and experts.
        out: Where the merge will be written; the state of the fit is beside it until the fit is done.
        resume: Go on with an interrupted fit.
        bars: Told how far it is.

    Returns:
        Designs for ``merge_checkpoint``, the user's file, and task to the digests of the inputs that the fit has seen.

    Raises:
        ConfigError: If designs differ between tensors, or tasks and models do not fit.
        OutputError: If the output exists, or an interrupted fit is there and ``resume`` is false.
    """
    given = config.functional
    assert given.tasks is not None
    check_output(out, [], resume=resume)
    design = _only_design(config, vectors)
    user = read_tasks(given.tasks)
    _require_models(user.tasks, vectors.names)
    prefix = f"{given.submodule}." if given.submodule else ""
    model = SpanModel(user.network(config.base_model), vectors, design.poe, prefix=prefix, tied=given.tied)
    experts = [_expert(task, model, given.importance) for task in user.tasks]
    posterior, state = model.posterior(*experts), state_of(out)
    if not resume:
        state.unlink(missing_ok=True)
    solution = fit(
        posterior,
        model.start(design.scaling),
        generator=torch.Generator().manual_seed(config.seed),
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        progress=bars.steps("fitting"),
        state=state,
    )
    seen = {task.name: sorted(input_digests(task)) for task in user.tasks}
    return merge_designs(model, posterior.coefficients(solution.value)), user.source, seen


def input_digests(task: Task) -> set[str]:
    """Digests of the inputs of a task, labels left out, an example each."""
    found: set[str] = set()
    for batch in task.loader:
        inputs = _without_labels(batch)
        if isinstance(inputs, Mapping):
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        found |= example_digests(inputs)
    return found


def state_of(out: Path) -> Path:
    """File beside a merge that an interrupted fit goes on from."""
    return out.with_name(f"{out.name}.fit")


def memory(config: MergeConfig, vectors: TaskVectors) -> str:
    """A sentence on what a fit holds in memory, from headers alone: a user's module is not run."""
    merged = [name for name in vectors.treatments if module_names(vectors, name)]
    size = 4 if vectors.dtype == torch.float32 else 8
    entries = {name: math.prod(info.shape) for name, info in vectors.base.tensors.items()}
    basis = size * (len(vectors.names) + 2) * sum(entries[name] for name in merged)
    averaged = [n for n, treatment in vectors.treatments.items() if treatment.action == "average"]
    basis += size * len(vectors.names) * sum(entries[name] for name in averaged)
    model = size * sum(entries.values())
    return (
        f"fit with experts on predictions: {basis / 1e6:.3g} MB of updates and merges, {3 * model / 1e6:.3g} MB of "
        "network, base and merged weights, and the activations of one batch of "
        f"{config.functional.batch_size} examples with their gradients"
    )


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Outputs of a task as a forward function of a span model."""

    task: Task

    def __call__(self, network: Any, batch: Any) -> Tensor:
        return self.task.logits(network, batch)


def _expert(task: Task, model: SpanModel, importance: float) -> FactorExpert:
    """The functional expert of a task on its own inputs."""
    batches = [_without_labels(batch) for batch in task.loader]
    if not batches:
        raise ConfigError(f"functional.tasks: the loader of {task.name!r} has no batches. Give it some inputs.")
    inputs = joined_batches(batches)
    counted = _counted(inputs, task, model)
    return functional(task.name, model, inputs, _Outputs(task), counted=counted, importance=importance)


def _without_labels(batch: Any) -> Any:
    """The inputs of a pair of inputs and labels; a mapping keeps its own, in which -100 says what does not count."""
    return batch[0] if type(batch) in (tuple, list) and len(batch) == 2 else batch


def _counted(inputs: Any, task: Task, model: SpanModel) -> Tensor | None:
    """Mask of the tokens that count; None where outputs are one row for each example."""
    first = rows_of(inputs, torch.arange(1))
    with torch.no_grad():
        outputs = model.call(model.expert(task.name), _Outputs(task), first, averages=task.name)
    if outputs.ndim != 3 or not isinstance(inputs, Mapping):
        return None
    masks = [inputs["labels"] != IGNORED] if "labels" in inputs else []
    masks += [inputs["attention_mask"].bool()] if "attention_mask" in inputs else []
    return torch.stack(masks).all(0) if masks else None


def _only_design(config: MergeConfig, vectors: TaskVectors) -> Design:
    table = DesignTable(config, vectors.base)
    merged = [name for name in vectors.treatments if module_names(vectors, name)]
    designs = list({id(design): design for design in map(table, merged)}.values())
    if len(designs) != 1 or designs[0].center is not None or designs[0].coordinates != "full":
        raise ConfigError(
            "functional.tasks: experts on predictions are beside one design of all tensors, solved in full "
            "coordinates, whose anchor is no checkpoint. Take filters, `coordinates: span` or the anchor's path out."
        )
    return designs[0]


def _require_models(tasks: tuple[Task, ...], names: tuple[str, ...]) -> None:
    unknown = [task.name for task in tasks if task.name not in names]
    if unknown:
        raise ConfigError(
            f"functional.tasks: no model is called {unknown[0]!r}, whose predictions the task is about. Models: "
            f"{', '.join(names)}."
        )
