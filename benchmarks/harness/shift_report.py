"""The comparison of MAP and ensembles under shift as Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.corruptions import Corruptions
from benchmarks.harness.outcomes import GIBBS, MAP, SCALED, SCALED_MAP
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import interval, markdown_table, signed
from benchmarks.harness.shift_bench import CLEAN, ENSEMBLES, OTHERS, Condition, Predictions, conditions
from diagnostics.estimates import Estimate
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods
from diagnostics.predictions.corruptions import SEVERITIES
from diagnostics.predictions.shift import ShiftComparison, compare_detection

WORST = max(SEVERITIES)
SHOWN = ("accuracy", "nll", "ece")


def write_report(
    path: Path,
    found: Mapping[str, Predictions],
    labels: Mapping[str, Tensor],
    what: str,
    corruptions: Corruptions,
    command: str,
    seed: int,
    seconds: float,
) -> str:
    """Write the page and, beside it, a CSV with every condition and task.

    Args:
        path: Of the Markdown.
        found: Name of members or point estimate -> its predictions; the MAP comes first.
        labels: Task -> labels of the test examples.
        what: The merge in words, and the suite.
        corruptions: Of the test examples.
        command: What made the page.
        seed: Of the resamples.
        seconds: How long the predictions took.

    Returns:
        The Markdown.
    """
    shown = conditions(corruptions)
    scored = {condition: compared(found, condition, labels, seed) for condition in shown if condition != OTHERS}
    detected = {name: detections(found[MAP], found[name], seed) for name in ENSEMBLES}
    members = found[GIBBS][CLEAN][next(iter(labels))].num_members
    kinds, levels = ", ".join(map(_words, corruptions.kinds)), corruptions.levels
    text = "\n\n".join([
        f"{what} ({', '.join(labels)}): the MAP, and ensembles of {members} draws of the last layer; each as it is, "
        "and with logits divided by one number, of an ensemble chosen together with its temperature, on clean "
        f"validation examples. Made by `{command}` in {seconds:.0f} seconds on {machine()}, after the suite's demo. "
        "*One training seed and one seed of draws.*",
        f"Test examples as they are and under {len(corruptions.kinds)} corruptions ({kinds}), at "
        f"{corruptions.about}; means over tasks and corruptions, NLL in nats, ECE in 20 bins. Brackets are 95 % "
        "intervals of the difference to the MAP, paired over test examples, each by itself.",
        severity_table(scored, levels),
        corruption_verdict(scored, levels),
        f"By corruption, at severity {levels[-1]}:",
        corruption_table(scored),
        "Every task's head is shown its own test examples and those of the other tasks. AUROC of the entropy of the "
        "(mean) probabilities, and of the mutual information between class and member; differences are to the MAP's "
        "entropy.",
        detection_table(detected),
        detection_verdict(detected),
    ]) + "\n"  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    write_csv(path.with_suffix(".csv"), scored, detected, levels)
    return text


def compared(
    found: Mapping[str, Predictions], condition: Condition, labels: Mapping[str, Tensor], seed: int
) -> Comparison:
    """All ways to predict under one condition; the same resamples of test examples under every condition."""
    tables = {name: {task: each.probabilities for task, each in by[condition].items()} for name, by in found.items()}
    return compare_methods(tables, labels, seed=seed)


def pooled(comparisons: Sequence[Comparison]) -> Comparison:
    """The mean of the same comparison under several conditions, whose resamples belong together."""
    first = comparisons[0]
    return replace(
        first,
        values={s: torch.stack([each.values[s] for each in comparisons]).mean(0) for s in SCORES},
        replicates={s: torch.stack([each.replicates[s] for each in comparisons]).mean(0) for s in SCORES},
    )


def at_severity(scored: Mapping[Condition, Comparison], severity: int) -> Comparison:
    """The mean over corruptions; 0 for none."""
    return pooled([found for (_, level), found in scored.items() if level == severity])


def severity_table(scored: Mapping[Condition, Comparison], levels: Sequence[str]) -> str:
    """Scores by severity, whose levels have these names."""
    header = ["severity", "members", *(cell for score in SHOWN for cell in (_title(score), "minus MAP"))]
    body = []
    for severity, text in enumerate((CLEAN[0], *levels)):
        found = at_severity(scored, severity)
        for name in found.methods:
            cells = [text, name]
            for score in SHOWN:
                gap = "" if name == MAP else signed(found.difference(name, MAP, score))
                cells += [f"{found.mean(name, score).value:.3f}", gap]
            body.append(cells)
    return markdown_table(header, body, left=2)


def corruption_table(scored: Mapping[Condition, Comparison]) -> str:
    """Every corruption at its worst: the MAP, and what scaling its logits and Gibbs draws change."""
    changes = [(score, name) for score in ("nll", "ece") for name in (SCALED_MAP, GIBBS, GIBBS + SCALED)]
    header = ["corruption", "accuracy, MAP", "NLL, MAP", "ECE, MAP"]
    header += [f"{_title(score)}, {name} minus MAP" for score, name in changes]
    body = []
    for kind in dict.fromkeys(kind for kind, severity in scored if severity == WORST):
        found = scored[kind, WORST]
        cells = [_words(kind), *(f"{found.mean(MAP, score).value:.3f}" for score in SHOWN)]
        body.append([*cells, *(signed(found.difference(name, MAP, score)) for score, name in changes)])
    return markdown_table(header, body)


def detections(point: Predictions, ensemble: Predictions, seed: int) -> dict[str, ShiftComparison]:
    """Task of the head -> how well it tells its own examples from the other tasks'."""
    return {
        task: compare_detection(
            (point[CLEAN][task], point[OTHERS][task]), (ensemble[CLEAN][task], ensemble[OTHERS][task]), seed=seed
        )
        for task in point[CLEAN]
    }


def detection_table(detected: Mapping[str, Mapping[str, ShiftComparison]]) -> str:
    """AUROC of every head."""
    header = ["head", "MAP", *(f"entropy, {name}" for name in detected)]
    header += [f"mutual information, {name}" for name in detected]
    body = []
    for task, one in next(iter(detected.values())).items():
        cells = [task, interval(one.point.entropy)]
        cells += [signed(by_task[task].entropy_gain) for by_task in detected.values()]
        body.append(cells + [signed(by_task[task].mutual_information_gain) for by_task in detected.values()])
    return markdown_table(header, body)


def corruption_verdict(scored: Mapping[Condition, Comparison], levels: Sequence[str]) -> str:
    """What the intervals say about clean examples and the worst corruption."""
    sentences = []
    for severity in (0, WORST):
        found = at_severity(scored, severity)
        where = "On clean examples" if severity == 0 else f"At severity {levels[-1]}"
        parts = [f"that of {name} {_against(found.difference(name, MAP, 'nll'))}" for name in found.methods[1:]]
        sentences.append(f"{where} the MAP's NLL is {found.mean(MAP, 'nll').value:.3f}; {', '.join(parts)}.")
    return " ".join(sentences)


def _against(difference: Estimate) -> str:
    if difference.low > 0:
        return f"is higher by {difference.value:.3f}"
    return f"is lower by {-difference.value:.3f}" if difference.high < 0 else "cannot be told from it"


def detection_verdict(detected: Mapping[str, Mapping[str, ShiftComparison]]) -> str:
    """Counts of heads, from the intervals."""
    sentences = []
    for name, by_task in detected.items():
        entropy = _counts([each.entropy_gain for each in by_task.values()])
        information = _counts([each.mutual_information_gain for each in by_task.values()])
        sentences.append(f"{name}: the entropy is {entropy}; mutual information is {information}.")
    return " ".join(["Against the MAP's entropy, of the heads:", *sentences])


def _counts(gains: Sequence[Estimate]) -> str:
    better, worse = sum(each.low > 0 for each in gains), sum(each.high < 0 for each in gains)
    return f"better in {better}, worse in {worse}, not told apart in {len(gains) - better - worse}"


def write_csv(
    path: Path,
    scored: Mapping[Condition, Comparison],
    detected: Mapping[str, Mapping[str, ShiftComparison]],
    levels: Sequence[str],
) -> None:
    """One line for each number: value and interval.

    Args:
        path: The file to write.
        scored: Comparisons by condition.
        detected: Ensemble -> head -> detection.
        levels: Names of the severities.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("condition", "severity", "members", "task", "score", "value", "low", "high"))
        for (kind, severity), found in scored.items():
            for name in found.methods:
                for task in found.tasks:
                    for score in SCORES:
                        each = found.on_task(name, task, score)
                        writer.writerow((kind, (CLEAN[0], *levels)[severity], name, task, score, *_rounded(each)))
        for name, by_task in detected.items():
            for task, pair in by_task.items():
                areas = {"entropy": pair.ensemble.entropy, "mutual information": pair.ensemble.mutual_information}
                for score, each in {**areas, "entropy of the MAP": pair.point.entropy}.items():
                    writer.writerow((OTHERS[0], "", name, task, f"AUROC, {score}", *_rounded(each)))


def _rounded(estimate: Estimate) -> tuple[str, ...]:
    return tuple(f"{number:.6g}" for number in (estimate.value, estimate.low, estimate.high))


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _title(score: str) -> str:
    return score if score == "accuracy" else score.upper()
