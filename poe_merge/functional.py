r"""Experts on predictions in a configuration: a user's module of tasks beside the product in weight space.

::

    functional:
      tasks: my_tasks.py                # network(base) and tasks(), as for poe-merge evaluate; labels are not used
      importance: 1.0
      held_out: 0.25                    # share of each task's inputs that stops the fit early
      tied: layers\.(\d+)             # one coefficient for each expert and layer; each module's own without

The design of ``parameters`` is the product in weight space, and its merge the centre of the span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.draws import Draws
from inference.functional import SpanModel, fit, functional, functional_laplace, joined_batches, merge_designs
from inference.functional.expert import count_of, example_digests, rows_of
from inference.models.modules import module_names
from inference.models.outputs import IGNORED
from inference.models.staging import check_output
from inference.models.tasks import Task
from inference.solution import FitInfo, Solution, Status
from poe_merge.build import DesignTable
from poe_merge.config import ConfigError, MergeConfig
from poe_merge.record import read_record
from poe_merge.user_tasks import UserTasks, read_tasks
from poe_models.experts import FactorExpert
from poe_models.posterior import Posterior
from poe_models.weights.task_vectors import TaskVectors

if TYPE_CHECKING:
    from inference.models.averages import ModelDesigns
    from inference.models.design import Design
    from inference.models.method_design import AnyDesign
    from poe_merge.progress import Bars


SEEN, FIT = "inputs_of_the_fit", "fit"
"""Keys of a record's settings: task to digests of the inputs that a fit has seen, and the coefficients it found."""


@dataclass(frozen=True, eq=False)
class Span:
    """A configuration's span and posterior with experts on predictions.

    Attributes:
        model: The network in the span.
        posterior: Its posterior.
        held_out: Experts on the inputs that stop the fit.
        user: Module of tasks.
        design: The design of all tensors in weight space.
    """

    model: SpanModel
    posterior: Posterior
    held_out: tuple[FactorExpert, ...]
    user: UserTasks
    design: Design

    @classmethod
    def of(cls, config: MergeConfig, vectors: TaskVectors, temperature: float = 1.0) -> Span:
        """Solve for the centre of the span, and run every expert on the inputs of its task.

        Raises:
            ConfigError: If designs differ between tensors, or tasks and models do not fit.
        """
        given = config.functional
        assert given.tasks is not None
        design = _only_design(config, vectors)
        design = replace(design, poe=replace(design.poe, temperature=temperature))
        user = read_tasks(given.tasks)
        _require_models(user.tasks, vectors.names)
        prefix = f"{given.submodule}." if given.submodule else ""
        model = SpanModel(user.network(config.base_model), vectors, design.poe, prefix=prefix, tied=given.tied)
        pairs = [_experts(task, model, given.importance, given.held_out) for task in user.tasks]
        held_out = tuple(held for _, held in pairs if held is not None)
        return cls(model, model.posterior(*(fitted for fitted, _ in pairs)), held_out, user, design)

    def unscaled(self, tensor: str) -> Design:
        """The design of a tensor at λ = 1: the coefficients have the length of the merge."""
        return replace(self.design, scaling=1.0)


def fitted_designs(
    config: MergeConfig, vectors: TaskVectors, out: Path, resume: bool, bars: Bars
) -> tuple[ModelDesigns[AnyDesign], Path, dict[str, Any]]:
    """Fit the merge of a configuration with experts on predictions.

    Args:
        config: The configuration.
        vectors: Base and experts.
        out: Where the merge will be written; the state of the fit is beside it until the fit is done.
        resume: Go on with an interrupted fit.
        bars: Told how far it is.

    Returns:
        Designs for ``merge_checkpoint``, the user's file, and for the record the inputs that the fit has seen and the
        coefficients that it found.

    Raises:
        ConfigError: If designs differ between tensors, or tasks and models do not fit.
        OutputError: If the output exists, or an interrupted fit is there and ``resume`` is false.
    """
    given = config.functional
    check_output(out, [], resume=resume)
    span, state = Span.of(config, vectors), state_of(out)
    if not resume:
        state.unlink(missing_ok=True)
    solution = fit(
        span.posterior,
        span.model.start(span.design.scaling),
        generator=torch.Generator().manual_seed(config.seed),
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        held_out=span.held_out,
        patience=given.patience,
        progress=bars.steps("fitting"),
        state=state,
    )
    coefficients = span.posterior.coefficients(solution.value)
    told = {
        SEEN: {task.name: sorted(input_digests(task)) for task in span.user.tasks},
        FIT: {"basis": list(span.model.basis), "coefficients": coefficients.tolist(), **_record(solution)},
    }
    return merge_designs(span.model, coefficients), span.user.source, told


def _record(solution: Solution[FitInfo]) -> dict[str, Any]:
    """End of a fit, ready for JSON."""
    found = solution.info
    return {
        "status": solution.status[0].name.lower(),
        "steps": found.steps,
        "best_step": found.best_step,
        "gradient_norm": found.gradient_norm,
        "held_out": found.held_out_trace.tolist(),
    }


def how_it_ended(merged: Path) -> tuple[str, str]:
    """The end of the fit that a merge is of, from its record: a sentence, and what to do if it was too early."""
    fit = read_record(merged)["settings"][FIT]
    held, best, steps = dict(fit["held_out"]), fit["best_step"], fit["steps"]
    at = f"; held-out inputs chose step {best}, {held[best]:.3g} nats an input there" if held else ""
    told = f"Fit with experts on predictions: {steps} steps, gradient of {fit['gradient_norm']:.3g} nats{at}."
    if fit["status"] != Status.MAX_STEPS.name.lower():
        return told, ""
    return told, f"the fit had not converged after {steps} steps. Raise --steps, or hold inputs out (--held-out 0.25)."


def laplace_draws(
    span: Span, merged: Path, members: int, seed: int, progress: Callable[[int, int], None]
) -> tuple[Draws, Tensor]:
    """Draws of Laplace's approximation around a merge with experts on predictions, and the latents of that merge.

    Args:
        span: Its span, at the temperature of the draws.
        merged: The merged folder, whose record has the coefficients of the fit.
        members: How many draws.
        seed: Of the draws.
        progress: Called with the batches of examples that are done and their number.

    Raises:
        ConfigError: If the record has no fit of this span.
    """
    fitted = (read_record(merged).get("settings") or {}).get(FIT)
    shape = (len(span.model.modules), len(span.model.basis))
    found = torch.tensor(fitted["coefficients"] if fitted else (), dtype=torch.float64)
    if fitted is None or tuple(fitted["basis"]) != span.model.basis or found.shape != shape:
        raise ConfigError(
            f"--merge {merged}: its record has no coefficients of a fit in the span of these models. Merge again, and "
            "draw around that."
        )
    mode = span.model.latents(found.to(span.posterior.anchor_precision))
    approximation = functional_laplace(span.posterior, mode, progress)
    return approximation.sample(members, torch.Generator().manual_seed(seed)), mode


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
        f"fit with experts on predictions (its time is not predicted): {basis / 1e6:.3g} MB of updates and merges, "
        f"{3 * model / 1e6:.3g} MB of "
        "network, base and merged weights, and the activations of one batch of "
        f"{config.functional.batch_size} examples with their gradients"
    )


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Outputs of a task as a forward function of a span model."""

    task: Task

    def __call__(self, network: Any, batch: Any) -> Tensor:
        return self.task.logits(network, batch)


def _experts(task: Task, model: SpanModel, importance: float, share: float) -> tuple[FactorExpert, FactorExpert | None]:
    """The functional expert of a task on the inputs that are fitted, and that on a share that is held out, if any.

    Which inputs are held out depends on their number alone, so that later draws surround the same fit.
    """
    batches = [_without_labels(batch) for batch in task.loader]
    if not batches:
        raise ConfigError(f"functional.tasks: the loader of {task.name!r} has no batches. Give it some inputs.")
    inputs = joined_batches(batches)
    counted, count = _counted(inputs, task, model), count_of(inputs)
    held = round(share * count)
    if share and not 0 < held < count:
        raise ConfigError(
            f"functional.held_out: {share:g} of the {count} inputs of {task.name!r} is {held}. Give more inputs, or "
            "another share; some are to be fitted, and some held out."
        )

    def expert(rows: Tensor) -> FactorExpert:
        some = None if counted is None else counted[rows]
        return functional(task.name, model, rows_of(inputs, rows), _Outputs(task), counted=some, importance=importance)

    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)) if held else torch.arange(count)
    return expert(order[held:]), expert(order[:held].sort().values) if held else None


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
