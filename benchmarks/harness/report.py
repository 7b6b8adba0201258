"""Rows of the comparison as rich tables, CSV and Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Table
from torch import Tensor

from benchmarks.harness.evaluate import Scores, mean_scores
from benchmarks.harness.parallel import machine
from benchmarks.harness.search import Settings

MEAN = "mean"
EXPERTS = "own experts"


@dataclass(frozen=True)
class Row:
    """One method on every task's test examples.

    Args:
        name: Name of the method.
        family: Methods that differ in the energy alone share it.
        energy: Name of the energy; empty without one.
        scores: Task -> scores.
        correct: Task -> (n,) bool, which test examples it got right.
        settings: Chosen scaling and anchor precision, if anything was merged.
        validation: Mean validation accuracy at these settings.
        merge_seconds: One solve at these settings, the updates in memory.
        search_seconds: Choosing the settings.
        peak_mib: Its peak memory beside the updates.
        weight_spread: Per module, largest over smallest effective expert weight.
        unconverged: Modules whose solve did not converge.
        other_starts: Modules in which another start than the twin found a lower energy.
        logits: Task -> (n, classes), on the test examples.
    """

    name: str
    family: str
    energy: str
    scores: Mapping[str, Scores]
    correct: Mapping[str, Tensor]
    settings: Settings | None = None
    validation: float | None = None
    merge_seconds: float | None = None
    search_seconds: float | None = None
    peak_mib: float | None = None
    weight_spread: tuple[float, ...] = ()
    unconverged: tuple[str, ...] = ()
    other_starts: tuple[str, ...] = ()
    logits: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, task: str) -> Scores:
        """Scores on a task, or their mean over tasks for `MEAN`."""
        return mean_scores(self.scores) if task == MEAN else self.scores[task]


def normalised(row: Row, own: Row, task: str) -> float:
    """Accuracy over the own expert's; for `MEAN` the mean of the tasks' ratios."""
    ratios = {name: row.scores[name].accuracy / own.scores[name].accuracy for name in row.scores}
    return sum(ratios.values()) / len(ratios) if task == MEAN else ratios[task]


def paired_difference(one: Row, other: Row) -> tuple[float, float]:
    """Mean test accuracy of `one` minus `other`, and the standard error of that over the test examples."""
    gaps = [one.correct[task].double() - other.correct[task].double() for task in one.correct]
    variance = sum(float(gap.var()) / len(gap) for gap in gaps)
    return sum(float(gap.mean()) for gap in gaps) / len(gaps), variance**0.5 / len(gaps)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


COLUMNS = ("method", "λ", "η", "accuracy", "normalised", "NLL", "Brier", "ECE")
COSTS = ("spread", "merge s", "search s", "peak MiB")


def cells(row: Row, own: Row, task: str) -> list[str]:
    """The row's cells for a task; for `MEAN` with `COSTS`."""
    scores, settings = row.on(task), row.settings
    scaling, eta = (settings.scaling, settings.eta or None) if settings else (None, None)
    quality = (scores.accuracy, normalised(row, own, task), scores.nll, scores.brier, scores.ece)
    found = [
        row.name,
        _number(scaling, 2),
        "" if eta is None else f"{eta:.3g}",
        *(_number(value, 3) for value in quality),
    ]
    if task != MEAN:
        return found
    spread = max(row.weight_spread) if row.weight_spread else None
    costs = ((spread, 2), (row.merge_seconds, 2), (row.search_seconds, 1), (row.peak_mib, 0))
    return found + [_number(value, digits) for value, digits in costs]


def task_table(rows: Sequence[Row], task: str) -> Table:
    """All methods on one task, or on average for `MEAN`, with what they cost."""
    own = next(row for row in rows if row.name == EXPERTS)
    title = "test, mean over tasks" if task == MEAN else f"test, {task}"
    table = Table(title=title, title_justify="left")
    for i, column in enumerate((*COLUMNS, *(COSTS if task == MEAN else ()))):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row, own, task))
    return table


TAIL_COLUMNS = ("method", "spread, median", "spread, max", "accuracy", "minus twin", "NLL", "minus twin")


def tail_cells(row: Row, twin: Row) -> list[str]:
    """A heavy-tailed merge beside its Gaussian twin at the same λ and η."""
    gap, error = paired_difference(row, twin)
    nll = row.on(MEAN).nll
    spreads = [_number(value, 3) for value in (median(row.weight_spread), max(row.weight_spread))]
    accuracy = [_number(row.on(MEAN).accuracy, 3), f"{gap:+.4f} ± {error:.4f}"]
    return [row.name, *spreads, *accuracy, _number(nll, 3), f"{nll - twin.on(MEAN).nll:+.4f}"]


def tail_table(pairs: Sequence[tuple[Row, Row]]) -> Table:
    """What the tail alone changed.

    Args:
        pairs: Heavy-tailed rows, each with its twin's.
    """
    table = Table(title="tails alone: each merge against its Gaussian twin at the same λ and η", title_justify="left")
    for i, column in enumerate(TAIL_COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row, twin in pairs:
        table.add_row(*tail_cells(row, twin))
    return table


def run_note(training_seeds: Sequence[int], seed: int) -> str:
    """Which run the numbers are of; they differ between machines and seeds.

    Args:
        training_seeds: Of the experts' trainings, different ones only.
        seed: Of searches, draws and resamples.
    """
    trained = f"training seed {', '.join(map(str, training_seeds))}, " if training_seeds else ""
    return f"One run ({trained}seed {seed} of searches and draws, {machine()}): other runs give other numbers."


def best_note(best: Row, other: Row) -> str:
    """How the merge that validation chose compares with another on the test examples, which had no part in that."""
    gap, error = paired_difference(best, other)
    return (
        f"{best.name} was chosen on validation among the products of experts. On test examples, independent of it, its "
        f"accuracy less that of {other.name} is {100 * gap:+.1f} ± {100 * error:.1f} points (one standard error, "
        "paired over examples). Which row leads on the test examples themselves was not settled beforehand: of so many "
        "rows some lead by chance."
    )


def selection_note(row: Row, validation_sizes: Sequence[int]) -> str:
    """How well validation can tell two settings apart: the binomial standard error of its mean accuracy."""
    p = row.validation or 0.0
    error = sum(p * (1 - p) / size for size in validation_sizes) ** 0.5 / len(validation_sizes)
    return (
        f"λ and η were chosen by validation accuracies with a standard error of {100 * error:.1f} points, so rows may "
        "differ by their settings more than by their method. Twins are merged at the same settings; their standard "
        "errors are each of one pair by itself, and of several pairs one may be off by two."
    )


def markdown(rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]], note: str) -> str:
    """The table of means and the table of tails, for a README.

    Args:
        rows: The methods; one of them must be the own experts.
        pairs: Heavy-tailed rows, each with its twin's.
        note: What stands between the two.
    """
    own = next(row for row in rows if row.name == EXPERTS)
    means = _markdown_table((*COLUMNS, *COSTS), [cells(row, own, MEAN) for row in rows])
    tails = _markdown_table(TAIL_COLUMNS, [tail_cells(row, twin) for row, twin in pairs])
    return "\n".join([*means, "", note, "", *tails]) + "\n"


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    return [lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]]


def device_table(method: str, seconds: Mapping[str, float]) -> Table:
    """Seconds of one merge by device, the hardware in words."""
    table = Table("device", "seconds", title=f"one merge, {method}", title_justify="left")
    for device, value in seconds.items():
        table.add_row(device, f"{value:.2f}")
    return table


FIELDS = (
    *("method", "family", "energy", "task", "scaling", "eta"),
    *("accuracy", "normalised_accuracy", "nll", "brier", "ece", "validation_accuracy"),
    *("merge_seconds", "search_seconds", "peak_mib", "weight_spread_median", "weight_spread_max"),
)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each method and task, and one for the mean.

    Args:
        path: The file to write.
        rows: The methods; one of them must be the own experts.
    """
    own = next(row for row in rows if row.name == EXPERTS)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for row in rows:
            settings = (row.settings.scaling, row.settings.eta) if row.settings else ("", "")
            spread = (median(row.weight_spread), max(row.weight_spread)) if row.weight_spread else ("", "")
            costs = (row.merge_seconds, row.search_seconds, row.peak_mib)
            for task in (*row.scores, MEAN):
                s = row.on(task)
                quality = (s.accuracy, normalised(row, own, task), s.nll, s.brier, s.ece)
                validation = row.validation if task == MEAN else None
                line = (row.name, row.family, row.energy, task, *settings, *quality, validation, *costs, *spread)
                writer.writerow(["" if value is None else value for value in line])
