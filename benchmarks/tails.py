"""Does the comparison of tails find the family that residuals were drawn from?

`python -m benchmarks.tails` draws 500 residuals from each of five distributions, a hundred times, compares all six
families by leave-one-out and writes `benchmarks/results/tails.md`: how often the true family, or one that nests it, is
within two standard errors of the best, and how often the right one of two families that do not nest wins when they
differ by more than four standard errors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.folders import write_page
from diagnostics.tails import FAMILIES, Family, TailComparison, fit_tails
from diagnostics.tails.families import CAUCHY, GAUSSIAN, STUDENT_T, Array

Draw = Callable[[np.random.Generator, int], Array]


@dataclass(frozen=True)
class Truth:
    """A distribution of residuals.

    Args:
        name: row of the table.
        family: what it is one of.
        draw: maps a generator and a number to residuals.
    """

    name: str
    family: Family
    draw: Draw


TRUTHS = (
    Truth("normal", GAUSSIAN, lambda rng, n: rng.standard_normal(n)),
    Truth("Student-t, ν = 2", STUDENT_T, lambda rng, n: rng.standard_t(2.0, n)),
    Truth("Student-t, ν = 4", STUDENT_T, lambda rng, n: rng.standard_t(4.0, n)),
    Truth("Student-t, ν = 30", STUDENT_T, lambda rng, n: rng.standard_t(30.0, n)),
    Truth("Cauchy", CAUCHY, lambda rng, n: rng.standard_cauchy(n)),
)


@dataclass
class Score:
    """Counts over seeds.

    Attributes:
        seeds: how many.
        covered: the true family or one nesting it was in the tie set.
        exact: the true family itself was.
        decided: pairs of the true family and one that does not nest with it, more than four standard errors apart.
        wrong: seeds in which such a pair was decided for the wrong one.
        tied: summed sizes of the tie sets.
    """

    seeds: int = 0
    covered: int = 0
    exact: int = 0
    decided: int = 0
    wrong: int = 0
    tied: int = 0
    first: dict[str, int] = field(default_factory=dict)

    def add(self, comparison: TailComparison, truth: Family) -> None:
        """Count one seed."""
        tie_set = comparison.tie_set
        self.seeds += 1
        self.tied += len(tie_set)
        self.exact += truth.name in tie_set
        self.covered += any(family.covers(truth) for family in FAMILIES if family.name in tie_set)
        self.first[comparison.best.name] = self.first.get(comparison.best.name, 0) + 1
        signs = [_decision(comparison, truth, family) for family in FAMILIES if not _nested(truth, family)]
        self.decided += sum(sign != 0 for sign in signs)
        self.wrong += any(sign < 0 for sign in signs)


def _nested(one: Family, other: Family) -> bool:
    return one.covers(other) or other.covers(one)


def _decision(comparison: TailComparison, truth: Family, other: Family) -> int:
    """1 or -1 for and against the true family beyond four standard errors, else 0."""
    difference, error = comparison.difference(truth.name, other.name)
    return 0 if abs(difference) <= 4 * error else int(np.sign(difference))


def score(truth: Truth, seeds: int, size: int = 500) -> Score:
    """Compare families on residuals of one distribution, seed after seed."""
    result = Score()
    for seed in range(seeds):
        result.add(fit_tails(truth.draw(np.random.default_rng(seed), size), seed=seed), truth.family)
    return result


def report(scores: dict[str, Score], seconds: float) -> str:
    """The page."""
    seeds = next(iter(scores.values())).seeds
    lines = [
        f"Residuals of a known distribution, n = 500, {seeds} seeds each; six families, PSIS-LOO on 1000 draws of the "
        f"exact posterior; {seconds:.0f} CPU seconds, one thread. Made by `python -m benchmarks.tails`.",
        "",
        "*covered*: the true family, or one nesting it, is within two standard errors of the best. *right*: no family "
        "that does not nest with the true one beats it by more than four standard errors (*decided*: such pairs that "
        "are that far apart, per seed).",
        "",
        "| truth | covered | true family tied | families tied | decided | right | best by elpd |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, s in scores.items():
        first = ", ".join(f"{family} {count}" for family, count in sorted(s.first.items(), key=lambda item: -item[1]))
        lines.append(
            f"| {name} | {s.covered} / {s.seeds} | {s.exact} / {s.seeds} | {s.tied / s.seeds:.1f} | "
            f"{s.decided / s.seeds:.1f} | {s.seeds - s.wrong} / {s.seeds} | {first} |"
        )
    lines += [
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tails.md"))
    parser.add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    started = time.process_time()
    scores = {}
    for truth in TRUTHS:
        scores[truth.name] = score(truth, arguments.seeds)
        console.print(f"{truth.name}: {scores[truth.name].covered} of {arguments.seeds} covered")
    text = report(scores, time.process_time() - started)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
