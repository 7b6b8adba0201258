"""Are the residuals of real merges heavier-tailed than Gaussian ([PoE] Figure 1)? Asked on two suites.

`python -m benchmarks.tails_suites` merges each suite's fine-tunes with `InputGram` experts, Gaussian and Cauchy, at the
default scale and anchor, compares the residuals with those of the same merge of Gaussian surrogates, in all and by kind
of module, and writes `benchmarks/results/tails_suites.md`. Experts come from the cache, or are made there.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from typing_extensions import override

from benchmarks.language import train as language
from benchmarks.vision import train as vision
from diagnostics.residuals import Residuals, module_residuals
from diagnostics.tails import NullControl, Sizes, null_control, surrogate_residuals
from inference.map import fixed_point
from inference.models.digest import Silent
from poe_models import Cauchy, Energy, Gaussian, InputGram, ProductOfExperts, TaskVectors

ENERGIES: dict[str, Energy] = {"Gaussian": Gaussian(), "Cauchy": Cauchy()}
SIZES: tuple[Sizes, ...] = ("own", "shared")


@dataclass(frozen=True)
class Case:
    """The experts of a suite.

    Args:
        name: row of the table.
        base: folder of the base.
        experts: task name to the folder of its expert.
        kinds: kind of module to a pattern that its tensors' names match.
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    kinds: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What the null control says of one merge.

    Args:
        case: whose.
        energy: of the experts.
        sizes: of the surrogates.
        part: which modules.
        null: the control.
    """

    case: str
    energy: str
    sizes: Sizes
    part: str
    null: NullControl


VISION_KINDS = {"squeeze": r"squeeze", "expand 1x1": r"expand1x1", "expand 3x3": r"expand3x3"}
LANGUAGE_KINDS = {
    "queries and keys": r"query|key",
    "values": r"value",
    "attention out": r"attention\.output",
    "feed-forward in": r"intermediate",
    "feed-forward out": r"layer\.\d+\.output",
}


class _Shown(Silent):
    """A bar of a surrogate's modules."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("")

    @override
    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self._bar.reset(self._task, total=modules, description=stage)

    @override
    def advance(self, modules: int, nbytes: int) -> None:
        self._bar.advance(self._task, modules)


def merged_residuals(vectors: TaskVectors, poe: ProductOfExperts) -> Residuals:
    """Residuals of the MAP of every module."""
    found = [
        entry for module in vectors for entry in module_residuals(fixed_point(poe.bind(module)).value, module, poe)
    ]
    return Residuals(tuple(found))


def parts(residuals: Residuals, kinds: Mapping[str, str]) -> dict[str, Residuals]:
    """All residuals, and those of each kind of module.

    Args:
        residuals: of a merge.
        kinds: kind to pattern.

    Returns:
        Name to residuals; kinds without modules are left out.
    """
    found = {"all modules": residuals}
    for kind, pattern in kinds.items():
        chosen = tuple(entry for entry in residuals.entries if re.search(pattern, entry.tensor))
        if any(entry.active for entry in chosen):
            found[kind] = Residuals(chosen)
    return found


def answers(case: Case, num_surrogates: int, seed: int, bar: Bar) -> list[Answer]:
    """The null control of each energy, kind of sizes and kind of module."""
    vectors = TaskVectors(case.base, dict(case.experts))
    found = []
    for energy_name, energy in ENERGIES.items():
        poe = ProductOfExperts.of(vectors.names, InputGram(), energy)
        real = merged_residuals(vectors, poe)
        for sizes in SIZES:
            made = surrogate_residuals(
                vectors, poe, num_surrogates=num_surrogates, sizes=sizes, seed=seed, progress=_Shown(bar)
            )
            for part, residuals in parts(real, case.kinds).items():
                null = null_control(residuals, made, level=1 / (num_surrogates + 1))
                found.append(Answer(case.name, energy_name, sizes, part, null))
                bar.console.print(f"{case.name}, {energy_name}, {part}: {null.verdict}", highlight=False)
    return found


def report(found: list[Answer], num_surrogates: int, seconds: float) -> str:
    """The page."""
    lines = [
        "Are the residuals of real merges heavier-tailed than those of Gaussian updates would be? Each suite's "
        "fine-tunes merged by `InputGram` experts at the default scale and anchor, and the same merge of "
        f"{num_surrogates} Gaussian surrogates with the real updates' row and column sizes (*own*: every expert's; "
        f"*shared*: those that all experts share) and correlation. {seconds:.0f} CPU seconds. Made by "
        "`python -m benchmarks.tails_suites`.",
        "",
        "*gain*: log likelihood of a Student-t over a Gaussian within modules, nats: of the real residuals, and the "
        "median and range of the surrogates'. *p*: share of at least the real gain among surrogates and the real one, "
        f"1/{num_surrogates + 1} or above. *row sizes*: median standard deviation of the log row sizes.",
        "",
        "| suite | energy | sizes | modules | gain | of surrogates | p | p pooled | row sizes |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        null = each.null
        low, middle, high = np.quantile(null.surrogate_gains, (0.0, 0.5, 1.0))
        surrogate = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        cells = (each.case, each.energy, each.sizes, each.part, f"{null.gain:.1f}", surrogate)
        numbers = (null.p_value, null.p_pooled, null.row_spread)
        lines.append(f"| {' | '.join([*cells, *(f'{number:.2f}' for number in numbers)])} |")
    return "\n".join([*lines, "", *summary(found), ""])


def summary(found: list[Answer]) -> list[str]:
    """The answer in a sentence for each suite, energy and kind of sizes."""
    lines = []
    for each in found:
        if each.part != "all modules":
            continue
        null = each.null
        how = "heavier-tailed than" if null.heavy_tailed else "lighter-tailed than" if null.lighter else "like"
        lines.append(
            f"- {each.case}, {each.energy}, {each.sizes} sizes: {how} Gaussian updates (p = {null.p_value:.2f})."
        )
    return lines


def cases(seeds: list[int], suites: list[str], console: Console) -> list[Case]:
    """The suites' experts, made where the cache lacks them."""
    found = []
    if "vision" in suites:
        made = vision.make_suite(console=console)
        found.append(Case("vision", made.base, made.experts, VISION_KINDS))
    for seed in seeds if "language" in suites else []:
        suite = language.make_suite(language.Recipe(seed=seed), console=console)
        found.append(Case(f"language, seed {seed}", suite.base, suite.experts, LANGUAGE_KINDS))
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tails_suites.md"))
    parser.add_argument("--suites", nargs="+", choices=["vision", "language"], default=["vision", "language"])
    parser.add_argument("--language-seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--surrogates", type=int, default=19)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    started = time.process_time()
    found: list[Answer] = []
    for case in cases(arguments.language_seeds, arguments.suites, console):
        with Bar(console=console) as bar:
            found += answers(case, arguments.surrogates, 0, bar)
    text = report(found, arguments.surrogates, time.process_time() - started)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
