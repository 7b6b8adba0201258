"""The sections of a report on predictions: calibration, comparison, and shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from diagnostics.estimates import Estimate
from diagnostics.plots.predictions import (
    plot_corruptions,
    plot_pareto,
    plot_radar,
    plot_reliability,
    plot_risk_coverage,
)
from diagnostics.predictions.evaluation import Evaluation
from diagnostics.predictions.shift import Corrupted, ShiftComparison
from diagnostics.report.page import Block, Details, Gallery, Plot, Section, Table, Text

MOST_DIAGRAMS, MOST_CURVES = 8, 7
DOUBT = "A number with a question mark is not to be trusted."
HEADERS = {
    "accuracy": "accuracy",
    "worst": "worst task",
    "normalised": "normalised",
    "nll": "NLL, nats",
    "brier": "Brier",
    "ece": "ECE",
    "ece_if_calibrated": "ECE if calibrated",
}
SHIFTED: dict[Literal["accuracy", "ece"], str] = {
    "accuracy": "Mean over kinds of corruption, bars from the mildest to the worst kind.",
    "ece": "The same for the calibration error: a model that knows what it does not know stays low.",
}


def calibration_section(result: Evaluation) -> Section:
    """Every method's scores by task, reliability diagrams, and selective prediction."""
    note = (
        "Brackets are 95 % bootstrap intervals over examples. ECE has 20 bins; the last column is what it would be for "
        f"predictions as sure as these if they were calibrated, which is not zero. {DOUBT}"
    )
    blocks: list[Block] = [Text(note), *(_score_table(result, task) for task in result.tasks)]
    shown = list(result.reliability.items())[:MOST_DIAGRAMS]
    caption = "all tasks together: below the diagonal it is too sure."
    blocks.append(Gallery([Plot(plot_reliability(curve, method), f"{method}, {caption}") for method, curve in shown]))
    if len(shown) < len(result.reliability):
        blocks.append(Text(f"Diagrams of the first {len(shown)} of {len(result.reliability)} methods are shown."))
    curves = dict(list(result.selective.items())[:MOST_CURVES])
    caption = (
        "Error rate among the examples each method is surest of, all tasks together; AURC is the area, lower is better."
    )
    if len(curves) < len(result.selective):
        caption += f" The first {len(curves)} of {len(result.selective)} methods."
    return Section("Calibration", result.verdicts, [*blocks, Plot(plot_risk_coverage(curves), caption)])


def comparison_section(result: Evaluation) -> Section:
    """Methods side by side: means and worst tasks, ranks, the Pareto front, accuracies by task."""
    found = result.comparison
    pareto = "Accuracy against calibration with 95 % intervals; below and to the right is better."
    blocks: list[Block] = [_comparison_table(result), Plot(plot_pareto(found), pareto)]
    if len(found.tasks) >= 3:
        blocks.append(Plot(plot_radar(found), "Accuracy of the first seven methods on each task; outwards is better."))
    return Section("Comparison", [result.winner], blocks)


def shift_section(
    corrupted: Mapping[str, Sequence[Corrupted]] | None, detection: Mapping[str, ShiftComparison] | None
) -> Section:
    """Scores on corrupted images, and detection of another task's inputs by uncertainty.

    Args:
        corrupted: Name of the method to the result of ``under_corruption``.
        detection: Name of the inputs to the result of ``compare_detection``.
    """
    blocks: list[Block] = []
    if corrupted:
        plots = [Plot(plot_corruptions(corrupted, score), caption) for score, caption in SHIFTED.items()]
        blocks += [Gallery(plots), Details("Every kind and severity", [_corruption_table(corrupted)])]
    if detection:
        blocks.append(_detection_table(detection))
    return Section("Under shift", [], blocks)


def _score_table(result: Evaluation, task: str) -> Table:
    columns = ("accuracy", "nll", "brier", "ece", "ece_if_calibrated")
    rows = [
        [method, *(_interval(by_task[task].scores[name]) for name in columns)]
        for method, by_task in result.calibrations.items()
    ]
    size = next(iter(result.calibrations.values()))[task].num_examples
    return Table(f"{task}, {size} examples", ("method", *(HEADERS[name] for name in columns)), rows)


def _comparison_table(result: Evaluation) -> Table:
    found, front = result.comparison, result.comparison.front()
    columns = ("accuracy", "worst", "normalised", "nll", "brier", "ece")
    rows = []
    for name in found.methods:
        summary = found.summary(name)
        cells = [_interval(summary[column]) if column in summary else "" for column in columns]
        rows.append([name, *cells[:2], found.worst_task(name), *cells[2:], f"{summary['rank'].value:.2f}"])
        rows[-1].append(f"{front[name]:.0%}")
    headers = [HEADERS[column] for column in columns]
    caption = (
        "Means over tasks; each interval is of one number by itself. Normalised: accuracy over the own expert's. Rank "
        "by accuracy, mean over tasks. On the "
        f"front: share of resamples in which no other method is both as accurate and as well calibrated. {DOUBT}"
    )
    return Table(caption, ("method", *headers[:2], "", *headers[2:], "rank", "on the front"), rows)


def _corruption_table(corrupted: Mapping[str, Sequence[Corrupted]]) -> Table:
    scores = ("accuracy", "nll", "ece")
    rows = [
        [name, each.kind, str(each.severity), *(_interval(each.calibration.scores[score]) for score in scores)]
        for name, found in corrupted.items()
        for each in found
    ]
    header = ("method", "corruption", "severity", *(HEADERS[score] for score in scores))
    return Table("Corrupted images", header, rows)


def _detection_table(detection: Mapping[str, ShiftComparison]) -> Table:
    header = ("inputs", "MAP, entropy", "ensemble, entropy", "gain", "ensemble, disagreement", "gain")
    rows = [[name, *map(_interval, each.scores.values())] for name, each in detection.items()]
    caption = (
        "How well uncertainty tells another task's inputs: AUROC, 0.5 is chance; gains over the MAP are paired. "
        f"{DOUBT}"
    )
    return Table(caption, header, rows)


def _interval(estimate: Estimate) -> str:
    doubt = "" if estimate.trusted else " ?"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]{doubt}"
