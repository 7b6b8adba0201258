"""The main job on real models: merge the fine-tunes of a suite with every method, draw ensembles, compare, report.

`python -m benchmarks.demo --suite vision` makes or loads four fine-tuned SqueezeNets, `--suite language` six fine-tuned
MiniLMs, and does what `benchmarks.harness.demo` says, by the plan of the suite. It is one run: `--training-seed` trains
other experts (give another `--out`), `--seed` changes searches and draws.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.demo import run
from benchmarks.harness.methods import METHODS
from benchmarks.harness.outcomes import GIBBS, NOISE, Budget
from benchmarks.harness.parallel import cores
from benchmarks.harness.plan import Plan
from benchmarks.harness.training import accuracy_table
from benchmarks.registry import load, recipe_of

_LEFT_OUT = ("DARE-TIES", "WUDI", "both sides", "Student-t")
PLANS = {
    "vision": Plan(budget=Budget(members=8, everywhere=(GIBBS, NOISE)), examples=128),
    "language": Plan(
        methods=tuple(method for method in METHODS if not any(name in method.name for name in _LEFT_OUT)),
        trials=4,
        scalings=(0.3, 1.0, 2.0, 3.0),
        validation=50,
        test=120,
        budget=Budget(members=6, refinements=0, everywhere=()),
    ),
}
"""What each demo does. Sampling all layers of SqueezeNet takes most of the time, so that only exact draws and their
control do it; MiniLM's eleven million merged weights leave time for fewer methods, trials and members."""


def main() -> None:
    """Merge and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=list(PLANS), default="vision", help="what to merge")
    parser.add_argument("--out", type=Path, default=None, help="folder for numbers, plots and merged model")
    parser.add_argument("--seed", type=int, default=0, help="of searches, draws and resamples")
    parser.add_argument("--training-seed", type=int, default=0, help="of the experts' training; another trains anew")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the suites' caches (default: the user's)")
    arguments = parser.parse_args()
    name: str = arguments.suite
    out: Path = arguments.out or Path("out") / ("demo" if name == "vision" else f"demo-{name}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    torch.set_num_threads(1)  # see `parallel`
    # How far ensembles are from the merge is a column of their table, for each temperature that was tried no news.
    warnings.filterwarnings("ignore", message=".*standard deviations of the draws from the merge", category=UserWarning)
    started = time.perf_counter(), time.process_time()
    suite = load(name, recipe_of(name, arguments.training_seed, full=False), arguments.cache, console, "cpu")
    console.print(accuracy_table(suite))
    made = time.perf_counter()
    run(suite, out, PLANS[name], arguments.seed, console)
    ended, used = time.perf_counter(), time.process_time() - started[1]
    console.print(
        f"suite {made - started[0]:.0f} s, merges and ensembles {ended - made:.0f} s, {cores()} cores; "
        f"{used / 60:.1f} CPU minutes"
    )


if __name__ == "__main__":
    main()
