"""Every merging rule of the registry on the vision suite, alone and as the centre of a posterior's anchor.

`python -m benchmarks.rules` chooses, for each rule with one budget of trials on validation, its coefficient λ
and the one parameter of its own that it may have; then, with the rule so chosen as the anchor's centre `Z_0`, λ and η
of a product of Cauchy experts with `InputGram` and with `OutputGram`, with the same budget each ([BMM] Table 1). The
first row is the base itself, `Z_0 = 0`. Rules that need data get 128 training images of every task. Test images are
seen once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.rule_bench import Bench
from benchmarks.harness.rule_report import write_report
from benchmarks.harness.rulebook import RULES
from benchmarks.vision.train import make_suite

TRIALS = 8


def command(trials: int, images: int, seed: int, methods: Sequence[str]) -> str:
    """What makes the table again."""
    chosen = [] if list(methods) == list(RULES) else [f"--methods {' '.join(methods)}"]
    given = [f"--trials {trials}", f"--images {images}", f"--seed {seed}", *chosen]
    return " ".join(["python -m benchmarks.rules", *given])


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rules.md"), help="a CSV is put beside it")
    parser.add_argument("--trials", type=int, default=TRIALS, help="settings that each search may try on validation")
    parser.add_argument("--methods", nargs="*", choices=list(RULES), default=list(RULES), help="of the registry")
    parser.add_argument("--images", type=int, default=128, help="of each task, for data-assisted rules")
    parser.add_argument("--seed", type=int, default=0, help="of searches and calibration images")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    bench = Bench(
        make_suite(cache=arguments.cache, console=console), arguments.trials, arguments.seed, arguments.images
    )
    started = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("the base", total=len(arguments.methods) + 1)
        lines = [bench.base_line()]
        for name in arguments.methods:
            progress.update(bar, description=name, advance=1)
            lines.append(bench.line(name))
            console.print(f"{name}: {lines[-1].seconds:.0f} s", highlight=False)
        progress.update(bar, completed=len(arguments.methods) + 1)
    seconds = time.perf_counter() - started
    how = command(arguments.trials, arguments.images, arguments.seed, arguments.methods)
    text = write_report(arguments.out, lines, bench.bounds(), bench.labels, how, seconds)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
