"""The comparison of merging rules as Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_bench import BASE, Chosen, Line, Tables
from diagnostics.estimates import Estimate
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods
from inference import scores

OWN, AVERAGE = "own experts", "average of all experts' predictions"


def report(
    lines: Sequence[Line],
    bounds: tuple[Tables, Tables],
    labels: Mapping[str, Tensor],
    suite: str,
    command: str,
    seconds: float,
) -> tuple[str, Comparison]:
    """The page, and the comparison that it is made from.

    Args:
        lines: The base first, then the rules.
        bounds: Test probabilities of every expert on its own task, and of the mean over experts.
        labels: Of the test examples by task.
        suite: The suite in words.
        command: What made them.
        seconds: How long it took.

    Returns:
        Markdown and all scores.
    """
    own, mean = bounds
    tables = {label(line.rule, stage): chosen.probabilities for line in lines for stage, chosen in stages(line).items()}
    found = compare_methods({**tables, OWN: own, AVERAGE: mean}, labels, seed=0, experts=own)
    maps = list(lines[0].posteriors)
    parts = [
        f"Merging rules on the {suite}, alone and as the centre of the anchor of Cauchy experts. Made by `{command}` "
        f"in {seconds / 60:.0f} minutes on {machine()}.",
        "Mean test accuracy over tasks; brackets are 95 % bootstrap intervals over test examples, paired in "
        "differences. Those of differences hold for all rows of a column together. They do not cover the choice of "
        "settings on validation, nor another training of the experts: this is one run, of one seed. λ, η and the one "
        "parameter of a rule's own were chosen there, by one budget of trials for each search. A posterior's centre is "
        "the rule as chosen, so that posterior and rule together had two; its η may be so large that hardly more than "
        "the centre is left, and one trial is there. Few trials miss settings: rows may differ by what their searches "
        "happened to find.",
        accuracy_table(lines, found, maps),
        "\n".join(verdict(lines, found, name) for name in maps),
        "How well calibrated they are: NLL in nats, and ECE in 20 bins.",
        calibration_table(lines, found, maps),
        "What was chosen (in brackets the mean validation accuracy):",
        settings_table(lines, maps),
    ]
    if any(len(line.seeds) > 1 for line in lines):
        parts += [
            "Rules that draw, alone, at these settings: accuracy over seeds, and of the mean of their predictions.",
            seeds_table(lines, labels),
        ]
    return "\n\n".join(parts) + "\n", found


def write_report(
    path: Path,
    lines: Sequence[Line],
    bounds: tuple[Tables, Tables],
    labels: Mapping[str, Tensor],
    suite: str,
    command: str,
    seconds: float,
) -> str:
    """Write the page and, beside it, a CSV with every task; arguments as in `report`."""
    text, found = report(lines, bounds, labels, suite, command, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    rows: list[tuple[str, tuple[object, ...]]] = [
        (label(line.rule, stage), (line.rule, line.data, stage, *_numbers(chosen)))
        for line in lines
        for stage, chosen in stages(line).items()
    ]
    rows += [(name, (name, "none", "bound", "", "", "", "")) for name in (OWN, AVERAGE)]
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rule", "data", "stage", "scaling", "eta", "own", "validation_accuracy", "task", *SCORES))
        for method, given in rows:
            for task in found.tasks:
                writer.writerow((*given, task, *(found.on_task(method, task, score).value for score in SCORES)))
            writer.writerow((*given, "mean", *(found.mean(method, score).value for score in SCORES)))
    return text


def stages(line: Line) -> dict[str, Chosen]:
    """The rule alone and its posteriors, by name."""
    return {"alone": line.alone, **line.posteriors}


def label(rule: str, stage: str) -> str:
    """What the comparison calls it."""
    return f"{rule}, {stage}"


def accuracy_table(lines: Sequence[Line], found: Comparison, maps: Sequence[str]) -> str:
    """Before and after, with differences, and the upper bounds."""
    header = ["rule", "data", "alone", *(cell for name in maps for cell in (f"+ {name}", "minus alone"))]
    gaps = {name: found.differences(minus_alone(lines, name)) for name in maps}
    body = []
    for line in lines:
        cells = [line.rule, "" if line.data == "none" else line.data, interval(found.mean(label(line.rule, "alone")))]
        for name in maps:
            difference = gaps[name][label(line.rule, name), label(line.rule, "alone")]
            cells += [f"{found.mean(label(line.rule, name)).value:.3f}", signed(difference)]
        body.append(cells)
    body += [[f"*{name}*", "", interval(found.mean(name)), *[""] * (2 * len(maps))] for name in (OWN, AVERAGE)]
    return markdown_table(header, body, left=2)


def calibration_table(lines: Sequence[Line], found: Comparison, maps: Sequence[str]) -> str:
    """NLL and ECE of every stage."""
    names = ["alone", *(f"+ {name}" for name in maps)]
    header = ["rule", *(f"{score} {name}" for score in ("NLL", "ECE") for name in names)]
    body = []
    for line in lines:
        labels = [label(line.rule, stage) for stage in stages(line)]
        body.append([line.rule, *(f"{found.mean(each, s).value:.3f}" for s in ("nll", "ece") for each in labels)])
    for name in (OWN, AVERAGE):
        cells = [cell for s in ("nll", "ece") for cell in (f"{found.mean(name, s).value:.3f}", *[""] * len(maps))]
        body.append([f"*{name}*", *cells])
    return markdown_table(header, body)


def settings_table(lines: Sequence[Line], maps: Sequence[str]) -> str:
    """Chosen settings of every stage, with their validation accuracy."""
    body = [[line.rule, *(settings_text(chosen, line.parameter) for chosen in stages(line).values())] for line in lines]
    return markdown_table(["rule", "alone", *(f"+ {name}" for name in maps)], body, left=2 + len(maps))


def settings_text(chosen: Chosen, parameter: str) -> str:
    """Settings in words; modules that did not converge are counted."""
    if chosen.settings is None:
        return f"({chosen.validation:.3f})"
    own = [] if chosen.settings.own is None else [f"{parameter} {chosen.settings.own:g}"]
    eta = [f"η {chosen.settings.eta:.4g}"] if chosen.settings.eta else []
    doubt = [f"{chosen.unconverged} modules not converged"] if chosen.unconverged else []
    return ", ".join([f"λ {chosen.settings.scaling:.2f}", *eta, *own, *doubt]) + f" ({chosen.validation:.3f})"


def seeds_table(lines: Sequence[Line], labels: Mapping[str, Tensor]) -> str:
    """Spread of rules that draw."""
    body = []
    for line in lines:
        if len(line.seeds) < 2:
            continue
        each = torch.tensor([mean_accuracy(tables, labels) for tables in line.seeds], dtype=torch.float64)
        mixture = {task: torch.stack([tables[task] for tables in line.seeds]).mean(0) for task in labels}
        numbers = (each.mean(), each.std(), each.min(), each.max(), mean_accuracy(mixture, labels))
        body.append([line.rule, str(len(each)), *(f"{float(number):.3f}" for number in numbers)])
    return markdown_table(["rule", "seeds", "mean", "s.d.", "lowest", "highest", "mean of predictions"], body)


def mean_accuracy(tables: Tables, labels: Mapping[str, Tensor]) -> float:
    """Unweighted mean over tasks."""
    return sum(scores.accuracy(tables[task], labels[task]) for task in labels) / len(labels)


def minus_alone(lines: Sequence[Line], name: str) -> list[tuple[str, str]]:
    """Every rule's posterior and the rule alone, by their labels."""
    return [(label(line.rule, name), label(line.rule, "alone")) for line in lines]


def verdict(lines: Sequence[Line], found: Comparison, name: str) -> str:
    """What a posterior did to the rules, in words that follow from intervals that hold for all rules together."""
    rules = [line.rule for line in lines if line.rule != BASE]
    gains = found.differences(minus_alone([line for line in lines if line.rule != BASE], name)) if rules else {}
    centres = found.differences([(label(rule, name), label(BASE, name)) for rule in rules]) if rules else {}
    return (
        f"- {name} anchored at a rule is {_counted(gains)} the rule alone, and {_counted(centres)} {name} anchored at "
        f"the base. {_most_accurate([line.rule for line in lines], found, name)}"
    )


def _most_accurate(rules: Sequence[str], found: Comparison, name: str) -> str:
    """The highest number of a column, and how many others it can be told from although these examples made it that."""
    column = found.of([label(rule, name) for rule in rules])
    best = column.best()
    told = sum(gap.low > 0 for gap in column.against_best().values())
    centre = next(rule for rule in rules if label(rule, name) == best)
    return (
        f"The most accurate on these test examples is anchored at {centre}: {interval(found.mean(best))}. By intervals "
        f"that hold for all pairs of the column together it is above {told} of the other {len(rules) - 1}."
    )


def _counted(differences: Mapping[tuple[str, str], Estimate]) -> str:
    above = sum(each.low > 0 for each in differences.values())
    below = sum(each.high < 0 for each in differences.values())
    return f"above (in {above} of {len(differences)} cases), below ({below}) or not told from"


def interval(estimate: Estimate) -> str:
    """A score with its interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def signed(difference: Estimate) -> str:
    """A difference of accuracies with its interval."""
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are text.

    Args:
        header: Titles.
        body: Cells.
        left: How many columns are text.

    Returns:
        Markdown.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    return "\n".join([lines[0], "|" + "---|" * left + "---:|" * (len(header) - left), *lines[1:]])


def _numbers(chosen: Chosen) -> tuple[object, ...]:
    settings = chosen.settings
    if settings is None:
        return "", "", "", chosen.validation
    return settings.scaling, settings.eta or "", "" if settings.own is None else settings.own, chosen.validation
