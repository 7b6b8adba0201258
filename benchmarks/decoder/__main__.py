"""LoRA experts of SmolLM2-135M merged as adapters and as whole matrices, judged as language models and classifiers.

`python -m benchmarks.decoder` makes base and experts where the cache lacks them, merges, keeps what is predicted under
`out/decoder`, and writes `benchmarks/results/decoder.md` and a CSV. An interrupted run goes on where it stopped.
`--full` tunes all blocks on more prompts and judges by more: for a GPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.decoder.bench import Bench, run, scores, tuned
from benchmarks.decoder.ensemble import NAME, ensemble
from benchmarks.decoder.merges import ETA, Merger
from benchmarks.decoder.report import page, write_csv
from benchmarks.decoder.train import Recipe
from benchmarks.folders import key_of
from benchmarks.harness.outcomes import KINDS, LAPLACE, Budget
from benchmarks.harness.training import accuracy_table
from benchmarks.registry import command_line, load, recipe_of

SCALINGS = (0.5, 1.0, 1.5, 2.5)
MOST_TESTS = 100
"""Test prompts of a task that the short form judges by: a CPU reads them once for each of thirty rows."""


def main() -> None:
    """Merge, judge and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decoder.md"), help="the page")
    parser.add_argument("--kept", type=Path, default=Path("out/decoder"), help="where what is done is kept")
    parser.add_argument("--seed", type=int, default=0, help="of training, draws and resamples")
    parser.add_argument("--examples", type=int, default=64, help="training prompts of each task that RegMean sees")
    parser.add_argument("--full", action="store_true", help="all blocks tuned, on more prompts")
    parser.add_argument("--device", default="cpu", help="where models run and updates are merged")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the suites' caches (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    warnings.filterwarnings("ignore", message=".*standard deviations of the draws from the merge", category=UserWarning)
    console, started = Console(), time.perf_counter()
    recipe = recipe_of("decoder", arguments.seed, arguments.full)
    assert isinstance(recipe, Recipe)
    suite = load("decoder", recipe, arguments.cache, console, arguments.device)
    console.print(accuracy_table(suite))
    suite = suite.limited(None, None if arguments.full else MOST_TESTS)

    def tell(what: str) -> None:
        console.print(f"{time.perf_counter() - started:.0f} s: {what}", highlight=False)

    merger = Merger(suite, arguments.examples, arguments.seed)
    kept = arguments.kept / key_of(suite.key, asdict(recipe), SCALINGS, ETA, arguments.examples, arguments.full)
    entries = list(run(Bench(merger, SCALINGS, recipe.rank), kept, tell))
    found = scores(suite, entries, reference=tuned("task arithmetic"), seed=arguments.seed)
    scaling = next(entry.facts["scaling"] for entry in entries if entry.name == NAME)
    kinds = KINDS if arguments.full else (LAPLACE,)
    budget = Budget(members=10 if arguments.full else 5, refinements=0, everywhere=(), last=kinds)
    drawn = ensemble(merger, scaling, budget, lambda done, total: tell(f"ensembles {done} of {total}"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = page(suite, entries, found, drawn, command_line("benchmarks.decoder", parser, arguments))
    arguments.out.write_text(text, encoding="utf-8")
    write_csv(arguments.out.with_suffix(".csv"), found)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
