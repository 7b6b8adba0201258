"""Do ensembles around a demo's merge know when inputs have changed?

`python -m benchmarks.shift --suite vision` takes the best merge of `make demo`, `--suite language` that of
`make demo-language`, and compares the MAP with exact Gibbs draws of the last layer, draws of the Gaussian twin, and
white noise, each as many and at the temperature as the demo chose for it on validation; each as it is, and with the
logits divided by one number, for which the demo chose another temperature. Test examples are shown under the suite's
corruptions at three severities; and every task's head is shown the other tasks' examples, which uncertainty should tell
from its own. Writes a page and a CSV beside it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.outcomes import Budget
from benchmarks.harness.shift_bench import Shift, read_demo
from benchmarks.harness.shift_report import write_report
from benchmarks.language.corruptions import TEXTS
from benchmarks.registry import command_line, load, recipe_of
from benchmarks.vision.corruptions import IMAGES

CORRUPTIONS = {"vision": IMAGES, "language": TEXTS}
DEMOS = {"vision": Path("out/demo"), "language": Path("out/demo-language")}
PAGES = {"vision": "shift.md", "language": "shift_language.md"}


def main() -> None:
    """Predict, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=list(CORRUPTIONS), default="vision", help="whose merge")
    parser.add_argument("--demo", type=Path, default=None, help="the demo's output folder")
    parser.add_argument("--out", type=Path, default=None, help="the page; a CSV is put beside it")
    parser.add_argument("--test", type=int, default=None, help="most test examples of a task")
    parser.add_argument("--seed", type=int, default=0, help="of draws, corruptions and resamples")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the suites' caches (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    warnings.filterwarnings("ignore", message=".*standard deviations of the draws from the merge", category=UserWarning)
    console, name = Console(), arguments.suite
    suite = load(name, recipe_of(name, 0, full=False), arguments.cache, console, "cpu").limited(None, arguments.test)
    best = read_demo(arguments.demo or DEMOS[name], tuple(suite.experts))
    started = time.perf_counter()
    shift = Shift(suite, best, CORRUPTIONS[name], arguments.seed, Budget())
    with Progress(console=console) as progress:
        bar = progress.add_task("predicting", total=None)
        found = shift.predictions(lambda done, total: progress.update(bar, completed=done, total=total))
    heat = ", ".join(f"{way} at T = {temperature:.1e}" for way, (temperature, _) in best.heat.items())
    text = write_report(
        arguments.out or Path("benchmarks/results") / PAGES[name],
        found,
        suite.labels("test"),
        f"{best.name} (λ {best.design.scaling:.2f}), last layer: {heat}, on the {name} suite",
        CORRUPTIONS[name],
        command_line("benchmarks.shift", parser, arguments),
        arguments.seed,
        time.perf_counter() - started,
    )
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
