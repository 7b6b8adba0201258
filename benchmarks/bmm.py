"""Bayesian model merging on both suites: anchors, outer searches, and scores with labels and without ([BMM]).

`python -m benchmarks.bmm` merges the experts of each suite and training seed by ridge regressions around an anchor
([BMM] Eq. 8 and 15), whose precision, tied over roles and blocks of layers, and λ, tied over blocks, are searched
with the same number of trials: with inputs (`Activation`) and without (`InputGram`), by validation accuracy and by the
divergence from the experts' predictions, which needs no labels; the anchors alone, with λ searched; and for one anchor
random proposals and one shared grid. Keeps what is done under `out/bmm` and writes `benchmarks/results/bmm.md`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.folders import write_page
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import evaluate, mean_scores, own_logits, task_logits
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from inference.models.design import Design
from inference.models.method_design import MethodDesign
from inference.search import (
    DesignSpace,
    ModelMerges,
    Range,
    Searched,
    bmm_groups,
    layer_blocks,
    pattern_groups,
    search,
)
from inference.search.groups import Groups
from inference.search.study import Sampler
from poe_models import (
    Activation,
    Anchor,
    Gaussian,
    InputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
)
from poe_models.methods import TSVM, IsoC, MergingMethod, RegMean, TaskArithmetic, Ties

FIRE_ROLES = {"squeeze": "squeeze", "expand 1x1": "expand1x1", "expand 3x3": "expand3x3"}
FIRE_BLOCKS = {"fire 2 to 4": "fire[2-4]", "fire 5 to 7": "fire[5-7]", "fire 8 and 9": "fire[89]"}
ETA, SCALE = Range(1e-4, 1.0, log=True), Range(1.0, 1.3)
ALONE = Range(0.05, 2.0, log=True)
"""λ of an anchor by itself."""
ANCHORS = ("zero", "task arithmetic", "TIES", "TSV-M", "ISO-C", "RegMean")
ABLATED = "zero"
"""Anchor of the ablations."""
Score = Callable[[dict[str, Tensor]], float]


@dataclass(frozen=True)
class Line:
    """One way to merge on one suite and seed.

    Args:
        anchor: Centre of the anchor.
        way: What is done around it.
        validation: Best score of the search: mean validation accuracy, or the divergence in nats.
        accuracy: Mean test accuracy of the best settings.
        nll: Mean test NLL.
        trials: Of the search.
        overhead: CPU seconds of the search beside merges and scores.
        solving: CPU seconds of all merges.
        scoring: CPU seconds of all scores.
    """

    anchor: str
    way: str
    validation: float
    accuracy: float
    nll: float
    trials: int
    overhead: float
    solving: float
    scoring: float


class Bench:
    """The searches of one suite and seed.

    Args:
        suite: Tasks, heads and experts.
        examples: Unlabelled, of each task, for data-assisted merges and the divergence.
        trials: Of every search.
        seed: Of searches and examples.
    """

    def __init__(self, suite: Suite, examples: int, trials: int, seed: int) -> None:
        self.suite, self.trials, self.seed = suite, trials, seed
        self.merges = ModelMerges(suite.vectors())
        self.names = tuple(suite.experts)
        self.activations = Calibration(suite, examples, seed).activations
        own = {task: own_logits(suite, suite.model(path), task, "validation") for task, path in suite.experts.items()}
        self._teachers = {task: logits.double().log_softmax(1) for task, logits in own.items()}

    def anchors(self) -> dict[str, MergingMethod | None]:
        """Centres of the anchor by name; None is the base."""
        return {
            "zero": None,
            "task arithmetic": TaskArithmetic(1 / len(self.names)),
            "TIES": Ties(),
            "TSV-M": TSVM(),
            "ISO-C": IsoC(),
            "RegMean": RegMean(self.activations),
        }

    def accuracy(self, state: dict[str, Tensor]) -> float:
        """Mean validation accuracy; the NLL only breaks ties, as one more correct answer weighs more."""
        scores = mean_scores(evaluate(self.suite, state, "validation"))
        return scores.accuracy - 1e-7 * min(scores.nll, 100.0)

    def divergence(self, state: dict[str, Tensor]) -> float:
        """Mean KL divergence from the own experts' predictions on validation inputs, nats."""
        found = []
        for task, logits in task_logits(self.suite, state, "validation").items():
            teacher, student = self._teachers[task], logits.double().log_softmax(1)
            found.append(float((teacher.exp() * (teacher - student)).sum(1).mean()))
        return math.fsum(found) / len(found)

    def alone(self, name: str, method: MergingMethod, way: str = "alone") -> Line:
        """A merging rule by itself, with λ searched."""
        ready = method if method.ready else method.prepare(list(self.suite.vectors()))
        space = DesignSpace(lambda scaling: lambda tensor: MethodDesign(ready, scaling), {"scaling": Searched(ALONE)})
        return self.line(name, way, space, self.accuracy, "gp")

    def around(
        self,
        name: str,
        center: MergingMethod | None,
        residual_map: ResidualMap,
        way: str,
        labels: bool = True,
        sampler: Sampler = "gp",
        tied: bool = True,
    ) -> Line:
        """A ridge regression around an anchor, its precisions and λ searched.

        Args:
            name: Of the anchor.
            center: The anchor.
            residual_map: Of the experts.
            way: What it is called.
            labels: Whether validation accuracy is the score; else the divergence from the experts' predictions.
            sampler: Of the search.
            tied: Over groups; else one value for all modules.
        """
        ready = center if center is None or center.ready else center.prepare(list(self.suite.vectors()))

        def make(eta: float, scaling: float) -> Design:
            anchor = Anchor(ready, RelativePrecision(eta))
            return Design(ProductOfExperts.of(self.names, residual_map, Gaussian(), anchor=anchor), scaling)

        roles, blocks = groups_of(self.suite, list(self.merges.task_vectors.treatments))
        space = DesignSpace(make, {"eta": Searched(ETA, roles), "scaling": Searched(SCALE, blocks)})
        score = self.accuracy if labels else self.divergence
        return self.line(name, way, space if tied else space.shared(), score, sampler, minimize=not labels)

    def line(
        self, name: str, way: str, space: DesignSpace, score: Score, sampler: Sampler, minimize: bool = False
    ) -> Line:
        """A search of a design space, and the test scores of its best settings.

        Args:
            name: Of the anchor, or of the group of rows.
            way: What it is called.
            space: Designs to choose from.
            score: Of a merged state dict.
            sampler: Of the search.
            minimize: Whether a smaller score is better.
        """
        found = search(
            space, score, self.merges, trials=self.trials, seed=self.seed, sampler=sampler, minimize=minimize
        )
        scores = mean_scores(evaluate(self.suite, self.merges.state(found.designs), "test"))
        done = [trial for trial in found.trials if not trial.error]
        return Line(
            anchor=name,
            way=way,
            validation=found.score,
            accuracy=scores.accuracy,
            nll=scores.nll,
            trials=len(found.trials),
            overhead=found.overhead_seconds,
            solving=math.fsum(trial.solve_seconds for trial in done),
            scoring=math.fsum(trial.score_seconds for trial in done),
        )


def groups_of(suite: Suite, tensors: Sequence[str]) -> tuple[Groups, Groups]:
    """Roles and blocks of layers of a suite's network; SqueezeNet's are those of its fire modules."""
    if suite.name == "vision":
        return pattern_groups(tensors, FIRE_ROLES), pattern_groups(tensors, FIRE_BLOCKS)
    return bmm_groups(tensors, 3), layer_blocks(tensors, 3)


def lines_of(bench: Bench, anchors: Sequence[str], tell: Callable[[Line], None]) -> list[Line]:
    """All rows of one suite and seed.

    Args:
        bench: The searches.
        anchors: Names of the anchors.
        tell: Called with each row.
    """
    found: list[Line] = []

    def add(line: Line) -> None:
        found.append(line)
        tell(line)

    known = bench.anchors()
    activation = Activation(bench.activations)
    for name in anchors:
        center = known[name]
        if center is not None:
            add(bench.alone(name, center))
        add(bench.around(name, center, activation, "data-assisted"))
        add(bench.around(name, center, InputGram(), "data-free"))
        add(bench.around(name, center, InputGram(), "data-free, no labels", labels=False))
        if name == ABLATED:
            add(bench.around(name, center, InputGram(), "data-free, random", sampler="random"))
            add(bench.around(name, center, InputGram(), "data-free, shared grid", sampler="grid", tied=False))
    return found


def report(found: Mapping[tuple[str, int], Sequence[Line]], machines: Sequence[str], command: str) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    parts = [
        "Bayesian model merging ([BMM]): ridge regressions around anchors, precisions tied over roles and λ over "
        "blocks of layers, chosen by one search each with equal trials (a grid has as many as its steps allow). "
        "Settings are searched on validation examples, test examples are seen once. "
        f"Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "*alone*: the anchor by itself, its λ searched; *data-assisted*: experts on their own inputs (`Activation`); "
        "*data-free*: `InputGram`; *no labels*: the search minimises the mean divergence from the own experts' "
        "predictions on validation inputs. Accuracy: mean over tasks; over seeds the mean and, in brackets, the "
        "smallest and the largest. Overhead: CPU seconds of the search itself over those of its evaluations.",
    ]
    for suite in dict.fromkeys(name for name, _ in found):
        seeds = [seed for name, seed in found if name == suite]
        rows: dict[tuple[str, str], list[Line]] = {}
        for seed in seeds:
            for line in found[suite, seed]:
                rows.setdefault((line.anchor, line.way), []).append(line)
        body = [[*key, *_cells(lines)] for key, lines in rows.items()]
        trials = max(line.trials for lines in rows.values() for line in lines)
        parts.append(f"## {suite}: training seeds {', '.join(map(str, seeds))}; at most {trials} trials a search")
        parts.append(markdown_table(["anchor", "way", "accuracy", "NLL", "overhead / evaluation"], body, left=2))
    return "\n\n".join(parts) + "\n"


def _cells(lines: Sequence[Line]) -> list[str]:
    shares = [line.overhead / line.scoring for line in lines]
    return [
        spread([line.accuracy for line in lines]),
        spread([line.nll for line in lines]),
        f"{statistics.fmean(shares):.2f}",
    ]


def spread(values: Sequence[float]) -> str:
    """The mean, with the smallest and the largest in brackets if there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "bmm", "examples and searches")
    parser.add_argument("--anchors", nargs="+", default=list(ANCHORS))
    parser.add_argument("--trials", type=int, default=30, help="of every search")
    parser.add_argument("--examples", type=int, default=128, help="unlabelled, of each task")
    parser.add_argument("--validation", type=int, default=None, help="most validation examples of a task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    settings = (arguments.trials, arguments.examples, arguments.validation, arguments.anchors)

    def measured(suite: Suite, seed: int, tell: Callable[[Line], None]) -> list[Line]:
        small = suite.limited(arguments.validation, None)
        return lines_of(Bench(small, arguments.examples, arguments.trials, seed), arguments.anchors, tell)

    found, machines = kept_runs(arguments, settings, measured, lambda each: Line(**each), console)
    text = report(found, machines, command_line("benchmarks.bmm", parser, arguments))
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
