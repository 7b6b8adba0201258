"""Does a heavy tail matter once every block of rows has an expert of its own?

`python -m benchmarks.row_blocks` merges the experts of each suite and training seed by `InputGram`, Gaussian and
Cauchy, at the default scale and anchor and λ = 1, matrices as a whole and cut into blocks of rows, as heads are: a
block has its own experts, so that the tail can turn an expert down in some rows and not in others. Writes the test
accuracy of Cauchy experts less their Gaussian twins', paired over test examples, and how far apart the weights of the
experts are, to `benchmarks/results/row_blocks.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from benchmarks.folders import write_page
from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from diagnostics import compare_methods
from inference import fixed_point
from poe_models import DEFAULT_RULES, Cauchy, Energy, Gaussian, InputGram, ProductOfExperts, TaskVectors

ENERGIES: dict[str, Energy] = {"Gaussian": Gaussian(), "Cauchy": Cauchy()}
WHOLE = 0
"""Height of a matrix that is not cut."""


@dataclass(frozen=True)
class Line:
    """Cauchy experts and their Gaussian twins on one suite and seed, matrices cut in one way.

    Args:
        height: Rows of a block; `WHOLE` for matrices that are not cut.
        matrices: How many are solved.
        gaussian: Mean test accuracy over tasks.
        cauchy: The same of Cauchy experts.
        difference: Cauchy's less the twin's with the ends of its 95 % interval.
        nll: Difference of the mean test NLL, with its ends.
        spread: Largest over smallest weight of the Cauchy experts, relative to their twins': the median over matrices.
    """

    height: int
    matrices: int
    gaussian: float
    cauchy: float
    difference: tuple[float, float, float]
    nll: tuple[float, float, float]
    spread: float


def cut(suite: Suite, height: int) -> TaskVectors:
    """The updates with every merged matrix cut into blocks of so many rows."""
    if height == WHOLE:
        return suite.vectors()
    merged = [name for name, each in suite.vectors().treatments.items() if each.action == "merge"]
    names = "|".join(map(re.escape, merged))
    rule = {"match": f"^({names})$", "action": "merge", "view": {"height": height}}
    return suite.vectors(rules=DEFAULT_RULES.extended([rule]))


def merged(vectors: TaskVectors, energy: Energy) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Merged state dict, and the spread of the experts' weights in every matrix."""
    poe = ProductOfExperts.of(vectors.names, InputGram(), energy)
    state, spreads = {}, []
    for name, treatment in vectors.treatments.items():
        if treatment.action == "average":
            state[name] = vectors.average(name).cpu()
        elif treatment.action == "merge" and treatment.view is not None:
            blocks = []
            for module in vectors.modules(name):
                solution = fixed_point(poe.bind(module))
                blocks.append(module.base + solution.value[0])
                spreads.append(solution.info.record(0)["weight_spread"])
            state[name] = treatment.view.join(blocks, vectors.base.tensors[name].shape).cpu()
        else:
            state[name] = vectors.base.read(name)
    return state, [spread for spread in spreads if spread is not None]


def line_of(suite: Suite, height: int, seed: int) -> Line:
    """Both energies with matrices cut in one way.

    Args:
        suite: Tasks, heads and experts.
        height: Rows of a block.
        seed: Of the resamples.
    """
    predictions, spread, count = {}, 1.0, 0
    for name, energy in ENERGIES.items():
        vectors = cut(suite, height)
        state, spreads = merged(vectors, energy)
        spread, count = float(torch.tensor(spreads).median()), len(spreads)  # of the last: Cauchy experts
        predictions[name] = {t: v.double().softmax(1) for t, v in task_logits(suite, state, "test").items()}
    found = compare_methods(predictions, suite.labels("test"), seed=seed)
    differences = [found.difference("Cauchy", "Gaussian", score) for score in ("accuracy", "nll")]
    accuracy, nll = ((each.value, each.low, each.high) for each in differences)
    gaussian, cauchy = (found.mean(name).value for name in ENERGIES)
    return Line(height, count, gaussian, cauchy, accuracy, nll, spread)


def report(found: Mapping[tuple[str, int], Sequence[Line]], machines: Sequence[str], command: str) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    header = ["suite", "seed", "cut into", "matrices", "Gaussian", "Cauchy", "Cauchy less Gaussian", "NLL", "spread"]
    body = [
        [
            suite, str(seed), f"{line.height} rows" if line.height else "whole", str(line.matrices),
            f"{line.gaussian:.3f}", f"{line.cauchy:.3f}", _interval(line.difference), _interval(line.nll),
            f"{line.spread:.2f}",
        ]
        for (suite, seed), lines in found.items() for line in lines
    ]  # fmt: skip
    return "\n\n".join([
        "Does a heavy tail matter once every block of rows has an expert of its own? `InputGram` at the default scale "
        f"and anchor, λ = 1. Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "Mean test accuracy over tasks; differences of accuracy and NLL between Cauchy experts and their Gaussian "
        "twins with 95 % intervals over test examples. *spread*: largest over smallest weight of the Cauchy experts "
        "relative to their twins', median over matrices; 1 is a Gaussian.",
        markdown_table(header, body, left=3),
    ]) + "\n"  # fmt: skip


def _interval(ends: Sequence[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends)


def lines_of(suite: Suite, heights: Sequence[int], seed: int, tell: Callable[[Line], None]) -> list[Line]:
    """One row for every way to cut."""
    found = []
    for height in heights:
        found.append(line_of(suite, height, seed))
        tell(found[-1])
    return found


def main() -> None:
    """Merge, compare and write."""
    parser = suite_parser(__doc__, "row_blocks", "resamples")
    parser.add_argument("--heights", type=int, nargs="+", default=[WHOLE, 64, 32], help="rows of a block; 0: whole")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    found, machines = kept_runs(
        arguments,
        arguments.heights,
        lambda suite, seed, tell: lines_of(suite, arguments.heights, seed, tell),
        lambda each: Line(**each),
        console,
    )
    text = report(found, machines, command_line("benchmarks.row_blocks", parser, arguments))
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
