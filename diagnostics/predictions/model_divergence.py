"""The functional score of models: each run on its tasks beside the tasks' own experts, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from diagnostics.predictions.functional_score import FunctionalScore, functional_score
from diagnostics.predictions.model_outputs import Model, open_model
from inference.models.ranks import ALONE, Ranks
from inference.models.tasks import Task
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.task_vectors import Source

__all__ = ["divergence_of_models"]


def divergence_of_models(
    models: Mapping[str, Model],
    tasks: Sequence[Task],
    experts: Mapping[str, Model],
    *,
    seed: int,
    network: nn.Module | None = None,
    base: Source | None = None,
    submodule: str = "",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> FunctionalScore:
    """Mean divergence of models from the tasks' own experts, as :func:`functional_score` has it, without labels.

    Log probabilities of all models on all inputs are held in memory. Of an ensemble the mean of its members'
    probabilities is judged.

    Args:
        models: Name to model, as :func:`~diagnostics.predictions.model_scores.evaluate` takes them.
        tasks: The tasks; labels that their batches have are not used, but for -100.
        experts: Task to the model that was fine-tuned on it.
        seed: Of the bootstrap over inputs.
        network: The architecture that weights are loaded into.
        base: The base that adapters among the models are of.
        submodule: Where in the network the checkpoints are, if a head was put on them.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.
        progress: Called with the number of pairs of model and task that are done, and of all that are this process's.
        ranks: The processes that divide these pairs between them; all get the same score.

    Raises:
        ValueError: If there is no model or task, a task has no expert, or outputs are no logits.
        CheckpointError: If a checkpoint cannot be opened, or lacks a tensor of the network.
    """
    lacking = next((task.name for task in tasks if task.name not in experts), None)
    if lacking is not None:
        raise ValueError(
            f"`divergence_of_models(...)`: task {lacking!r} has no expert to compare with. Give `experts`, task to "
            "model."
        )
    origin = None if base is None else open_checkpoint(base)
    opened = {name: open_model(name, model, network, origin, submodule) for name, model in models.items()}
    teachers = {t.name: open_model(f"expert of {t.name}", experts[t.name], network, origin, submodule) for t in tasks}
    pairs = [(task, name) for task in tasks for name in (None, *opened)]
    calls = [partial((teachers[t.name] if n is None else opened[n]).log_probabilities, t) for t, n in pairs]
    found = ranks.results(calls, progress)
    own: dict[str, Tensor] = {}
    tables: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    for (task, name), logs in zip(pairs, found, strict=True):
        (own if name is None else tables[name])[task.name] = logs
    return functional_score(tables, own, seed=seed, logits=True, num_resamples=num_resamples, confidence=confidence)
