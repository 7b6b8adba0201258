"""One table: models opened, merged, scored, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.folders import write_page
from benchmarks.papers.clip import Clip
from benchmarks.papers.glue import CHOICES, Glue
from benchmarks.papers.llama import Llama, folder_name
from benchmarks.papers.merges import REGMEAN, config_of, configurations, merged_file, task_vectors
from benchmarks.papers.published import BASE
from benchmarks.papers.report import Measured, page
from benchmarks.papers.setups import Setup
from benchmarks.papers.sources import Sources
from diagnostics.predictions.model_scores import ModelScores, evaluate
from inference.models.digest import Silent
from inference.models.disk import replace_file
from poe_merge.activations import make_activations
from poe_merge.user_tasks import UserTasks


@dataclass(frozen=True)
class Options:
    """How a table is run.

    Args:
        out: Folder of merges and of the table.
        methods: Names of the merges; None for all.
        limit: Most examples of each task; None for all.
        device: Where models are merged and run.
        seed: Of the choice of examples, and of the intervals' resamples.
        workers: Processes that read images.
        calibration: Training examples of each task for RegMean; none leaves it out.
        resamples: Of the intervals.
        tell: Called with what happens.
    """

    out: Path
    methods: Sequence[str] | None = None
    limit: int | None = None
    device: str = "cpu"
    seed: int = 0
    workers: int = 0
    calibration: int = 0
    resamples: int = 1000
    tell: Callable[[str], None] = print


def chosen(setup: Setup, options: Options, moments: Path | None = None) -> dict[str, Mapping[str, Any]]:
    """The merges of a run by name.

    Args:
        setup: The table.
        options: How it is run.
        moments: Second moments of the experts' inputs, for RegMean.

    Raises:
        ValueError: If there is no merge of a name.
    """
    known = configurations(setup, moments)
    odd = next((name for name in options.methods or () if name not in known), None)
    if odd is not None:
        more = "RegMean needs --calibration. " if odd == REGMEAN else ""
        raise ValueError(f"--methods {odd!r}: {setup.name} has no such merge. {more}There are {'; '.join(known)}.")
    return {name: known[name] for name in options.methods or known}


def run(setup: Setup, sources: Sources, options: Options) -> Path:
    """Merge a table's models and score them, or write the commands that do.

    Args:
        setup: The table.
        sources: Where models and data come from.
        options: How it is run.

    Returns:
        The file that was written: a table, or a script for Llama.

    Raises:
        ValueError: If the options do not fit the table, or something cannot be had.
    """
    _refuse_idle(setup, options)
    if setup.kind == "chat":
        return _write_script(Llama(setup, sources, options.device), options)
    if setup.kind == "texts":
        return _score(Glue(setup, sources, options.limit, options.seed, options.device), options)
    clip = Clip(setup, sources, options.limit, options.seed, options.device, workers=options.workers)
    return _score(clip, options)


def _refuse_idle(setup: Setup, options: Options) -> None:
    """Refuse options that a table has no use for."""
    without = options.methods is not None and REGMEAN not in options.methods
    idle = {
        "--calibration": options.calibration and (without or setup.kind != "images"),
        "--workers": options.workers and setup.kind != "images",
        "--limit": options.limit is not None and setup.kind == "chat",
        "--seed": options.seed and setup.kind == "chat",
    }
    named = ", ".join(option for option, given in idle.items() if given)
    if named:
        raise ValueError(f"{named}: {setup.name} has no use for it with these merges. Leave it out.")


def _write_script(llama: Llama, options: Options) -> Path:
    models: dict[str, str | Path] = {BASE: str(llama.sources.folder(llama.setup.base))}
    models |= {task: str(llama.sources.folder(model)) for task, model in llama.setup.experts.items()}
    for name, configuration in chosen(llama.setup, options).items():
        models[name] = llama.merge(name, configuration, options.out / "merges")
        options.tell(f"{name}: {models[name]}")
    path = options.out / "score.sh"
    write_page(path, llama.script(models, options.out))
    return path


def _score(table: Clip | Glue, options: Options) -> Path:
    setup, moments = table.setup, options.out / "moments" if options.calibration else None
    merges = chosen(setup, options, moments)
    table.sources.require_data()
    network, base, experts = table.opened()
    tasks = table.tasks()
    if isinstance(table, Clip) and moments is not None and REGMEAN in merges:
        _collect(table, moments, options)
    models: dict[str, Any] = {BASE: base}
    for name, configuration in merges.items():
        config = config_of(setup, configuration, options.device)
        models[name] = merged_file(config, base, experts, options.out / "merges" / f"{folder_name(name)}.safetensors")
        options.tell(f"{name}: merged")
    own = {task.name: experts[task.name.removesuffix(CHOICES)] for task in tasks}
    scores = evaluate(
        models,
        tasks,
        seed=options.seed,
        network=network,
        experts=own,
        base=base,
        submodule=table.submodule,
        num_resamples=options.resamples,
        progress=lambda done, total: options.tell(f"scored {done} of {total}"),
    )
    return _write(Measured(setup, scores, merges, _about(scores, options)), options.out)


def _collect(table: Clip, moments: Path, options: Options) -> None:
    """Second moments of every expert's inputs on its own training images; those of an earlier run are kept."""
    network, base, experts = table.opened()
    config = config_of(table.setup, {"merge_method": "Average()"}, options.device)
    tasks = UserTasks(tuple(table.calibration(options.calibration)), Path(__file__), lambda _: network)
    vectors = task_vectors(config, base, experts)
    make_activations(
        config, vectors, tasks, moments, submodule=table.submodule, resume=moments.exists(), progress=Silent()
    )


def _about(scores: ModelScores, options: Options) -> list[str]:
    limit = "all test examples" if options.limit is None else f"at most {options.limit} test examples of each task"
    regmean = f" RegMean saw {options.calibration} training images of each task." if options.calibration else ""
    return [
        f"Percent, {limit} (seed {options.seed}), {sum(scores.examples.values())} predictions a model;"
        f" NLL in nats.{regmean} Intervals of every score: scores.csv. An empty cell was not at hand."
    ]


def _write(measured: Measured, out: Path) -> Path:
    write_page(out / "table.md", page(measured))
    replace_file(out / "scores.csv", lambda path: measured.scores.to_dataframe().to_csv(path, index=False))
    return out / "table.md"
