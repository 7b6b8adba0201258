"""The main job on real input: merge four fine-tuned SqueezeNets with every method and compare them on test images.

`python -m benchmarks.vision.demo` makes or loads the suite, chooses scale and anchor precision of every method on
validation with one budget, and prints, per task and on average, how good the merges are and what they cost. The output
folder gets the numbers (`results.csv`, `results.md`), a plot (`results.png`) and the best product of experts as an
ordinary checkpoint folder (`merged`), which is loaded again and evaluated. Then ensembles are drawn from the posterior
around that merge (`ensembles.md`, `temperatures.csv`, `temperatures.png`), and everything ends in one page
(`report.html`), made from `draws` and `predictions.npz` as `poe-merge diagnose` makes it.

It is one run: `--training-seed` trains other experts (give another `--out`), `--seed` changes searches and draws.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.harness.evaluate import Scores, evaluate, mean_scores, own_logits, score, task_logits
from benchmarks.harness.methods import METHODS, Merge, Method, solve
from benchmarks.harness.parallel import cores
from benchmarks.harness.search import Settings, search
from benchmarks.harness.suite import Suite
from benchmarks.harness.training import accuracy_table
from benchmarks.vision.ensemble_report import ensemble_markdown, ensemble_note, ensemble_tables, path_plot, write_paths
from benchmarks.vision.ensembles import Budget, Ensembles, Outcome
from benchmarks.vision.memory import PeakMemory
from benchmarks.vision.page import report
from benchmarks.vision.plot import bar_plot
from benchmarks.vision.report import (
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
from benchmarks.vision.train import Recipe, make_suite
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from poe_models import TaskVectors

TRIALS = 12
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


def choose(method: Method, suite: Suite, vectors: TaskVectors, trials: int, seed: int) -> tuple[Settings, float]:
    """Settings of one method and their mean validation accuracy.

    Args:
        method: The method.
        suite: Tasks and heads.
        vectors: The task vectors.
        trials: Budget.
        seed: Of the search.

    Returns:
        The best settings and the accuracy.
    """
    merges: dict[float, Merge] = {}

    def validation(settings: Settings) -> Scores:
        if settings.eta not in merges:  # another scale alone needs no other solve
            merges[settings.eta] = solve(method, vectors, settings.eta)
        state = merges[settings.eta].state(settings.scale)
        return mean_scores(evaluate(suite, state, "validation"))

    best, _ = search(validation, method.tuned, trials, seed)
    return best.settings, best.scores.accuracy


def merge_row(method: Method, suite: Suite, settings: Settings) -> Row:
    """Merge with given settings from the checkpoint folders, measure that, and test."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        merge = solve(method, suite.vectors(), settings.eta)
        state = merge.state(settings.scale)
        seconds = time.perf_counter() - started
    return replace(
        judge(method.name, suite, task_logits(suite, state, "test")),
        family=method.family,
        energy=method.energy_name,
        settings=settings,
        merge_seconds=seconds,
        peak_mib=memory.mib,
        weight_spread=merge.weight_spread,
        unconverged=merge.unconverged,
        other_starts=merge.other_starts,
    )


def compare(suite: Suite, methods: Sequence[Method], trials: int, seed: int, tell: Callable[[str], None]) -> list[Row]:
    """One row for each method, its settings chosen on validation.

    Args:
        suite: What to merge and to judge by.
        methods: The methods.
        trials: Settings each may try.
        seed: Of every search.
        tell: Called with each method's name when its turn comes.

    Returns:
        The rows, in order.
    """
    vectors = suite.vectors()
    rows = []
    for method in methods:
        tell(method.name)
        started = time.perf_counter()
        settings, accuracy = choose(method, suite, vectors, trials, seed)
        searched = time.perf_counter() - started
        row = merge_row(method, suite, settings)
        rows.append(replace(row, validation=accuracy, search_seconds=searched))
    return rows


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
    design = Design(method.design(tuple(suite.experts), settings.eta), settings.scale)
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
            solve(method, vectors, settings.eta).state(settings.scale)  # the state dict is on the CPU
            seconds[name] = time.perf_counter() - started
    return seconds


def best_of(rows: Sequence[Row], methods: Sequence[Method]) -> tuple[Method, Row]:
    """The method with the highest validation accuracy among products of experts, and its row."""
    pairs = [(method, row) for method, row in zip(methods, rows, strict=True) if method.energy is not None]
    return max(pairs, key=lambda pair: pair[1].validation or 0.0)


def run(
    suite: Suite,
    out: Path,
    trials: int,
    seed: int,
    console: Console,
    methods: Sequence[Method] = METHODS,
    budget: Budget | None = None,
) -> tuple[list[Row], list[Outcome]]:
    """Compare all methods, print and save everything.

    Args:
        suite: What to merge and to judge by.
        out: Folder for the numbers, the plot and the best merge.
        trials: Settings each method may try.
        seed: Of every search.
        console: Where to print.
        methods: What to compare: task arithmetic and at least one product of experts among them.
        budget: How much is drawn for ensembles.

    Returns:
        The rows of methods and those of ensembles that were printed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        bar = progress.add_task("merging", total=len(methods) + 1)
        merged = compare(suite, methods, trials, seed, lambda name: progress.update(bar, description=name, advance=1))
        progress.update(bar, description="Gaussian twins")
        heavy = [(method, row) for method, row in zip(methods, merged, strict=True) if method.heavy_tailed]
        tails = [(row, merge_row(method.twin(), suite, row.settings)) for method, row in heavy if row.settings]
        progress.update(bar, completed=len(methods) + 1)
    rows = [*reference_rows(suite), *merged]
    for task in (*suite.tasks, MEAN):
        console.print(task_table(rows, task))
    note = notes(suite, merged, methods, seed)
    console.print(note, highlight=False)
    console.print(tail_table(tails))
    design = report_best(methods, merged, suite, out, console)
    write_csv(out / "results.csv", [*rows, *(twin for _, twin in tails)])
    (out / "results.md").write_text(markdown(rows, tails, note), encoding="utf-8")
    bar_plot(rows, tails).savefig(out / "results.png", dpi=150)
    outcomes = compare_ensembles(Ensembles(suite, design, out / MERGED, seed, budget or Budget()), out, console)
    shown = [row for row in rows if row.name in (EXPERTS, "task arithmetic")]
    with console.status("report"):
        page, warnings = report(suite, design, out / MERGED, shown, outcomes, seed)
    console.print(
        f"numbers, plots and merged model: {out}; report with {len(warnings)} warnings: {page}", highlight=False
    )
    return rows, outcomes


def notes(suite: Suite, merged: Sequence[Row], methods: Sequence[Method], seed: int) -> str:
    """What the table of methods says and what it does not, from its numbers.

    Args:
        suite: What was merged and judged.
        merged: A row for each method.
        methods: The methods.
        seed: Of the searches.

    Returns:
        Sentences.
    """
    _, best = best_of(merged, methods)
    arithmetic = next(row for row in merged if row.name == "task arithmetic")
    validation = [len(task.splits["validation"]) for task in suite.tasks.values()]
    return " ".join([run_note(suite.seeds, seed), best_note(best, arithmetic), selection_note(best, validation)])


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


def main() -> None:
    """Merge and compare."""
    parser = argparse.ArgumentParser(
        description="Merge four fine-tuned SqueezeNets with every method, draw ensembles, and compare."
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for numbers, plot and merged model")
    parser.add_argument("--trials", type=int, default=TRIALS, help="settings that each method may try on validation")
    parser.add_argument("--seed", type=int, default=0, help="of searches, draws and resamples")
    parser.add_argument(
        "--training-seed", type=int, default=0, help="of the experts' training; another one trains anew"
    )
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    torch.set_num_threads(1)  # see `parallel`
    # How far ensembles are from the merge is a column of their table, for each temperature that was tried no news.
    warnings.filterwarnings("ignore", message=".*standard deviations of the draws from the merge", category=UserWarning)
    started = time.perf_counter()
    suite = make_suite(Recipe(seed=arguments.training_seed), arguments.cache, console)
    console.print(accuracy_table(suite))
    made = time.perf_counter()
    run(suite, arguments.out, arguments.trials, arguments.seed, console)
    ended = time.perf_counter()
    console.print(f"suite {made - started:.0f} s, merges and ensembles {ended - made:.0f} s, {cores()} cores")


if __name__ == "__main__":
    main()
