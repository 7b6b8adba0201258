"""Does the evidence of functional posteriors choose a design as well as the functional score does?

`python -m benchmarks.functional_evidence` fits one functional expert a task beside weight-space experts, around several
centres and with several importances of the weight-space experts, for each suite and training seed. Laplace's evidence
of each posterior is a verdict on inputs that the fit has seen; the functional score of its MAP is one on validation
inputs, which no fit has seen. Test scores of the MAP say which ranks designs better. Keeps what is done under
`out/functional_evidence` and writes `benchmarks/results/functional_evidence.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.folders import write_page
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import mean_scores, score, task_logits
from benchmarks.harness.functional import BATCH, LEARNING_RATE, STEPS, Predictions
from benchmarks.harness.methods import Method, solve
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.ranking import Judged, ranking_of
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from diagnostics import functional_score
from inference.functional import SpanModel, functional_evidence
from poe_models.methods import TSVM, IsoC, MergingMethod, RegMean, TaskArithmetic

IMPORTANCES = (0.01, 0.1, 1.0)
RULES: dict[str, MergingMethod] = {"task arithmetic": TaskArithmetic(0.3), "TSV-M": TSVM(), "ISO-C": IsoC()}
"""Centers without data, beside the MAP of the weight-space product; RegMean sees the same inputs."""


@dataclass(frozen=True)
class Line:
    """A design: a centre and an importance.

    Args:
        center: Name of the merge that the span goes through.
        importance: Of the weight-space experts.
        evidence: Of the functional experts, nats; nan where Laplace's method has none.
        fitted: Mean divergence from the own experts on the inputs of the fit, nats.
        divergence: The same on validation inputs.
        accuracy: Of the MAP on test, mean over tasks.
        nll: On test, nats.
        cpu_seconds: Of the fit and the evidence.
    """

    center: str
    importance: float
    evidence: float
    fitted: float
    divergence: float
    accuracy: float
    nll: float
    cpu_seconds: float

    @property
    def name(self) -> str:
        """Center and importance."""
        return f"{self.center}, {self.importance:g}"


def centers(predictions: Predictions) -> dict[str, Mapping[str, Tensor] | None]:
    """Merged updates by module of every centre; None for the MAP of the weight-space product itself."""
    rules = RULES | {"RegMean": RegMean(predictions.calibration.activations)}
    own: dict[str, Mapping[str, Tensor] | None] = {"InputGram, Cauchy": None}
    return own | {
        name: solve(Method(name, "", rule), predictions.vectors, 0.0).matrices for name, rule in rules.items()
    }


def lines_of(
    suite: Suite, seed: int, examples: int, importances: Sequence[float], tell: Callable[[Line], None]
) -> list[Line]:
    """Every design of one suite.

    Args:
        suite: Tasks, heads and experts.
        seed: Of examples and mini-batches.
        examples: Unlabelled, of each task.
        importances: Of the weight-space experts.
        tell: Called with each design.
    """
    predictions = Predictions(suite, Calibration(suite, examples, seed), seed)
    found = []
    for name, merged in centers(predictions).items():
        for importance in importances:
            found.append(_design(predictions, name, merged, importance))
            tell(found[-1])
    return found


def _design(predictions: Predictions, name: str, merged: Mapping[str, Tensor] | None, importance: float) -> Line:
    """The posterior of one design, its evidence, and the scores of its MAP."""
    began = time.process_time()
    model, posterior = predictions.posterior(merged, importance)
    solution = predictions.fitted(model, posterior)
    try:
        evidence = functional_evidence(posterior, solution)
    except ValueError:  # the Hessian of the weight-space experts is not positive definite
        evidence = float("nan")
    spent = time.process_time() - began
    examples = sum(factor.expert.examples for factor in posterior.factors if factor.expert is not None)
    fitted = sum(float(factor.energy(solution.value).sum()) for factor in posterior.factors) / examples
    weights = model.weights(posterior.coefficients(solution.value))
    return Line(name, importance, evidence, fitted, *_scores(predictions, model, weights), spent)


def _scores(predictions: Predictions, model: SpanModel, weights: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """Divergence on validation inputs, test accuracy and test NLL."""
    state = {name: value.detach() for name, value in weights.items()}
    seen, test = (task_logits(predictions.suite, state, split) for split in ("validation", "test"))
    labels = predictions.suite.labels("test")
    scores = mean_scores({task: score(values, labels[task]) for task, values in test.items()})
    divergence = functional_score({"merge": seen}, predictions.own, seed=0, logits=True).mean("merge").value
    return divergence, scores.accuracy, scores.nll


def judged(lines: Sequence[Line]) -> list[Judged]:
    """How every judge ranks the designs that have an evidence."""
    known = [line for line in lines if line.evidence == line.evidence]
    return [
        ranking_of("Laplace evidence", known, [line.evidence for line in known]),
        ranking_of("functional score, inputs of the fit", known, [-line.fitted for line in known]),
        ranking_of("functional score, validation inputs", known, [-line.divergence for line in known]),
    ]


def report(
    found: Mapping[tuple[str, int], Sequence[Line]], machines: Sequence[str], examples: int, command: str
) -> str:
    """The page.

    Args:
        found: Suite and training seed to its designs.
        machines: Where they were measured, in words.
        examples: Unlabelled, of each task.
        command: What made it.

    Returns:
        Markdown.
    """
    judges = [
        [suite, str(seed), one.judge, str(one.merges)]
        + [f"{one.with_accuracy:.2f}", f"{one.with_nll:.2f}", f"{one.regret:.1f}"]
        for (suite, seed), lines in found.items()
        for one in judged(lines)
    ]
    rows = [[suite, str(seed), *_cells(line)] for (suite, seed), lines in found.items() for line in lines]
    first = ["suite", "seed"]
    header = [*first, "center", "importance", "log evidence", "KL, fit", "KL, validation", "accuracy", "NLL"]
    return "\n\n".join([
        f"Designs of functional posteriors, judged without labels: one functional expert a task on {examples} "
        "unlabelled training inputs (KL from the task's own expert), beside InputGram, Cauchy experts in weight "
        f"space of some importance, in the span through a center; {STEPS} steps of Adam on {BATCH} inputs "
        f"a task, learning rate {LEARNING_RATE:g}. Evidence is of the functional experts under the weight-space "
        "product (`functional_evidence`, Laplace's method with the Gauss-Newton matrix); the functional score is the "
        f"mean divergence from the own experts. Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "Spearman's rank correlations with the test scores of the MAP, and the regret: the best test accuracy less "
        "that of the design that the judge puts first, in points. The designs are a grid, not a sample.",
        markdown_table([*first, "judge", "designs", "with accuracy", "with minus NLL", "regret"], judges, left=3),
        "Every design:",
        markdown_table([*header, "CPU s"], rows, left=3),
    ]) + "\n"  # fmt: skip


def _cells(line: Line) -> list[str]:
    numbers = (line.fitted, line.divergence, line.accuracy, line.nll)
    evidence = "none" if line.evidence != line.evidence else f"{line.evidence:.0f}"
    return [
        line.center,
        f"{line.importance:g}",
        evidence,
        *(f"{number:.3f}" for number in numbers),
        f"{line.cpu_seconds:.0f}",
    ]


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "functional_evidence", "examples and mini-batches", (0,))
    parser.add_argument("--examples", type=int, default=32, help="unlabelled, of each task")
    parser.add_argument("--importances", type=float, nargs="+", default=list(IMPORTANCES), help="of weight space")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    found, machines = kept_runs(
        arguments,
        (STEPS, BATCH, LEARNING_RATE, arguments.examples, arguments.importances),
        lambda suite, seed, tell: lines_of(suite, seed, arguments.examples, arguments.importances, tell),
        lambda each: Line(**each),
        console,
    )
    command = command_line("benchmarks.functional_evidence", parser, arguments)
    text = report(found, machines, arguments.examples, command)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
