"""The parts of a report that predictions are needed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from diagnostics.estimates import Estimate
from diagnostics.plots.calibration import plot_corruptions, plot_reliability, plot_risk_coverage
from diagnostics.plots.comparison import plot_pareto, plot_radar
from diagnostics.predictions.shift import Corrupted, ShiftComparison
from diagnostics.report.evaluation import JudgedPredictions
from diagnostics.report.page import Block, Details, Gallery, Plot, Section, Table, Text

__all__ = ["calibration_section", "comparison_section", "shift_section"]

MOST_DIAGRAMS, MOST_CURVES = 8, 7
DOUBT = "A number with a question mark is not to be trusted."
SHIFTED: dict[Literal["accuracy", "ece"], str] = {
    "accuracy": "Mean over kinds of corruption, bars from the mildest to the worst kind.",
    "ece": "The same for the calibration error: a model that knows what it does not know stays low.",
}


def calibration_section(result: JudgedPredictions) -> Section:
    """Every method's scores by task, reliability diagrams, and selective prediction.

    Args:
        result: Of ``judge``.

    Returns:
        The section.
    """
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


def comparison_section(result: JudgedPredictions) -> Section:
    """Methods side by side: means and worst tasks, ranks, the Pareto front, accuracies by task.

    Args:
        result: Of ``judge``.

    Returns:
        The section.
    """
    found = result.comparison
    header = ("method", "accuracy", "worst task", "", "normalised", "NLL, nats", "Brier", "ECE", "rank", "on the front")
    rows = [
        [
            each.method,
            _interval(each.accuracy),
            _interval(each.worst),
            each.worst_task,
            "" if each.normalised is None else _interval(each.normalised),
            *(_interval(score) for score in (each.nll, each.brier, each.ece)),
            f"{each.rank.value:.2f}",
            f"{each.front:.0%}",
        ]
        for each in found.summaries()
    ]
    caption = (
        "Means over tasks; each interval is of one number by itself. Normalised: accuracy over the own expert's. Rank "
        "by accuracy, mean over tasks. On the "
        f"front: share of resamples in which no other method is both as accurate and as well calibrated. {DOUBT}"
    )
    pareto = "Accuracy against calibration with 95 % intervals; below and to the right is better."
    blocks: list[Block] = [Table(caption, header, rows), Plot(plot_pareto(found), pareto)]
    if len(found.tasks) >= 3:
        blocks.append(Plot(plot_radar(found), "Accuracy of the first seven methods on each task; outwards is better."))
    return Section("Comparison", [result.winner], blocks)


def shift_section(
    corrupted: Mapping[str, Sequence[Corrupted]] | None, detection: Mapping[str, ShiftComparison] | None
) -> Section:
    """Scores on corrupted images, and how well uncertainty tells another task's inputs.

    Args:
        corrupted: Name of the method to what ``under_corruption`` gave.
        detection: Name of the inputs to what ``compare_detection`` gave.

    Returns:
        The section.
    """
    blocks: list[Block] = []
    if corrupted:
        plots = [Plot(plot_corruptions(corrupted, score), caption) for score, caption in SHIFTED.items()]
        rows = [
            [
                name,
                each.kind,
                str(each.severity),
                *(_interval(each.calibration.scores[s]) for s in ("accuracy", "nll", "ece")),
            ]
            for name, found in corrupted.items()
            for each in found
        ]
        header = ("method", "corruption", "severity", "accuracy", "NLL, nats", "ECE")
        blocks += [Gallery(plots), Details("Every kind and severity", [Table("Corrupted images", header, rows)])]
    if detection:
        header = ("inputs", "MAP, entropy", "ensemble, entropy", "gain", "ensemble, disagreement", "gain")
        rows = [
            [
                name,
                _interval(each.point.entropy),
                _interval(each.ensemble.entropy),
                _interval(each.entropy_gain),
                _interval(each.ensemble.mutual_information),
                _interval(each.mutual_information_gain),
            ]
            for name, each in detection.items()
        ]
        caption = (
            "How well uncertainty tells another task's inputs: AUROC, 0.5 is chance; gains over the MAP are paired. "
            f"{DOUBT}"
        )
        blocks.append(Table(caption, header, rows))
    return Section("Under shift", [], blocks)


def _score_table(result: JudgedPredictions, task: str) -> Table:
    columns = ("accuracy", "nll", "brier", "ece", "ece_if_calibrated")
    rows = [
        [method, *(_interval(by_task[task].scores[name]) for name in columns)]
        for method, by_task in result.calibrations.items()
    ]
    size = next(iter(result.calibrations.values()))[task].num_examples
    return Table(
        f"{task}, {size} examples", ("method", "accuracy", "NLL, nats", "Brier", "ECE", "ECE if calibrated"), rows
    )


def _interval(estimate: Estimate) -> str:
    doubt = "" if estimate.trusted else " ?"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]{doubt}"
