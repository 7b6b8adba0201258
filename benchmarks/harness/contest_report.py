"""The page of all methods on several suites, side by side, and its CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.contest import BASE, OWN, Entry, Results
from benchmarks.harness.methods import ENERGIES, MAPS
from benchmarks.harness.rule_report import interval, markdown_table, signed
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods

SCALED = ", scaled logits"
LONGER = "Gaussian"
"""The energy that the others of a map are held against."""
NAMED = (
    ("InputGram, Cauchy", "OutputGram, Cauchy"),
    ("InputGram, Cauchy", "TaskArithmetic"),
    ("OutputGram, Cauchy", "TaskArithmetic"),
    ("InputGram, Cauchy", "TSVM"),
    ("InputGram, Cauchy", "IsoC"),
    ("RegMean", "InputGram, Cauchy"),
    ("Activation, Cauchy", "RegMean"),
    ("Mixed, Cauchy", "InputGram, Cauchy"),
)
"""Pairs that were named before any was looked at."""


def compared(runs: Sequence[Results]) -> Comparison:
    """All methods of one suite that every run has, over test examples and training seeds, as they are and scaled."""
    methods = [name for name in runs[0].entries if all(name in each.entries for each in runs)]
    tables = {}
    for name in methods:
        entries = [each.entries[name] for each in runs]
        tables[name] = {task: [each.probabilities[task].double() for each in entries] for task in runs[0].labels}
        scaled = [each.scaled for each in entries]
        tables[name + SCALED] = {task: [each[task] for each in scaled] for task in runs[0].labels}
    return compare_methods(tables, runs[0].labels, seed=0)


def write_report(path: Path, found: Mapping[str, Sequence[Results]], command: str) -> str:
    """Write the page and a CSV beside it.

    Args:
        path: Of the page.
        found: Suite to its results by training seed.
        command: What made them.

    Returns:
        The page.
    """
    comparisons = {suite: compared(runs) for suite, runs in found.items()}
    text = page(found, comparisons, command)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("suite", "method", "task", *SCORES))
        for suite, each in comparisons.items():
            for method in each.methods:
                for task in each.tasks:
                    values = (each.on_task(method, task, score).value for score in SCORES)
                    writer.writerow((suite, method, task, *(f"{value:.6g}" for value in values)))
    return text


def page(found: Mapping[str, Sequence[Results]], comparisons: Mapping[str, Comparison], command: str) -> str:
    """The page as Markdown; arguments as in `write_report`, with each suite's comparison."""
    about = [_about(suite, runs) for suite, runs in found.items()]
    parts = [
        f"Merging rules and MAPs of products of experts on {' and '.join(found)}, over training seeds of the experts. "
        f"Made by `{command}`.",
        "\n".join(f"- {line}" for line in about),
        "λ, η and the one parameter of a rule's own were chosen on validation, by one budget of trials for each row. "
        "Means over tasks and training seeds; brackets are 95 % bootstrap intervals over test examples and training "
        "seeds. *Scaled*: logits divided by the number that minimises validation NLL. NLL in nats, ECE in 20 bins.",
    ]
    for suite, each in comparisons.items():
        parts += [f"## {suite}", table(found[suite], each), spread(found[suite], each)]
    parts += ["## Differences in mean accuracy", _rules_of_differences(), differences(comparisons)]
    parts += ["## What was chosen", settings(found)]
    return "\n\n".join(parts) + "\n"


def table(runs: Sequence[Results], each: Comparison) -> str:
    """Every method's scores on one suite, references first, then by accuracy."""
    plain = [name for name in each.methods if not name.endswith(SCALED)]
    order = sorted(plain, key=lambda name: (name not in (BASE, OWN), -each.mean(name).value))
    body = []
    for name in order:
        cells = [name, str(runs[0].entries[name].facts["data"]), interval(each.mean(name))]
        for score in ("nll", "ece"):
            cells += [f"{each.mean(name + end, score).value:.3f}" for end in ("", SCALED)]
        body.append(cells)
    header = ["method", "data", "accuracy", "NLL", "NLL scaled", "ECE", "ECE scaled"]
    return markdown_table(header, body, left=2)


def spread(runs: Sequence[Results], each: Comparison) -> str:
    """Who is best without data, and what that beats by intervals for all pairs together."""
    free = [name for name, entry in runs[0].entries.items() if entry.facts["data"] == "none" and name in each.methods]
    own = each.of([name for name in free if name != BASE])
    best = own.best()
    close = [name for name, estimate in own.against_best().items() if estimate.low <= 0]
    words = f"not told from {', '.join(close)}" if close else "above all others"
    return f"Most accurate without data: {best}, {words} (intervals that hold for all pairs of data-free methods)."


def pairs_of(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Every energy against the Gaussian of the same map, then the pairs of `NAMED`, of the methods that are there."""
    families = dict.fromkeys([*(method.family for method in MAPS), "Activation", "Mixed"])
    tails = [
        (f"{family}, {energy}", f"{family}, {LONGER}") for family in families for energy in ENERGIES if energy != LONGER
    ]
    return [pair for pair in [*tails, *NAMED] if set(pair) <= set(methods)]


def differences(comparisons: Mapping[str, Comparison]) -> str:
    """The pairs on every suite, accuracy and NLL after scaling."""
    pairs = list(dict.fromkeys(pair for each in comparisons.values() for pair in pairs_of(each.methods)))
    cells: dict[tuple[str, str], list[str]] = {pair: [] for pair in pairs}
    for each in comparisons.values():
        there = pairs_of(each.methods)
        accuracy = each.differences(there)
        nll = each.differences([(one + SCALED, two + SCALED) for one, two in there], "nll")
        for pair in pairs:
            scaled = (pair[0] + SCALED, pair[1] + SCALED)
            cells[pair] += [signed(accuracy[pair]), signed(nll[scaled])] if pair in accuracy else ["", ""]
    header = [f"{suite}, {what}" for suite in comparisons for what in ("accuracy", "NLL scaled")]
    body = [[f"{one} minus {two}", *cells[one, two]] for one, two in pairs]
    return markdown_table(["pair", *header], body)


def _rules_of_differences() -> str:
    return (
        "Paired over test examples and training seeds; the intervals of one column hold for all its rows together. "
        "The pairs were named before they were looked at."
    )


def settings(found: Mapping[str, Sequence[Results]]) -> str:
    """Chosen settings of every method, suite by suite, one for each seed."""
    methods = list(dict.fromkeys(name for runs in found.values() for each in runs for name in each.entries))
    body = [
        [name, *("; ".join(_setting(each.entries.get(name)) for each in runs) for runs in found.values())]
        for name in methods
        if name not in (BASE, OWN)
    ]
    return markdown_table(["method", *found], body, left=1 + len(found))


def _setting(entry: Entry | None) -> str:
    if entry is None:
        return "not run"
    facts = entry.facts
    own = "" if facts["own"] is None else f" own {facts['own']:g}"
    eta = f" η {facts['eta']:.3g}" if facts["eta"] else ""
    doubt = f" ({facts['unconverged']} modules not converged)" if facts["unconverged"] else ""
    return f"λ {facts['scaling']:.2f}{eta}{own}{doubt}"


def _about(suite: str, runs: Sequence[Results]) -> str:
    first = runs[0]
    seeds = ", ".join(str(seed) for each in runs for seed in each.about["seeds"])  # type: ignore[attr-defined]
    tasks = ", ".join(f"{task} ({len(labels)})" for task, labels in first.labels.items())
    machines = " and ".join(dict.fromkeys(str(each.about["machine"]) for each in runs))
    return f"{suite}: {first.about['network']}; test examples of {tasks}; training seeds {seeds}; on {machines}."
