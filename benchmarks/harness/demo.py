"""The main job on real input: merge a suite's fine-tunes with every method and compare them on test examples.

The scaling of every method, and the anchor precision where the plan says so, is chosen on validation with one budget.
Printed are, per task and on average, how good the merges are and what they cost. The output folder gets the numbers
(`results.csv`, `results.md`), a plot (`results.png`) and the best product of experts as an ordinary checkpoint folder
(`merged`), which is loaded again and evaluated. Then ensembles are drawn from the posterior around that merge
(`ensembles.md`, `temperatures.csv`, `temperatures.png`), experts on predictions of a few unlabelled inputs are fitted
around it where the plan says so (`functional.md`), and everything ends in one page (`report.html`), made from
`draws` and `predictions.npz` as `poe-merge diagnose` makes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.harness.calibration import Calibration
from benchmarks.harness.ensemble_report import ensemble_markdown, ensemble_note, ensemble_tables, path_plot, write_paths
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import Scores, evaluate, mean_scores, own_logits, score, task_logits
from benchmarks.harness.functional import HEADER, Line, Predictions, cells
from benchmarks.harness.functional import note as functional_note
from benchmarks.harness.methods import Loaded, Method, solve
from benchmarks.harness.outcomes import Outcome
from benchmarks.harness.page import report
from benchmarks.harness.parallel import cores
from benchmarks.harness.plan import Merges, Plan
from benchmarks.harness.plot import bar_plot
from benchmarks.harness.report import (
    EXPERTS,
    MEAN,
    Row,
    best_note,
    device_table,
    markdown,
    run_note,
    selection_note,
    tail_table,
    task_table,
    write_csv,
)
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.search import Settings
from benchmarks.harness.suite import Suite
from inference.map import fixed_point
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from poe_models import TaskVectors

MERGED = "merged"


def judge(name: str, suite: Suite, logits: Mapping[str, Tensor]) -> Row:
    """A row without costs from test logits of every task."""
    labels = {task: suite.tasks[task].splits["test"].labels for task in logits}
    scores = {task: score(logits[task], labels[task]) for task in logits}
    correct = {task: logits[task].argmax(1) == labels[task] for task in logits}
    return Row(name, name, "", scores, correct, logits=logits)


def reference_rows(suite: Suite) -> list[Row]:
    """The base on every task, and every expert on its own."""
    own = {task: own_logits(suite, suite.model(folder), task, "test") for task, folder in suite.experts.items()}
    base = task_logits(suite, suite.base, "test")
    return [judge("base", suite, base), judge(EXPERTS, suite, own)]


def choose(method: Method, suite: Suite, merges: Merges, plan: Plan, seed: int) -> tuple[Settings, float]:
    """Settings of one method and their mean validation accuracy.

    Args:
        method: The method.
        suite: Tasks and heads.
        merges: Of its updates.
        plan: The budget.
        seed: Of the search.

    Returns:
        The best settings and the accuracy.
    """

    def validation(settings: Settings) -> Scores:
        state = merges.of(method, settings.eta).merge.state(settings.scaling)
        return mean_scores(evaluate(suite, state, "validation"))

    best = plan.search(method, validation, seed)
    return best.settings, best.scores.accuracy


def merge_row(method: Method, suite: Suite, merges: Merges, settings: Settings) -> Row:
    """The merge with given settings on the test examples, and what it took."""
    solved = merges.of(method, settings.eta)
    return replace(
        judge(method.name, suite, task_logits(suite, solved.merge.state(settings.scaling), "test")),
        family=method.family,
        energy=method.energy_name,
        settings=settings,
        merge_seconds=solved.seconds,
        peak_mib=solved.mib,
        weight_spread=solved.merge.weight_spread,
        unconverged=solved.merge.unconverged,
        other_starts=solved.merge.other_starts,
    )


Tails = list[tuple[Row, Row]]
"""Rows of heavy-tailed methods, each with its Gaussian twin's at the same settings."""


def compare(suite: Suite, plan: Plan, seed: int, tell: Callable[[str], None]) -> tuple[list[Row], Tails]:
    """One row for each method, its settings chosen on validation, and the heavy-tailed ones beside their twins.

    Args:
        suite: What to merge and to judge by.
        plan: The methods and the budget.
        seed: Of every search.
        tell: Called with each method's name when its turn comes.

    Returns:
        The rows in order, and the pairs.
    """
    merges = Merges(Loaded(suite.vectors()))
    rows, tails = [], []
    for method in plan.methods:
        tell(method.name)
        started = time.perf_counter()
        settings, accuracy = choose(method, suite, merges, plan, seed)
        searched = time.perf_counter() - started
        row = merge_row(method, suite, merges, settings)
        rows.append(replace(row, validation=accuracy, search_seconds=searched))
        if method.heavy_tailed:
            tails.append((rows[-1], merge_row(method.twin(), suite, merges, settings)))
    return rows, tails


def save_merge(method: Method, settings: Settings, suite: Suite, out: Path) -> Design:
    """Write one merge as a checkpoint folder, in the place of an earlier demo's.

    Args:
        method: The method, a product of experts.
        settings: Its settings.
        suite: Base and experts.
        out: The folder to make or replace.

    Returns:
        What was merged.

    Raises:
        FileExistsError: If `out` is something else than a merged model.
    """
    if out.exists() and not (out / "poe_merge.json").is_file():
        raise FileExistsError(f"`save_merge(out={str(out)!r})`: it is not a merged model. Give another --out folder.")
    design = Design(method.design(tuple(suite.experts), settings.eta), settings.scaling)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as temporary:
        merge_checkpoint(suite.vectors(), design, Path(temporary) / MERGED)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(Path(temporary) / MERGED, out)
    return design


def device_seconds(method: Method, settings: Settings, suite: Suite) -> dict[str, float]:
    """Seconds of one merge on the CPU and on each CUDA device, the second time it is run there."""
    devices = {f"CPU, {cores()} cores": torch.device("cpu")}
    devices |= {torch.cuda.get_device_name(i): torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    seconds = {}
    for name, device in devices.items():
        for _ in range(2):
            started = time.perf_counter()
            vectors = TaskVectors(suite.base, suite.experts, device=device)
            solve(method, vectors, settings.eta).state(settings.scaling)  # the state dict is on the CPU
            seconds[name] = time.perf_counter() - started
    return seconds


def best_of(rows: Sequence[Row], methods: Sequence[Method]) -> tuple[Method, Row]:
    """The method with the highest validation accuracy among products of experts, and its row."""
    pairs = [(method, row) for method, row in zip(methods, rows, strict=True) if method.energy is not None]
    return max(pairs, key=lambda pair: pair[1].validation or 0.0)


def run(suite: Suite, out: Path, plan: Plan, seed: int, console: Console) -> tuple[list[Row], list[Outcome]]:
    """Compare all methods, print and save everything.

    Args:
        suite: What to merge and to judge by.
        out: Folder for the numbers, the plot and the best merge.
        plan: The methods and the budget.
        seed: Of every search.
        console: Where to print.

    Returns:
        The rows of methods and those of ensembles that were printed.
    """
    out.mkdir(parents=True, exist_ok=True)
    suite = suite.limited(plan.validation, plan.test)
    with Progress(console=console) as progress:
        bar = progress.add_task("merging", total=len(plan.methods))
        merged, tails = compare(suite, plan, seed, lambda name: progress.update(bar, description=name, advance=1))
    rows = [*reference_rows(suite), *merged]
    for task in (*suite.tasks, MEAN):
        console.print(task_table(rows, task))
    note = notes(suite, merged, plan, seed)
    console.print(note, highlight=False)
    console.print(tail_table(tails))
    design = report_best(plan.methods, merged, suite, out, console)
    write_csv(out / "results.csv", [*rows, *(twin for _, twin in tails)])
    (out / "results.md").write_text(markdown(rows, tails, note), encoding="utf-8")
    bar_plot(rows, tails, suite.network.name).savefig(out / "results.png", dpi=150)
    outcomes = compare_ensembles(Ensembles(suite, design, out / MERGED, seed, plan.budget), out, console)
    if plan.examples:
        fit_predictions(suite, design, plan.examples, seed, out, console)
    shown = [row for row in rows if row.name in (EXPERTS, "task arithmetic")]
    with console.status("report"):
        page, warnings = report(suite, design, out / MERGED, shown, outcomes, seed)
    console.print(
        f"numbers, plots and merged model: {out}; report with {len(warnings)} warnings: {page}", highlight=False
    )
    return rows, outcomes


def notes(suite: Suite, merged: Sequence[Row], plan: Plan, seed: int) -> str:
    """What the table of methods says and what it does not, from its numbers.

    Args:
        suite: What was merged and judged.
        merged: A row for each method.
        plan: The methods and the budget.
        seed: Of the searches.

    Returns:
        Sentences.
    """
    _, best = best_of(merged, plan.methods)
    arithmetic = next(row for row in merged if row.name == "task arithmetic")
    validation = [len(task.splits["validation"]) for task in suite.tasks.values()]
    return " ".join(
        [run_note(suite.seeds, seed), plan.note(suite), best_note(best, arithmetic), selection_note(best, validation)]
    )


def compare_ensembles(ensembles: Ensembles, out: Path, console: Console) -> list[Outcome]:
    """Draw and judge ensembles, print and save what came out.

    Args:
        ensembles: What to draw.
        out: Folder for the table, the temperatures and all predictions.
        console: Where to print.

    Returns:
        The rows that were printed.
    """
    with Progress(console=console) as progress:
        bar = progress.add_task("ensembles", total=None)
        outcomes = ensembles.compare(lambda done, total: progress.update(bar, completed=done, total=total))
    for table in ensemble_tables(outcomes):
        console.print(table)
    console.print(ensemble_note(outcomes), highlight=False)
    run = run_note(ensembles.suite.seeds, ensembles.seed)
    (out / "ensembles.md").write_text(ensemble_markdown(outcomes, run), encoding="utf-8")
    write_paths(out / "temperatures.csv", outcomes)
    path_plot(ensembles, outcomes).savefig(out / "temperatures.png", dpi=150)
    return outcomes


def fit_predictions(suite: Suite, design: Design, examples: int, seed: int, out: Path, console: Console) -> list[Line]:
    """Fit experts on predictions around the best merge, print and save what came out.

    Args:
        suite: What was merged, with the examples of the demo.
        design: The best merge.
        examples: Unlabelled training examples of each task.
        seed: Of examples and mini-batches.
        out: Folder for the table.
        console: Where to print.

    Returns:
        The rows that were printed.
    """
    predictions = Predictions(suite, Calibration(suite, examples, seed), seed)
    product = design.poe
    merged = {
        module.name: design.scaling * fixed_point(product.bind(module.updates.unsqueeze(0))).value[0]
        for module in predictions.vectors.modules
    }
    with console.status("experts on predictions"):
        lines = list(predictions.lines("the best merge", merged, laplace=False))
    table = Table(*HEADER, title="test, mean over tasks: experts on predictions of unlabelled inputs")
    for line in lines:
        table.add_row(*cells(line))
    console.print(table)
    text = functional_note(lines, examples)
    console.print(text, highlight=False)
    body = markdown_table(list(HEADER), [cells(line) for line in lines], left=1)
    (out / "functional.md").write_text(f"{body}\n\n{text}\n", encoding="utf-8")
    return lines


def report_best(methods: Sequence[Method], merged: Sequence[Row], suite: Suite, out: Path, console: Console) -> Design:
    """Save the best merge, load it again, and say what to know about the solves."""
    method, best = best_of(merged, methods)
    assert best.settings is not None
    design = save_merge(method, best.settings, suite, out / MERGED)
    again = evaluate(suite, out / MERGED, "test")
    console.print(f"{best.name}, best on validation, saved and loaded again: test {mean_scores(again).accuracy:.3f}")
    if torch.cuda.is_available():
        console.print(device_table(best.name, device_seconds(method, best.settings, suite)))
    for row in merged:
        if row.unconverged:
            console.print(f"{row.name}: did not converge in {', '.join(row.unconverged)}", style="yellow")
        if row.other_starts:
            console.print(f"{row.name}: another start than the twin won in {', '.join(row.other_starts)}")
    return design
