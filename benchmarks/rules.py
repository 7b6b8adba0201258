"""Every merging rule of the registry on a suite, alone and as the centre of a posterior's anchor.

`python -m benchmarks.rules` chooses, for each rule with one budget of trials on validation, its coefficient λ
and the one parameter of its own that it may have; then, with the rule so chosen as the anchor's centre `Z_0`, λ and η
of a product of Cauchy experts with `InputGram` and with `OutputGram`, with the same budget each ([BMM] Table 1). The
first row is the base itself, `Z_0 = 0`. Rules that need data get 128 training examples of every task. Test examples are
seen once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.rule_bench import Bench
from benchmarks.harness.rule_report import write_report
from benchmarks.harness.rulebook import RULES
from benchmarks.harness.search import SCALINGS
from benchmarks.registry import USUAL, command_line, load, recipe_of

PAGES = {"vision": "rules.md", "language": "rules_language.md"}


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=list(USUAL), default="vision", help="what to merge and to judge by")
    parser.add_argument("--out", type=Path, default=None, help="the page; a CSV is put beside it")
    parser.add_argument("--trials", type=int, default=8, help="settings that each search may try on validation")
    parser.add_argument("--scalings", type=float, nargs=2, default=list(SCALINGS), help="least and largest λ to try")
    parser.add_argument("--methods", nargs="*", choices=list(RULES), default=list(RULES), help="of the registry")
    parser.add_argument("--examples", type=int, default=128, help="of each task, for data-assisted rules")
    parser.add_argument("--validation", type=int, default=None, help="most validation examples of a task")
    parser.add_argument("--test", type=int, default=None, help="most test examples of a task")
    parser.add_argument("--seed", type=int, default=0, help="of searches and calibration examples")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console, name, (least, most) = Console(), arguments.suite, arguments.scalings
    suite = load(name, recipe_of(name, 0, full=False), arguments.cache, console, "cpu")
    suite = suite.limited(arguments.validation, arguments.test)
    bench = Bench(suite, arguments.trials, arguments.seed, arguments.examples, (least, most))
    started = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("the base", total=len(arguments.methods) + 1)
        lines = [bench.base_line()]
        for each in arguments.methods:
            progress.update(bar, description=each, advance=1)
            lines.append(bench.line(each))
            console.print(f"{each}: {lines[-1].seconds:.0f} s", highlight=False)
        progress.update(bar, completed=len(arguments.methods) + 1)
    seconds = time.perf_counter() - started
    how = command_line("benchmarks.rules", parser, arguments)
    where = f"{name} suite ({', '.join(suite.tasks)}; {suite.network.name})"
    page = arguments.out or Path("benchmarks/results") / PAGES[name]
    console.print(write_report(page, lines, bench.bounds(), bench.labels, where, how, seconds), markup=False)


if __name__ == "__main__":
    main()
