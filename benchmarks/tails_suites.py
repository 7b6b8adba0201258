"""Are the residuals of real merges heavier-tailed than Gaussian ([PoE] Figure 1)? Asked on two suites.

`python -m benchmarks.tails_suites` merges the fine-tunes of each suite and training seed with `InputGram` experts,
Gaussian and Cauchy, at the default scale and anchor, compares the residuals with those of the same merge of Gaussian
surrogates, in all and by kind of module, keeps what is done under `out/tails_suites`, and writes
`benchmarks/results/tails_suites.md`. Experts come from the cache, or are made there.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from typing_extensions import override

from benchmarks.folders import kept, key_of, write_page
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, load, recipe_of, suite_parser
from diagnostics.residuals import Residuals, module_residuals
from diagnostics.tails import NullControl, Sizes, null_control, surrogate_residuals
from inference.map import fixed_point
from inference.models.digest import Silent
from poe_models import Cauchy, Energy, Gaussian, InputGram, ProductOfExperts, TaskVectors

ENERGIES: dict[str, Energy] = {"Gaussian": Gaussian(), "Cauchy": Cauchy()}
SIZES: tuple[Sizes, ...] = ("own", "shared")


@dataclass(frozen=True)
class Answer:
    """What the null control says of some modules of one merge; all numbers but the counts are nats or shares.

    Args:
        suite: Whose.
        seed: Of the experts' training.
        energy: Of the experts.
        sizes: Of the surrogates.
        part: Which modules.
        gain: Log likelihood of a Student-t over a Gaussian.
        surrogates: Least, median and largest gain of the surrogates.
        p_value: Share of at least the real gain among surrogates and the real one.
        p_pooled: The same for all modules as one sample.
        row_spread: Median standard deviation of the log row sizes.
        how: Heavier-tailed than, lighter-tailed than, or like Gaussian updates.
    """

    suite: str
    seed: int
    energy: str
    sizes: Sizes
    part: str
    gain: float
    surrogates: tuple[float, float, float]
    p_value: float
    p_pooled: float
    row_spread: float
    how: str

    @classmethod
    def of(cls, suite: str, seed: int, energy: str, sizes: Sizes, part: str, null: NullControl) -> Answer:
        """The answer that a null control gives."""
        low, median, high = np.quantile(null.surrogate_gains, (0.0, 0.5, 1.0)).tolist()
        how = "heavier-tailed than" if null.heavy_tailed else "lighter-tailed than" if null.lighter else "like"
        numbers = (null.p_value, null.p_pooled, null.row_spread)
        return cls(suite, seed, energy, sizes, part, null.gain, (low, median, high), *numbers, how)


KINDS = {
    "vision": {"squeeze": r"squeeze", "expand 1x1": r"expand1x1", "expand 3x3": r"expand3x3"},
    "language": {
        "queries and keys": r"query|key",
        "values": r"value",
        "attention out": r"attention\.output",
        "feed-forward in": r"intermediate",
        "feed-forward out": r"layer\.\d+\.output",
    },
}
"""Suite to its kinds of modules, each by a pattern that its tensors' names match."""


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
        entry for module in vectors for entry in module_residuals(fixed_point(poe.bind(module)).value[0], module, poe)
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


def answers(suite: Suite, seed: int, num_surrogates: int, bar: Bar) -> list[Answer]:
    """The null control of each energy, kind of sizes and kind of module of one suite."""
    vectors = suite.vectors()
    found = []
    for energy_name, energy in ENERGIES.items():
        poe = ProductOfExperts.of(vectors.names, InputGram(), energy)
        real = merged_residuals(vectors, poe)
        for sizes in SIZES:
            made = surrogate_residuals(
                vectors, poe, num_surrogates=num_surrogates, sizes=sizes, seed=seed, progress=_Shown(bar)
            )
            for part, residuals in parts(real, KINDS.get(suite.name, {})).items():
                null = null_control(residuals, made, level=1 / (num_surrogates + 1))
                found.append(Answer.of(suite.name, seed, energy_name, sizes, part, null))
                bar.console.print(f"{suite.name}, {energy_name}, {part}: {null.verdict}", highlight=False)
    return found


def report(found: list[Answer], num_surrogates: int, command: str) -> str:
    """The page."""
    lines = [
        "Are the residuals of real merges heavier-tailed than those of Gaussian updates would be? Each suite's "
        "fine-tunes merged by `InputGram` experts at the default scale and anchor, and the same merge of "
        f"{num_surrogates} Gaussian surrogates with the real updates' row and column sizes (*own*: every expert's; "
        f"*shared*: those that all experts share) and correlation. Made by `{command}`.",
        "",
        "*gain*: log likelihood of a Student-t over a Gaussian within modules, nats: of the real residuals, and the "
        "median and range of the surrogates'. *p*: share of at least the real gain among surrogates and the real one, "
        f"1/{num_surrogates + 1} or above. *row sizes*: median standard deviation of the log row sizes.",
        "",
        "| suite | energy | sizes | modules | gain | of surrogates | p | p pooled | row sizes |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        low, middle, high = each.surrogates
        gains = (f"{each.gain:.1f}", f"{middle:.1f} ({low:.1f} to {high:.1f})")
        numbers = (f"{number:.2f}" for number in (each.p_value, each.p_pooled, each.row_spread))
        cells = (f"{each.suite}, seed {each.seed}", each.energy, each.sizes, each.part, *gains, *numbers)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *summary(found), ""])


def summary(found: list[Answer]) -> list[str]:
    """The answer in a sentence for each suite, energy and kind of sizes, with the p values of all training seeds."""
    lines = []
    for key, group in itertools.groupby(
        sorted((each for each in found if each.part == "all modules"), key=_setting), key=_setting
    ):
        answers = list(group)
        words = ", ".join(f"{each.how} Gaussian updates (seed {each.seed}, p = {each.p_value:.2f})" for each in answers)
        lines.append(f"- {key[0]}, {key[1]}, {key[2]} sizes: {words}.")
    return lines


def _setting(each: Answer) -> tuple[str, str, str]:
    return each.suite, each.energy, each.sizes


def measured(name: str, seed: int, arguments: argparse.Namespace, console: Console) -> list[Answer]:
    """Answers of one suite and training seed, from what is kept if it is there."""
    suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)

    def make() -> list[dict[str, object]]:
        with Bar(console=console) as bar:
            return [asdict(each) for each in answers(suite, seed, arguments.surrogates, bar)]

    key = key_of(suite.key, arguments.surrogates, list(ENERGIES), SIZES)
    saved = kept(arguments.kept / f"{name}-{seed}-{key}.json", make)
    return [Answer(**{**each, "surrogates": tuple(each["surrogates"])}) for each in saved]


def main() -> None:
    """Measure and write the table."""
    parser = suite_parser(__doc__, "tails_suites", "and of the surrogates")
    parser.add_argument("--surrogates", type=int, default=19)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    found = [
        answer
        for name in arguments.suites
        for seed in arguments.seeds
        for answer in measured(name, seed, arguments, console)
    ]
    command = command_line("benchmarks.tails_suites", parser, arguments)
    text = report(found, arguments.surrogates, command)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
