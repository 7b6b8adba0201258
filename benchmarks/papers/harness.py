"""The scores that `lm_eval` left in a folder, as one table: every metric that it reports, none chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.folders import write_page
from benchmarks.papers.published import BASE
from benchmarks.papers.report import table
from benchmarks.papers.setups import Setup
from poe_models.weights.json_files import read_object

Scores = Mapping[tuple[str, str], float]
"""Task and metric, as the harness calls them, to the score."""


def scores_in(folder: Path) -> Scores:
    """Scores of one model, from the newest of its files of results.

    Args:
        folder: Where the harness wrote them.

    Raises:
        ValueError: If there is no such file, or it has no results.
    """
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not files:
        raise ValueError(f"{folder}: no results_*.json. Run score.sh first, or remove the folder.")
    found: Any = read_object(files[-1]).get("results")
    if not isinstance(found, Mapping):
        raise ValueError(f"{files[-1]}: has no `results`. Score the model again.")
    return {
        (task, metric): float(value)
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and "stderr" not in metric
    }


def collect(setup: Setup, out: Path) -> Path:
    """Write the table of all models that were scored; a cell is empty where a model lacks the score.

    Args:
        setup: The table.
        out: Folder of the run, in which `scores` has a folder for each model.

    Raises:
        ValueError: If no model was scored, or the table is scored without the harness.
    """
    if setup.kind != "chat":
        raise ValueError(f"--collect: {setup.name} is scored without lm_eval, and its table is there. Leave it out.")
    places = sorted(path for path in (out / "scores").glob("*") if path.is_dir())
    if not places:
        raise ValueError(f"{out / 'scores'}: no scores. Run {out / 'score.sh'} first.")
    first = (BASE, *setup.tasks)
    rank = {name: number for number, name in enumerate(first)}
    names = sorted((path.name for path in places), key=lambda name: rank.get(name, len(first)))
    found = {name: scores_in(out / "scores" / name) for name in names}
    keys = dict.fromkeys(key for scores in found.values() for key in scores)
    rows = [(*key, *(f"{found[name][key]:.4f}" if key in found[name] else "" for name in names)) for key in keys]
    about = "As lm_eval reports them. No published number of these tables was at hand."
    lines = [f"# {setup.name}: {setup.about}", "", about, "", *table(("task", "metric", *names), rows)]
    write_page(out / "table.md", "\n".join(lines) + "\n")
    return out / "table.md"
