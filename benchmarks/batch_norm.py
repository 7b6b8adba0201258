"""What to do with BatchNorm's running statistics in a merge: keep the base's, average, or estimate them again.

`python -m benchmarks.batch_norm` merges the experts of a suite with BatchNorm by task arithmetic, RegMean and
`InputGram`, Cauchy, each with the treatments in `TREATMENTS`, and compares the accuracy of each with averaging's,
paired over test examples. λ is chosen on validation among `SCALINGS` for every row. Writes
`benchmarks/results/batch_norm.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.folders import write_page
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import Scores, mean_scores, own_logits, score
from benchmarks.harness.functional import joined
from benchmarks.harness.methods import Loaded, Merge, Method, solve
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from diagnostics import compare_methods
from inference import fit_logit_temperature, reestimate_batch_norm
from poe_models import Cauchy, InputGram, TaskArithmetic
from poe_models.methods import RegMean

SCALINGS = (0.1, 0.3, 0.6, 1.0)
ETA = 0.1
KEPT, AVERAGED = "the base's", "averaged"
MIXED, IN_TURN, ALONE = "re-estimated, mixed batches", "re-estimated, task after task", "re-estimated for each task"
TREATMENTS = (AVERAGED, KEPT, MIXED, IN_TURN, ALONE)
Logits = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """One way to merge on one suite and seed.

    Args:
        method: What was merged, and how.
        statistics: What became of the running statistics.
        scaling: λ, chosen on validation; None where nothing is merged.
        plain: Mean test scores over tasks.
        nll: Mean test NLL with logits divided by what minimises validation NLL.
        difference: Accuracy less that of the method's first row, with the ends of its 95 % interval; None there.
    """

    method: str
    statistics: str
    scaling: float | None
    plain: Scores
    nll: float
    difference: tuple[float, float, float] | None


@dataclass(frozen=True, eq=False)
class Norms:
    """Models of one suite under every treatment of running statistics.

    Args:
        suite: Tasks, heads and experts.
        calibration: The unlabelled examples.
        seed: Of the resamples.
    """

    suite: Suite
    calibration: Calibration
    seed: int

    @cached_property
    def unlabelled(self) -> dict[str, list[Any]]:
        """Batches of every task."""
        return {task: self.calibration.batches(task) for task in self.suite.tasks}

    @cached_property
    def mixed(self) -> list[Any]:
        """Batches with examples of every task; what some tasks have more of is left out."""
        return [joined(list(parts)) for parts in zip(*self.unlabelled.values(), strict=False)]

    def models(self, state: Mapping[str, Tensor], statistics: str) -> dict[str, nn.Module]:
        """The model of each task: the same one, unless its statistics are the task's own.

        Args:
            state: Weights with averaged statistics.
            statistics: One of `TREATMENTS`.
        """
        if statistics == ALONE:
            found = {}
            for task, batches in self.unlabelled.items():
                found[task] = self.suite.model(state)
                found[task].load_state_dict(reestimate_batch_norm(found[task], [joined(batches)]), strict=False)
            return found
        base = {name: value for name, value in self.base.items() if ".running_" in name} if statistics == KEPT else {}
        model = self.suite.model({**state, **base})
        if statistics in (MIXED, IN_TURN):
            batches = self.mixed if statistics == MIXED else list(map(joined, self.unlabelled.values()))
            model.load_state_dict(reestimate_batch_norm(model, batches), strict=False)
        return dict.fromkeys(self.suite.tasks, model)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Weights of the base."""
        return self.suite.model(self.suite.base).state_dict()

    def logits(self, models: Mapping[str, nn.Module], split: str) -> Logits:
        """Logits of every task by its model."""
        return {task: own_logits(self.suite, model, task, split) for task, model in models.items()}

    def rank(self, models: Mapping[str, nn.Module]) -> tuple[float, float]:
        """Mean validation accuracy, ties by the lower NLL."""
        found, labels = self.logits(models, "validation"), self.suite.labels("validation")
        mean = mean_scores({task: score(each, labels[task]) for task, each in found.items()})
        return mean.accuracy, -mean.nll

    def line(
        self, method: str, statistics: str, scaling: float | None, models: Mapping[str, nn.Module], first: Logits
    ) -> tuple[Line, Logits]:
        """A row, and the test logits that it is from.

        Args:
            method: Of the row.
            statistics: Of the row.
            scaling: Of the row.
            models: By task.
            first: Test logits of the method's first row; none in that one.
        """
        test, labels = self.logits(models, "test"), self.suite.labels("test")
        divisor = fit_logit_temperature(self.logits(models, "validation"), self.suite.labels("validation"))
        plain, scaled = (
            mean_scores({task: score(each / by, labels[task]) for task, each in test.items()}) for by in (1.0, divisor)
        )
        difference = None
        if first:
            pair = {"one": test, "other": first}
            tables = {name: {t: each.double().softmax(1) for t, each in found.items()} for name, found in pair.items()}
            gap = compare_methods(tables, labels, seed=self.seed).difference("one", "other", "accuracy")
            difference = gap.value, gap.low, gap.high
        return Line(method, statistics, scaling, plain, scaled.nll, difference), test

    def lines(self, method: str, merge: Merge) -> Iterator[Line]:
        """Rows of a merge under every treatment, averaging first.

        Args:
            method: Its name.
            merge: Solved, with the mean updates of running statistics.

        Yields:
            Each row when it is done.
        """
        first: Logits = {}
        for statistics in TREATMENTS:
            states = {scaling: merge.state(scaling) for scaling in SCALINGS}
            best = max(SCALINGS, key=lambda scaling: self.rank(self.models(states[scaling], statistics)))
            line, test = self.line(method, statistics, best, self.models(states[best], statistics), first)
            first = first or test
            yield line

    def unmerged(self) -> Iterator[Line]:
        """Rows of own experts and of the base, with their statistics and with statistics estimated again.

        Yields:
            Each row when it is done.
        """
        own = {task: self.suite.model(folder) for task, folder in self.suite.experts.items()}
        line, first = self.line("own experts", "each its own", None, own, {})
        yield line
        again = {task: self.models(model.state_dict(), ALONE)[task] for task, model in own.items()}
        yield self.line("own experts", ALONE, None, again, first)[0]
        line, first = self.line("base", KEPT, None, self.models(self.base, KEPT), {})
        yield line
        for statistics in (MIXED, ALONE):
            yield self.line("base", statistics, None, self.models(self.base, statistics), first)[0]


def lines_of(suite: Suite, seed: int, examples: int, tell: Callable[[Line], None]) -> list[Line]:
    """All rows of one suite.

    Args:
        suite: Tasks, heads and experts; its network has BatchNorm.
        seed: Of examples and resamples.
        examples: Unlabelled, of each task.
        tell: Called with each row.
    """
    norms = Norms(suite, Calibration(suite, examples, seed), seed)
    found: list[Line] = []

    def add(line: Line) -> None:
        found.append(line)
        tell(line)

    for line in norms.unmerged():
        add(line)
    vectors = Loaded(suite.vectors())
    for method, eta in (
        (Method("task arithmetic", "", TaskArithmetic(1.0)), 0.0),
        (Method("RegMean", "", RegMean(norms.calibration.activations)), 0.0),
        (Method("InputGram, Cauchy", "", None, InputGram(), Cauchy()), ETA),
    ):
        for line in norms.lines(method.name, solve(method, vectors, eta)):
            add(line)
    return found


def report(
    found: Mapping[tuple[str, int], Sequence[Line]], machines: Sequence[str], examples: int, command: str
) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        examples: Unlabelled, of each task.
        command: What made it.

    Returns:
        Markdown.
    """
    header = ["suite", "seed", "method", "running statistics", "λ", "accuracy", "NLL", "NLL scaled", "ECE"]
    body = [[suite, str(seed), *_cells(each)] for (suite, seed), lines in found.items() for each in lines]
    scalings = ", ".join(f"{each:g}" for each in SCALINGS)
    return "\n\n".join([
        "What to do with BatchNorm's running statistics in a merge? Kept at the base's, averaged as other vectors are "
        f"(base plus λ times the mean update), or estimated again from {examples} unlabelled training images a task: "
        "in batches with images of all tasks, in batches of one task after the other's (as `poe-merge batch-norm` with "
        "several tasks), or for each task alone, which needs to know the task of an input. Made by "
        f"`{command}` on {' and '.join(dict.fromkeys(machines))}.",
        f"Mean test scores over tasks; λ is chosen by validation accuracy among {scalings} for every row, the anchor's "
        f"relative precision is {ETA:g}. *NLL scaled*: logits divided by what minimises validation NLL. The last "
        "column is the accuracy less that of the method's first row, with 95 % intervals over test examples.",
        "The frozen heads were fitted on features of the base with its own statistics, and the experts were tuned with "
        "those of their batches: rows of the base say what other statistics do to the heads alone, rows of own experts "
        "what an estimate from few images costs. The experts' learning rate was raised to 1e-3 after test accuracies "
        "at 1e-4 had been seen (below the base's), and 0.1 was added to the λ after a first look.",
        markdown_table([*header, "less the first"], body, left=4),
    ]) + "\n"  # fmt: skip


def _cells(line: Line) -> list[str]:
    scaling = "" if line.scaling is None else f"{line.scaling:g}"
    numbers = (line.plain.accuracy, line.plain.nll, line.nll, line.plain.ece)
    gap = "" if line.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*line.difference)
    return [line.method, line.statistics, scaling, *(f"{number:.3f}" for number in numbers), gap]


def main() -> None:
    """Merge, compare and write."""
    parser = suite_parser(__doc__, "batch_norm", "examples and resamples", (0,))
    parser.set_defaults(suites=["efficientnet"])
    parser.add_argument("--examples", type=int, default=128, help="unlabelled, of each task")
    parser.add_argument("--validation", type=int, default=None, help="most examples of each task to choose by")
    parser.add_argument("--test", type=int, default=None, help="most examples of each task to judge by")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    limits = arguments.validation, arguments.test
    found, machines = kept_runs(
        arguments,
        (SCALINGS, ETA, arguments.examples, limits),
        lambda suite, seed, tell: lines_of(suite.limited(*limits), seed, arguments.examples, tell),
        lambda each: Line(**{**each, "plain": Scores(**each["plain"])}),
        console,
    )
    text = report(found, machines, arguments.examples, command_line("benchmarks.batch_norm", parser, arguments))
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
