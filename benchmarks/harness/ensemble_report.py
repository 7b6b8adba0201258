"""The comparison of ensembles as a rich table, Markdown, CSV and a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.outcomes import KINDS, LAST, SCALED_MAP, SCOPES, Outcome
from diagnostics.estimates import Estimate
from diagnostics.plots import plot_pareto
from diagnostics.predictions.comparison import compare_methods

PATH_RESAMPLES = 200
SHOWN = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
MINUS = "minus MAP"
COLUMNS = ("members", "sampled", "T", "τ", "centre", *(column for shown in SHOWN.values() for column in (shown, MINUS)))


def cells(outcome: Outcome) -> list[str]:
    """One row: mean scores over tasks, and what they differ by from the MAP's, with 95 % intervals."""
    found = [
        outcome.name,
        outcome.scope,
        "" if outcome.temperature is None else f"{outcome.temperature:.1e}",
        f"{outcome.logit_temperature:.2f}",
        "" if outcome.distance is None else f"{outcome.distance:.1f}",
    ]
    for score in SHOWN:
        difference = outcome.differences.get(score)
        found.append(f"{getattr(outcome.mean, score):.3f}")
        found.append(
            "" if difference is None else f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        )
    return found


def ensemble_tables(outcomes: Sequence[Outcome]) -> tuple[Table, Table]:
    """Point estimates and ensembles on the test examples, means over tasks; and what they differ by from the MAP."""
    title = "test, mean over tasks: the MAP and ensembles around it"
    scores = _table(title, [column for column in COLUMNS if column != MINUS])
    title = "minus the MAP, with 95 % intervals over test examples that hold for all rows of a column together"
    differences = _table(title, [*COLUMNS[:2], *SHOWN.values()])
    for outcome in outcomes:
        row = cells(outcome)
        scores.add_row(*(cell for cell, column in zip(row, COLUMNS, strict=True) if column != MINUS))
        if outcome.differences:
            found = [cell for cell, column in zip(row, COLUMNS, strict=True) if column == MINUS]
            differences.add_row(*row[:2], *found)
    return scores, differences


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i > 1 else "left", no_wrap=True)
    return table


def ensemble_note(outcomes: Sequence[Outcome]) -> str:
    """What the table shows, in words that follow from its intervals."""
    scaled = next(outcome for outcome in outcomes if outcome.name == SCALED_MAP)
    sentences = [
        f"Dividing the MAP's logits by {scaled.logit_temperature:.2f} gives NLL {scaled.mean.nll:.3f} and ECE "
        f"{scaled.mean.ece:.3f}."
    ]
    for scope in SCOPES:
        drawn = {each.name: each for each in outcomes if each.scope == scope}
        if not drawn:
            continue
        for score in ("accuracy", "nll"):
            found = {name: each.differences[score] for name, each in drawn.items()}
            sentences.append(f"Sampling {scope}, {SHOWN[score]} against the MAP's is {_placed(found)}.")
        against = {name: each.nll_from_scaled for name, each in drawn.items() if each.nll_from_scaled is not None}
        sentences.append(f"Against that of the MAP with scaled logits, NLL is {_placed(against)}.")
    return " ".join(sentences)


def _placed(differences: Mapping[str, Estimate]) -> str:
    """Names by the side of zero on which their intervals lie."""
    kinds: dict[str, list[str]] = {"below": [], "above": [], "not told apart": []}
    for name, each in differences.items():
        kinds["below" if each.high < 0 else "above" if each.low > 0 else "not told apart"].append(f"{name} ({each})")
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


def ensemble_markdown(outcomes: Sequence[Outcome], run: str) -> str:
    """The table and what it says, for a README.

    Args:
        outcomes: The result of `Ensembles.compare`.
        run: Which run it is, in a sentence.

    Returns:
        Markdown.
    """
    members = next(each.tempering.best.num_members for each in outcomes if each.tempering is not None)
    heading = (
        f"{run} Ensembles of {members} around the best merge; each kind has the temperature, and the very members, "
        "that validation NLL chooses for it; with scaled logits, T together with the number τ that divides the logits "
        "of every member. *Centre* is how far the members' mean is from the MAP in the farthest "
        "module, in standard deviations of the draws: beyond 3 an ensemble does not surround the merge. Test examples, "
        "means over tasks; differences with 95 % intervals, paired over test examples, that hold for all rows of a "
        "column together."
    )
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, *(cells(outcome) for outcome in outcomes))]
    table = [lines[0], "|---|---|" + "---:|" * (len(COLUMNS) - 2), *lines[1:]]
    return "\n".join([heading, "", *table, "", ensemble_note(outcomes)]) + "\n"


def write_paths(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Validation scores at every temperature that was tried.

    Args:
        path: The CSV file to write.
        outcomes: Those with a search are written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("members", "sampled", "temperature", "accuracy", "nll", "ece", "num_members", "logit_temperature")
        )
        for outcome in outcomes:
            for point in outcome.tempering.path if outcome.tempering else ():
                scored = (point.temperature, point.accuracy, point.nll, point.ece)
                writer.writerow((outcome.name, outcome.scope, *scored, point.num_members, point.logit_temperature))


def path_plot(ensembles: Ensembles, outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against ECE on validation over temperatures, every kind of ensemble: the counterpart of [BMM] Figure 4.

    Args:
        ensembles: What was drawn.
        outcomes: The result of `ensembles.compare`.

    Returns:
        The figure; temperatures at which more than a tenth of the accuracy is lost are left out.
    """
    tables: dict[str, Mapping[str, Tensor]] = {}
    series: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.tempering is None or outcome.scope != LAST or outcome.name not in KINDS:
            continue
        path = outcome.tempering.path
        best = max(point.accuracy for point in path)
        kept = [point.temperature for point in path if point.accuracy > 0.9 * best]
        series[outcome.name] = [f"{outcome.name}, T = {temperature:.1e}" for temperature in kept]
        tables |= {name: outcome.validation[t] for name, t in zip(series[outcome.name], kept, strict=True)}
    compared = compare_methods(tables, ensembles.validation.labels, seed=ensembles.seed, num_resamples=PATH_RESAMPLES)
    axes = plot_pareto(compared, series)
    axes.set_title(f"validation, {LAST} sampled, over temperatures", loc="left", pad=21, fontsize=11)
    return cast(Figure, axes.figure)
