"""Accuracy and calibration of draws from the posterior, over its temperature, beside noise ([BMM] App. B, Figure 4).

`python -m benchmarks.bmm_sampling` merges the experts of each suite and training seed by `InputGram` with Gaussian
experts, as [BMM] has them, and with Student-t and Cauchy experts, which it has not; draws ten members in the last layer
by Gibbs sampling at a row of temperatures (`1 / T` is the paper's β), and as many with white noise, each member as far
from the merge. Writes the area that each front dominates beyond the merge's own accuracy and calibration error, with
intervals over test examples, to `benchmarks/results/bmm_sampling.md`, and the fronts as a figure beside it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from benchmarks.folders import write_page
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.outcomes import GIBBS, LAST, MAP, NOISE, Budget
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, load, recipe_of, suite_parser
from diagnostics import compare_methods
from diagnostics.plots import plot_pareto
from diagnostics.predictions.comparison import Comparison
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from poe_models import Cauchy, Energy, Gaussian, InputGram, ProductOfExperts, StudentT

ENERGIES: dict[str, Energy] = {"Gaussian": Gaussian(), "Student-t(4)": StudentT(4.0), "Cauchy": Cauchy()}
LOST = 0.05
"""Accuracy below the merge's from which nothing counts."""


class Fronts:
    """Ensembles of one suite over temperatures, and their comparison.

    Args:
        suite: Tasks, heads and experts.
        seed: Of draws, noise and resamples.
        temperatures: How many are tried, from the lowest to the highest that the energies imply.
        members: Of every ensemble.
        tell: Called with every ensemble before it is drawn.
    """

    def __init__(self, suite: Suite, seed: int, temperatures: int, members: int, tell: Callable[[str], None]) -> None:
        self.suite, self.seed, self.count, self.members, self.tell = suite, seed, temperatures, members, tell

    def compare(self, energy: str) -> Comparison:
        """The merge, and its draws and noise at every temperature, on the same test examples."""
        poe = ProductOfExperts.of(tuple(self.suite.experts), InputGram(), ENERGIES[energy])
        design = Design(poe)
        with tempfile.TemporaryDirectory() as folder:
            merged = merge_checkpoint(self.suite.vectors(), design, Path(folder) / "merged").out
            ensembles = Ensembles(self.suite, design, merged, self.seed, Budget(members=self.members))
            point = {
                task: logits.double().softmax(1) for task, logits in task_logits(self.suite, merged, "test").items()
            }
            predictions: dict[str, Mapping[str, Tensor]] = {MAP: point}
            for temperature in self._grid(*ensembles.temperatures(LAST)):
                for kind in (GIBBS, NOISE):
                    self.tell(f"{energy}, {kind}, T = {temperature:.1e}")
                    found = ensembles.predictions(LAST, kind, temperature, self.members)
                    predictions[f"{kind}, T = {temperature:.1e}"] = found
            return compare_methods(predictions, ensembles.test.labels, seed=self.seed)

    def _grid(self, low: float, high: float) -> list[float]:
        steps = torch.linspace(math.log(low), math.log(high), self.count, dtype=torch.float64)
        return steps.exp().tolist()


def series(found: Comparison) -> dict[str, list[str]]:
    """The merge followed by the ensembles of each kind, in the order of their temperatures."""
    return {kind: [MAP, *(name for name in found.methods if name.startswith(kind))] for kind in (GIBBS, NOISE)}


def row(energy: str, found: Comparison) -> list[str]:
    """Cells of one comparison: the areas, and the ensemble with the least ECE among those that lose no accuracy."""
    reference = (found.mean(MAP).value - LOST, found.mean(MAP, "ece").value)
    area, gain = found.hypervolume(list(series(found).values()), reference)
    least = min(series(found)[GIBBS], key=lambda name: found.mean(name, "ece").value)
    difference = found.difference(least, MAP)
    numbers = [f"{1e4 * each.value:.2f} [{1e4 * each.low:.2f}, {1e4 * each.high:.2f}]" for each in (area, gain)]
    accuracy, point, ece = found.mean(MAP), found.mean(MAP, "ece"), found.mean(least, "ece")
    lost = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return [energy, f"{accuracy.value:.3f}", f"{point.value:.3f}", *numbers, least, f"{ece.value:.3f}", lost]


def report(found: Mapping[tuple[str, int, str], Comparison], machines: list[str], members: int, command: str) -> str:
    """The page.

    Args:
        found: Suite, training seed and energy to the comparison.
        machines: Where it was measured, in words.
        members: Of every ensemble.
        command: What made it.

    Returns:
        Markdown.
    """
    header = ["suite", "seed", "energy", "accuracy of the MAP", "its ECE", "area of draws", "less noise's",
              "least ECE at", "ECE", "accuracy less the MAP's"]  # fmt: skip
    body = [[suite, str(seed), *row(energy, each)] for (suite, seed, energy), each in found.items()]
    return "\n\n".join([
        "Draws from the posterior over its temperature, beside white noise of the same size ([BMM] App. B and Figure "
        "4): `InputGram` at the default scale and anchor, the last layer drawn by Gibbs sampling, "
        f"{members} members, mean softmax. Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "*area*: hypervolume of the front of mean accuracy and mean ECE, in units of 1e-4, of what is better "
        f"calibrated than the MAP and at most {LOST:g} less accurate; 95 % intervals over test examples, paired for "
        "the difference from noise. The last columns are of one ensemble that was chosen by these test scores: they "
        "say what there is, not what one would have chosen.",
        markdown_table(header, body, left=3),
    ]) + "\n"  # fmt: skip


def draw(found: Mapping[tuple[str, int, str], Comparison], path: Path) -> None:
    """One panel for each comparison: the paths of draws and of noise over the temperature."""
    figure = Figure(figsize=(6.4 * len(found), 5.0), layout="constrained")
    for ax, (key, each) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        plot_pareto(each, series(each), ax)
        ax.set_title(", ".join(map(str, key)), loc="left", pad=24, fontsize=10)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Draw, compare and write."""
    parser = suite_parser(__doc__, "bmm_sampling", "draws", default_seeds=(0,))
    parser.add_argument("--temperatures", type=int, default=5, help="how many, between the energies' own limits")
    parser.add_argument("--members", type=int, default=10, help="of every ensemble")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console, machines = Console(), []
    found = {}
    for name in arguments.suites:
        for seed in arguments.seeds:
            suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)
            fronts = Fronts(suite, seed, arguments.temperatures, arguments.members, console.print)
            machines.append(machine(suite.device))
            for energy in ENERGIES:
                found[name, seed, energy] = fronts.compare(energy)
    text = report(found, machines, arguments.members, command_line("benchmarks.bmm_sampling", parser, arguments))
    write_page(arguments.out, text)
    draw(found, arguments.out.with_suffix(".png"))
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
