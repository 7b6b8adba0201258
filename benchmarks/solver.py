"""How many reweighted solves the fixed point needs on the vision suite, plain and accelerated.

`python -m benchmarks.solver` merges the suite's fine-tunes under each Gram map at scales from mild to severe, from the
Gaussian twin's weights, in float64 and to a relative tolerance of 1e-8, and writes `benchmarks/results/solver.md`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.folders import write_page
from benchmarks.vision.train import make_suite
from inference import fixed_point
from poe_models import Balanced, Cauchy, InputGram, OutputGram, ProductOfExperts, ResidualMap

MAPS: tuple[ResidualMap, ...] = (OutputGram(), InputGram())
GAMMAS = (1.0, 0.3, 0.1, 0.03, 0.01)
MAX_STEPS = 2000
HEADER = (
    "| map | γ | plain: steps (largest) | accelerated: steps (largest) | plain / accelerated CPU s | not converged | "
    "median rate | median spread |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Count:
    """Steps and cost of one way to solve all modules.

    Args:
        steps: reweighted solves of each module.
        seconds: CPU seconds of all of them.
        unconverged: modules that did not reach the tolerance.
        rates: contraction rate of the plain iteration at each solution.
        spreads: largest over smallest effective weight of each module.
    """

    steps: Tensor
    seconds: float
    unconverged: int
    rates: Tensor
    spreads: Tensor


def count(batches: Sequence[Tensor], poe: ProductOfExperts, acceleration: bool) -> Count:
    """Solve all batches of modules from the twin's weights."""
    started = time.process_time()
    solutions = [
        fixed_point(poe.bind(updates), starts=("twin",), max_steps=MAX_STEPS, tolerance=1e-8, acceleration=acceleration)
        for updates in batches
    ]
    return Count(
        torch.cat([solution.info.steps for solution in solutions]),
        time.process_time() - started,
        sum(not status.converged for solution in solutions for status in solution.status),
        torch.cat([solution.info.contraction_rate for solution in solutions]),
        torch.cat([solution.info.weight_spread for solution in solutions]),
    )


def row(residual_map: ResidualMap, gamma: float, plain: Count, fast: Count) -> str:
    """One line of the table."""
    counts = [f"{int(c.steps.sum())} ({int(c.steps.max())})" for c in (plain, fast)]
    ratio = f"{plain.seconds / fast.seconds:.1f} ({plain.seconds:.1f} / {fast.seconds:.1f})"
    unconverged = f"{plain.unconverged} / {fast.unconverged}"
    numbers = f"{float(fast.rates.median()):.2f} | {float(fast.spreads.median()):.1f}"
    return (
        f"| {type(residual_map).__name__} | {gamma} | {counts[0]} | {counts[1]} | {ratio} | {unconverged} | {numbers} |"
    )


def main() -> None:
    """Count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/solver.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    suite = make_suite(console=console)
    vectors = suite.vectors(torch.float64)
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for module in vectors:
        by_shape[module.updates.shape].append(module.updates)
    batches = [torch.stack(updates) for updates in by_shape.values()]
    lines = []
    for residual_map, gamma in track([(m, g) for m in MAPS for g in GAMMAS], description="solving"):
        poe = ProductOfExperts.of(vectors.names, residual_map, Cauchy(), Balanced(gamma))
        lines.append(row(residual_map, gamma, count(batches, poe, False), count(batches, poe, True)))
    modules = sum(len(batch) for batch in batches)
    title = (
        f"Cauchy experts, Balanced(γ), relative η = 0.1: all {modules} matrices of the vision suite's SqueezeNet, "
        f"{len(vectors.names)} experts, tolerance 1e-8 in float64, at most {MAX_STEPS} steps; one thread.\n"
        "Made by `python -m benchmarks.solver`.\n"
    )
    write_page(arguments.out, "\n".join([title, HEADER, *lines, ""]))
    console.print(arguments.out.read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
