"""Level and power of the null control of heavy tails, on updates of a known distribution.

`python -m benchmarks.tails_null` merges three experts' updates of one module, compares their residuals with those of
the same merge of Gaussian surrogates, and writes `benchmarks/results/tails_null.md`: how often updates with normal
entries (rows of equal and unequal size, correlated and identical experts) and updates with heavy-tailed entries or rows
are called heavy-tailed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import binom

from benchmarks.folders import write_page
from diagnostics.residuals import Residuals, module_residuals
from diagnostics.tails import Merge, Sizes, null_control, surrogate_residuals
from diagnostics.tails.families import Array
from inference.map import fixed_point
from poe_models import (
    Anchor,
    Average,
    Balanced,
    Cauchy,
    InputGram,
    ModuleUpdates,
    ProductOfExperts,
    RelativePrecision,
    TaskVectors,
)


@dataclass(frozen=True)
class Simulated:
    """Updates of a known distribution, a merge and a null.

    Args:
        name: row of the table.
        null: whether the null control's hypothesis holds, up to the noise of its fitted sizes.
        spread: standard deviation of the log row sizes, which the experts share; the n-th expert is 1 + n/2 times as
            large.
        degrees: of the Student-t that each entry (or each row's common factor) is drawn from; None for normal.
        by_row: whether rows are heavy-tailed as a whole.
        own_rows: whether every expert has row sizes of its own.
        correlation: between the experts' entries.
        merge: how they are merged.
        sizes: of the surrogates.
    """

    name: str
    null: bool = True
    spread: float = 0.3
    degrees: float | None = None
    by_row: bool = False
    own_rows: bool = False
    correlation: float = 0.0
    merge: Merge = field(default_factory=Average)
    sizes: Sizes = "own"

    def task_vectors(self, seed: int, shape: tuple[int, int] = (120, 32), experts: int = 3) -> TaskVectors:
        """One module of a few experts."""
        rng = np.random.default_rng(seed)
        rows = np.exp(self.spread * rng.standard_normal((experts if self.own_rows else 1, shape[0], 1)))
        common = self._entries(rng, shape)
        drawn = np.stack([self._entries(rng, shape) for _ in range(experts)])
        entries = np.sqrt(self.correlation) * common + np.sqrt(1 - self.correlation) * drawn
        updates = torch.from_numpy(rows * entries * (1 + np.arange(experts)[:, None, None] / 2))
        base = {"fc.weight": torch.zeros(shape, dtype=torch.float64)}
        return TaskVectors(base, {f"e{n}": {"fc.weight": u} for n, u in enumerate(updates)}, dtype=torch.float64)

    def _entries(self, rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        entries: Array = rng.standard_normal(shape)
        if self.degrees is None:
            return entries
        chi = rng.chisquare(self.degrees, (shape[0], 1) if self.by_row else shape)
        heavy: Array = entries * np.sqrt(self.degrees / chi)
        return heavy


PRODUCT = ProductOfExperts.of(
    ["e0", "e1", "e2"], InputGram(), Cauchy(), Balanced(1.0), anchor=Anchor(precision=RelativePrecision(0.1))
)
SIMULATIONS = (
    Simulated("rows of equal size", spread=0.0),
    Simulated("log row sizes of sd 0.3"),
    Simulated("log row sizes of sd 0.6", spread=0.6),
    Simulated("the same, every expert's own", spread=0.6, own_rows=True),
    Simulated("sd 0.3, merged by InputGram and Cauchy", merge=PRODUCT),
    Simulated("sd 0.6, every expert's own, InputGram and Cauchy", spread=0.6, own_rows=True, merge=PRODUCT),
    Simulated("sd 0.3, experts correlated by 0.5", correlation=0.5),
    Simulated("sd 0.3, identical experts (up to their size)", correlation=1.0),
    Simulated("Student-t(4) entries, rows of equal size", null=False, spread=0.0, degrees=4.0),
    Simulated("Student-t(4) entries, sd 0.3", null=False, degrees=4.0),
    Simulated("Student-t(4) entries, sd 0.3, InputGram and Cauchy", null=False, degrees=4.0, merge=PRODUCT),
    Simulated("Student-t(4) rows, sd 0.3", null=True, degrees=4.0, by_row=True),
    Simulated("shared: log row sizes of sd 0.3", sizes="shared"),
    Simulated("shared: sd 0.3, experts correlated by 0.5", correlation=0.5, sizes="shared"),
    Simulated("shared: Student-t(4) entries, sd 0.3", null=False, degrees=4.0, sizes="shared"),
    Simulated("shared: Student-t(4) rows, sd 0.3", null=False, degrees=4.0, by_row=True, sizes="shared"),
)


def p_values(case: Simulated, seeds: int, num_surrogates: int = 19) -> Array:
    """P-values of the null control, one for each seed."""
    found = []
    for seed in range(seeds):
        vectors = case.task_vectors(seed)
        (module,) = vectors
        merged = merge_once(case.merge, module)
        real = Residuals(module_residuals(merged, module, InputGram()))
        made = surrogate_residuals(
            vectors, case.merge, InputGram(), num_surrogates=num_surrogates, sizes=case.sizes, seed=seed
        )
        found.append(null_control(real, made).p_value)
    return np.array(found)


def merge_once(merge: Merge, module: ModuleUpdates) -> torch.Tensor:
    """The merged update of the real module."""
    if isinstance(merge, ProductOfExperts):
        return fixed_point(merge.bind(module)).value[0]
    assert isinstance(merge, Average)
    return merge(module.updates)


def report(found: dict[str, Array], seconds: float) -> str:
    """The page."""
    seeds = len(next(iter(found.values())))
    low, high = (binom.ppf(q, seeds, 0.05) / seeds for q in (0.025, 0.975))
    lines = [
        f"The null control of heavy tails on three experts' updates of one module, 120 x 32: {seeds} seeds, 19 "
        f"Gaussian surrogates each; {seconds:.0f} CPU seconds, one thread. Made by `python -m benchmarks.tails_null`.",
        "",
        "*rejected*: p = 0.05, the smallest there is. Where the null hypothesis holds that is one in twenty, "
        f"{low:.0%} to {high:.0%} in 95 % of such rows. Experts differ in size (1, 1.5, 2) and share their row sizes "
        "unless said otherwise; merged by averaging unless said otherwise; residuals by `InputGram`. Surrogates have "
        "each expert's own sizes, or, where the row says so, the shared ones: to own sizes a row that is heavy-tailed "
        "as a whole is a large row, which is no evidence.",
        "",
        "| updates | null hypothesis | rejected | mean p |",
        "|---|---|---:|---:|",
    ]
    for case in SIMULATIONS:
        p = found[case.name]
        lines.append(
            f"| {case.name} | {'holds' if case.null else 'does not hold'} | {(p <= 0.05).mean():.0%} | {p.mean():.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tails_null.md"))
    parser.add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    started = time.process_time()
    found = {}
    for case in track(SIMULATIONS, description="simulating", console=console):
        found[case.name] = p_values(case, arguments.seeds)
        rejected = int((found[case.name] <= 0.05).sum())
        console.print(f"{case.name}: rejected {rejected} of {arguments.seeds}", highlight=False)
    text = report(found, time.process_time() - started)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
