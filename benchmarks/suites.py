"""Rules and products of experts on both suites, over training seeds, each tuned with equal trials.

`python -m benchmarks.suites` makes base, heads and experts of each suite and seed where the cache lacks them,
tunes every method on validation, keeps its test predictions under `out/suites`, and writes
`benchmarks/results/suites.md` and a CSV. A run that was interrupted goes on where it stopped; `--report` writes the
page from what is there.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from rich.console import Console

from benchmarks.folders import key_of
from benchmarks.harness.contest import Contest, Results, run
from benchmarks.harness.contest_report import write_report
from benchmarks.harness.rule_bench import Bench
from benchmarks.registry import command_line, load, recipe_of, suite_parser

SCALES = (0.05, 5.0)
"""Least and largest λ: the best of the language suite is near 2."""


def measured(name: str, seed: int, arguments: argparse.Namespace, console: Console) -> Results | None:
    """Results of one suite and training seed, made where they are missing; None if they are not to be made.

    Args:
        name: Of the suite.
        seed: Of the experts' training, of searches and of the calibration examples.
        arguments: Of the command.
        console: Where progress is shown.

    Returns:
        The results.
    """
    recipe = recipe_of(name, seed, arguments.full)
    key = key_of(asdict(recipe), arguments.trials, arguments.examples, SCALES)
    folder = arguments.kept / f"{name}-{seed}-{key}"
    if not arguments.report:
        suite = load(name, recipe, arguments.cache, console, arguments.device)
        contest = Contest(Bench(suite, arguments.trials, seed, arguments.examples, SCALES))

        def tell(method: str, accuracy: float, seconds: float) -> None:
            console.print(f"{name}, seed {seed}: {method} {accuracy:.3f} ({seconds:.1f} s)", highlight=False)

        run(contest, folder, arguments.methods or list(contest.methods), tell)
    return Results.read(folder) if folder.exists() else None


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "suites", "and of searches")
    parser.add_argument("--trials", type=int, default=10, help="settings that each search may try on validation")
    parser.add_argument("--examples", type=int, default=128, help="of each task, for data-assisted methods")
    parser.add_argument("--methods", nargs="+", default=None, help="default: all")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    every = {name: [measured(name, seed, arguments, console) for seed in arguments.seeds] for name in arguments.suites}
    found = {name: [each for each in runs if each is not None] for name, runs in every.items() if any(runs)}
    if not found:
        parser.error(f"--report: nothing is kept under {arguments.kept}. Run without it first.")
    command = command_line("benchmarks.suites", parser, arguments)
    console.print(write_report(arguments.out, found, command), markup=False)


if __name__ == "__main__":
    main()
