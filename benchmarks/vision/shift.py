"""Do ensembles around the demo's merge know when inputs have changed?

`python -m benchmarks.vision.shift` takes the demo's best merge and compares the MAP (and the MAP with its logits
divided by one temperature fitted on validation) with exact Gibbs draws of the last layer, draws of the Gaussian twin,
and white noise, each as many and at the temperature as the demo chose for it on validation. Test images are shown
under six corruptions at three severities; and every task's head is shown the other tasks' images, which uncertainty
should tell from its own. Writes `benchmarks/results/shift.md` and a CSV beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.outcomes import Budget
from benchmarks.vision.shift_bench import Shift, read_demo
from benchmarks.vision.shift_report import write_report
from benchmarks.vision.train import make_suite


def main() -> None:
    """Predict, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="the demo's output folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shift.md"), help="a CSV is put beside it")
    parser.add_argument("--seed", type=int, default=0, help="of draws, noise and resamples")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    suite = make_suite(cache=arguments.cache, console=console)
    best = read_demo(arguments.demo, tuple(suite.experts))
    started = time.perf_counter()
    shift = Shift(suite, best, arguments.seed, Budget())
    with Progress(console=console) as progress:
        bar = progress.add_task("predicting", total=None)
        found = shift.predictions(lambda done, total: progress.update(bar, completed=done, total=total))
    command = f"python -m benchmarks.vision.shift --seed {arguments.seed}"
    heat = ", ".join(f"{kind} at T = {temperature:.1e}" for kind, temperature in best.temperatures.items())
    what = f"{best.name} (λ {best.design.scaling:.2f}), last layer: {heat}"
    labels = {name: task.splits["test"].labels for name, task in suite.tasks.items()}
    text = write_report(arguments.out, found, labels, what, command, arguments.seed, time.perf_counter() - started)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
