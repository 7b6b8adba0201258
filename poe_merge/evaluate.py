"""``poe-merge evaluate``: models on the tasks of a user's module, as a configuration names them.

::

    base_model: path/to/base
    tasks: my_tasks.py                  # functions network(base) and tasks(); runs only with --allow-code
    models:
      - model: path/to/merged           # a folder, a weight file, an adapter, or an ensemble of poe-merge sample
      - model: path/to/base
        name: base
    experts: {movies: path/to/movies}   # each task's own: scores are divided by its
    reference: base
    metrics: [accuracy, nll, ece]

Tasks may have metrics of their own. The module may be typed as a flag, ``--tasks my_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from inference.models.ranks import ALONE, Ranks
from poe_merge import settings as s
from poe_merge.config import Checkpoint, label_of
from poe_merge.sections import Section, validated
from poe_merge.settings import ConfigError, Value, read_yaml

if TYPE_CHECKING:
    from diagnostics.predictions.functional_score import FunctionalScore
    from diagnostics.predictions.model_scores import ModelScores
    from inference.models.tasks import Task

__all__ = ["EvaluationConfig", "evaluate", "load_evaluation", "score"]

MEMBERS, RECORD = "ensemble.json", "poe_merge.json"


class EvaluatedModel(Section):
    """A model and its name."""

    model: Checkpoint
    """A folder, a weight file, an adapter, an ensemble of ``poe-merge sample``, or a model id of the Hub."""
    name: Annotated[str | None, Field(min_length=1)] = None
    """Its name; that of its path if not given."""

    @property
    def label(self) -> str:
        """The name: as given, or from the path."""
        return label_of(self.name, self.model)


class EvaluationConfig(Section):
    """Configuration of an evaluation."""

    base_model: Checkpoint
    """The base: given to the module's ``network``, and what adapters are opened on."""
    tasks: str
    """The user's module, ``FILE.py``, or ``FILE.py:NAME`` for another function than ``tasks``."""
    models: tuple[EvaluatedModel, ...]
    """A model; once for each."""
    experts: dict[str, Checkpoint] = Field(default_factory=dict)
    """Task to the model that was fine-tuned on it."""
    reference: str | None = None
    """Name of the model that the others are compared with."""
    metrics: tuple[str, ...] = ()
    """Metrics of tasks that have none of their own; accuracy, NLL, Brier score and ECE by default."""
    submodule: str = ""
    """Where in the network the checkpoints are, if a head was put on them."""
    device: Annotated[str, Value(s.device, "DEVICE")] = "cpu"
    """Device that computes: cpu, cuda, cuda:1."""
    seed: Annotated[int, s.number(low=0, whole=True)] = 0
    """Seed of the resamples."""
    num_resamples: Annotated[int, s.number(low=2, whole=True)] = 1000
    """Number of resamples."""
    confidence: Annotated[float, s.number(low=0, above=True)] = 0.95
    """Level of the intervals."""


def load_evaluation(
    path: Path, tasks: str | None = None, *, allow_code: bool = False
) -> tuple[EvaluationConfig, list[Path]]:
    """Read a configuration.

    Args:
        path: The YAML file.
        tasks: The user's module in the place of the file's.
        allow_code: Accept a module that the file names.

    Raises:
        ConfigError: If there are mistakes, or the file names code that nobody allowed.
    """
    document = read_yaml(path)
    if tasks is not None:
        document.put(("tasks",), tasks, "--tasks")
    elif "tasks" in document.data and not allow_code:
        where = document.origins.get(("tasks",), str(path))
        raise ConfigError(
            f"{where}: `tasks: {document.data['tasks']}` is code of one's own, which would be run. If you trust it, "
            "add --allow-code, or type it as --tasks."
        )
    sections: dict[tuple[str, ...], type[Section]] = {(): EvaluationConfig, ("models",): EvaluatedModel}
    beside = [path.absolute().parent, Path.cwd()]
    return validated(document, EvaluationConfig, sections, beside), beside if tasks is None else [Path.cwd()]


def evaluate(
    config: EvaluationConfig,
    folders: list[Path],
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> ModelScores:
    """Evaluate the models of a configuration.

    Args:
        config: The configuration.
        folders: Where the user's module is looked for.
        progress: Called with the number of pairs of model and task that are done, and of all.
        ranks: The processes that divide these pairs between them.

    Raises:
        ConfigError: If two models have one name.
        ValueError: If the user's module, a model or a task does not fit.
    """
    from diagnostics.predictions.model_scores import CLASS_METRICS
    from diagnostics.predictions.model_scores import evaluate as evaluate_models
    from poe_merge.user_tasks import read_tasks

    _require_distinct(config)
    user = read_tasks(config.tasks, folders)
    return evaluate_models(
        {entry.label: _members(entry.model) for entry in config.models},
        user.tasks,
        seed=config.seed,
        metrics=config.metrics or CLASS_METRICS,
        network=user.network(config.base_model).to(ranks.device(torch.device(config.device))),
        experts=config.experts,
        base=config.base_model,
        reference=config.reference,
        submodule=config.submodule,
        num_resamples=config.num_resamples,
        confidence=config.confidence,
        progress=progress,
        ranks=ranks,
    )


def score(
    config: EvaluationConfig,
    folders: list[Path],
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> FunctionalScore:
    """Divergence of the models of a configuration from the tasks' own experts, without labels.

    Args:
        config: The configuration; its ``experts`` are needed, its ``metrics`` and ``reference`` are not used.
        folders: Where the user's module is looked for.
        progress: Called with the number of pairs of model and task that are done, and of all.
        ranks: The processes that divide these pairs between them.

    Raises:
        ConfigError: If two models have one name, a model was fitted on inputs of these tasks, or a key has no use.
        ValueError: If the user's module, a model or a task does not fit.
    """
    from diagnostics.predictions.model_divergence import divergence_of_models
    from poe_merge.user_tasks import read_tasks

    idle = [key for key in ("metrics", "reference") if getattr(config, key)]
    if idle:
        raise ConfigError(f"{idle[0]}: `poe-merge score` has no use for it. Leave it out, or use `poe-merge evaluate`.")
    _require_distinct(config)
    user = read_tasks(config.tasks, folders)
    for entry in config.models:
        _refuse_seen(entry, user.tasks)
    return divergence_of_models(
        {entry.label: _members(entry.model) for entry in config.models},
        user.tasks,
        config.experts,
        seed=config.seed,
        network=user.network(config.base_model).to(ranks.device(torch.device(config.device))),
        base=config.base_model,
        submodule=config.submodule,
        num_resamples=config.num_resamples,
        confidence=config.confidence,
        progress=progress,
        ranks=ranks,
    )


def _require_distinct(config: EvaluationConfig) -> None:
    labels = [entry.label for entry in config.models]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"models: two are called `{twice}`; give each a `name` of its own.")


def _refuse_seen(entry: EvaluatedModel, tasks: Sequence[Task]) -> None:
    """Refuse to judge a merge on inputs that its fit has seen, on which its score is too low."""
    from poe_merge.functional import SEEN, input_digests
    from poe_models.weights.json_files import read_object

    record = Path(entry.model) / RECORD
    if not record.is_file():
        return
    settings: Any = read_object(record).get("settings")
    seen: Any = settings.get(SEEN) if isinstance(settings, dict) else None
    for task in tasks if isinstance(seen, dict) else ():
        own = seen.get(task.name)
        both = len(input_digests(task) & set(map(str, own))) if isinstance(own, list) else 0
        if both:
            raise ConfigError(
                f"{entry.model}: fitted on {both} of the inputs of {task.name!r}, on which its score is too low. Give "
                "tasks with inputs that the fit has not seen: `--tasks FILE.py:NAME`."
            )


def _members(source: str) -> str | list[Path]:
    """A checkpoint, or the folders of an ensemble's members."""
    from poe_models.weights.json_files import read_object

    record = Path(source) / MEMBERS
    if not record.is_file():
        return source
    if read_object(record).get("format") != "checkpoints":
        raise ValueError(
            f"{source}: an ensemble of deltas, which are no models of their own. Write it with `--format checkpoints`."
        )
    return sorted(folder for folder in record.parent.glob("member-*") if folder.is_dir())
