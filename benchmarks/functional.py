"""Functional experts on the suites: predictions on a few unlabelled inputs as factors beside the weight-space product.

`python -m benchmarks.functional` takes, for each suite and training seed, two centres (the MAP of `InputGram`, Cauchy,
and RegMean), and around each the MAP with one functional expert a task on the same 128 unlabelled training examples
that RegMean sees; and, at T = 1 with nothing tuned, an ensemble of draws from Laplace's approximation there. Keeps what
is done under `out/functional` and writes `benchmarks/results/functional.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.folders import write_page
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import Scores
from benchmarks.harness.functional import (
    BATCH,
    HEADER,
    IMPORTANCE,
    LEARNING_RATE,
    MEMBERS,
    STEPS,
    Line,
    Predictions,
    cells,
)
from benchmarks.harness.methods import Method, solve
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from poe_models.methods import RegMean


def lines_of(suite: Suite, seed: int, examples: int, tell: Callable[[Line], None]) -> list[Line]:
    """All rows of one suite.

    Args:
        suite: Tasks, heads and experts.
        seed: Of examples, mini-batches and draws.
        examples: Unlabelled, of each task.
        tell: Called with each row.
    """
    calibration = Calibration(suite, examples, seed)
    predictions = Predictions(suite, calibration, seed)
    centers: dict[str, Mapping[str, Tensor] | None] = {
        "InputGram, Cauchy": None,
        "RegMean": solve(Method("RegMean", "", RegMean(calibration.activations)), predictions.vectors, 0.0).matrices,
    }
    found = []
    for name, merged in centers.items():
        for line in predictions.lines(name, merged):
            found.append(line)
            tell(line)
    return found


def report(found: Mapping[tuple[str, int], list[Line]], machines: list[str], command: str) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    body = [[suite, str(seed), *cells(each)] for (suite, seed), lines in found.items() for each in lines]
    header = ["suite", "seed", *HEADER]
    return "\n\n".join([
        "Functional experts: the weight-space product times one expert a task over predictions on unlabelled training "
        f"examples (KL from the task's own expert), in the span through a centre. {STEPS} steps of Adam on {BATCH} "
        f"examples a task, weight-space importance {IMPORTANCE:g}; Laplace with the Gauss-Newton matrix at T = 1, "
        f"{MEMBERS} members, nothing tuned. Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "Mean test scores over tasks; *scaled*: every member's logits divided by what minimises validation NLL; "
        "*KL*: the functional score, mean divergence from the own experts on validation inputs, which no fit has seen, "
        "without labels. RegMean sees the same examples.",
        markdown_table(header, body, left=3),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "functional", "examples and draws")
    parser.add_argument("--examples", type=int, default=128, help="unlabelled, of each task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    settings = (IMPORTANCE, STEPS, BATCH, LEARNING_RATE, MEMBERS, arguments.examples)
    found, machines = kept_runs(
        arguments,
        settings,
        lambda suite, seed, tell: lines_of(suite, seed, arguments.examples, tell),
        lambda each: Line(**{**each, **{key: Scores(**each[key]) for key in ("plain", "scaled")}}),
        console,
    )
    command = command_line("benchmarks.functional", parser, arguments)
    text = report(found, machines, command)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
