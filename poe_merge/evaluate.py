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

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from poe_merge import settings as s
from poe_merge.config import Checkpoint, label_of
from poe_merge.sections import Section, validated
from poe_merge.settings import ConfigError, Value, read_yaml

if TYPE_CHECKING:
    from diagnostics.predictions.model_scores import ModelScores

__all__ = ["EvaluationConfig", "evaluate", "load_evaluation", "write_csv"]

MEMBERS = "ensemble.json"


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


def load_evaluation(path: Path, tasks: str | None = None, *, allow_code: bool = False) -> EvaluationConfig:
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
    return validated(document, EvaluationConfig, sections, [path.absolute().parent, Path.cwd()])


def evaluate(
    config: EvaluationConfig, folders: list[Path], progress: Callable[[int, int], None] | None = None
) -> ModelScores:
    """Evaluate the models of a configuration.

    Args:
        config: The configuration.
        folders: Where the user's module is looked for.
        progress: Called with the number of pairs of model and task that are done, and of all.

    Raises:
        ConfigError: If two models have one name.
        ValueError: If the user's module, a model or a task does not fit.
    """
    from diagnostics.predictions.model_scores import CLASS_METRICS
    from diagnostics.predictions.model_scores import evaluate as evaluate_models
    from poe_merge.user_tasks import read_tasks

    labels = [entry.label for entry in config.models]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"models: two are called `{twice}`; give each a `name` of its own.")
    user = read_tasks(config.tasks, folders)
    return evaluate_models(
        {entry.label: _members(entry.model) for entry in config.models},
        user.tasks,
        seed=config.seed,
        metrics=config.metrics or CLASS_METRICS,
        network=user.network(config.base_model).to(config.device),
        experts=config.experts,
        base=config.base_model,
        reference=config.reference,
        submodule=config.submodule,
        num_resamples=config.num_resamples,
        confidence=config.confidence,
        progress=progress,
    )


def _members(source: str) -> str | list[Path]:
    """A checkpoint, or the folders of an ensemble's members."""
    record = Path(source) / MEMBERS
    if not record.is_file():
        return source
    about: Any = json.loads(record.read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("format") != "checkpoints":
        raise ValueError(
            f"{source}: an ensemble of deltas, which are no models of their own. Write it with `--format checkpoints`."
        )
    return sorted(folder for folder in record.parent.glob("member-*") if folder.is_dir())


def write_csv(found: ModelScores, out: Path) -> Path:
    """Write the table of ``ModelScores.to_dataframe``, whole or not at all; one that is there is replaced."""
    from inference.models.disk import replace_file

    target = out.expanduser().resolve()
    replace_file(target, lambda path: found.to_dataframe().to_csv(path, index=False), "run again")
    return target
