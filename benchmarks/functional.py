"""Functional experts on the suites: predictions on a few unlabelled inputs as factors beside the weight-space product.

`python -m benchmarks.functional` takes, for each suite and training seed, two centres (the MAP of `InputGram`, Cauchy,
and RegMean), and around each the MAP with one functional expert a task on the same 128 unlabelled training examples
that RegMean sees; and, at T = 1 with nothing tuned, an ensemble of draws from Laplace's approximation there. Keeps what
is done under `out/functional` and writes `benchmarks/results/functional.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.folders import kept, key_of, write_page
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.evaluate import Scores, mean_scores, score, task_logits
from benchmarks.harness.methods import Loaded, Method, solve
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Head, Suite
from benchmarks.registry import SUITES, command_line, load, recipe_of
from diagnostics import functional_score
from inference.functional import SpanModel, fit, functional, functional_laplace
from inference.logit_temperature import fit_ensemble_temperature, scaled_mean
from poe_models import Cauchy, Expert, InputGram, ProductOfExperts
from poe_models.methods import RegMean

IMPORTANCE = 0.1
"""Of the weight-space experts beside one nat for each nat of divergence."""
STEPS, BATCH, LEARNING_RATE, MEMBERS = 150, 32, 0.05, 10
Logits = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """One way to predict on one suite and seed.

    Args:
        name: Of the row.
        plain: Mean test scores.
        scaled: The same with logits divided by what minimises validation NLL.
        divergence: Mean divergence from the own experts on validation inputs, which no fit has seen, nats.
        cpu_seconds: Of the fit or the draws; nan where there is nothing to measure.
    """

    name: str
    plain: Scores
    scaled: Scores
    divergence: float
    cpu_seconds: float


def lines_of(suite: Suite, seed: int, examples: int, tell: Any) -> list[Line]:
    """All rows of one suite."""
    calibration, vectors = Calibration(suite, examples, seed), Loaded(suite.vectors())
    own = {task: task_logits(suite, folder, "validation")[task] for task, folder in suite.experts.items()}
    found = []
    inputs = {task: joined(calibration.batches(task)) for task in suite.tasks}
    centers: dict[str, Mapping[str, Tensor] | None] = {
        "InputGram, Cauchy": None,
        "RegMean": solve(Method("RegMean", "", RegMean(calibration.activations)), vectors, 0.0).matrices,
    }
    for name, merged in centers.items():
        experts = tuple(Expert(each, InputGram(), Cauchy(), importance=IMPORTANCE) for each in vectors.vectors.names)
        model = SpanModel(suite.model(suite.base), vectors.vectors, ProductOfExperts(experts), merged)
        states = [model.weights(model.coefficients({"merge": 1.0}))]
        found.append(line_of(name, suite, states, own, float("nan")))
        tell(found[-1])
        factors = [functional(task, model, inputs[task], Through(suite.heads[task])) for task in suite.tasks]
        posterior, began = model.posterior(*factors), time.process_time()
        solution = fit(
            posterior,
            model.start(),
            generator=torch.Generator().manual_seed(seed),
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
        )
        spent = time.process_time() - began
        at = model.weights(posterior.coefficients(solution.value))
        found.append(line_of(f"{name} + predictions, MAP", suite, [at], own, spent))
        tell(found[-1])
        began = time.process_time()
        draws = functional_laplace(posterior, solution).sample(MEMBERS, torch.Generator().manual_seed(seed))
        members = [model.weights(posterior.coefficients(draw)) for draw in draws.values[0]]
        spent = time.process_time() - began
        found.append(line_of(f"{name} + predictions, Laplace at T = 1", suite, members, own, spent))
        tell(found[-1])
    return found


@dataclass(frozen=True)
class Through:
    """Logits of a task: its head on the network's features.

    Args:
        head: The task's.
    """

    head: Head

    def __call__(self, network: Any, inputs: Any) -> Tensor:
        """Logits (n, classes)."""
        return self.head(network(inputs))


def joined(batches: list[Any]) -> Any:
    """Batches as one set of inputs; named tuples of padded texts are padded to one length.

    Args:
        batches: Of `Calibration.batches`.
    """
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    longest = max(part.shape[1] for batch in batches for part in batch)
    columns = zip(*batches, strict=True)
    padded = ([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in column] for column in columns)
    return type(batches[0])(*(torch.cat(parts) for parts in padded))


def line_of(name: str, suite: Suite, states: list[dict[str, Tensor]], own: Logits, seconds: float) -> Line:
    """Scores of one model, or of the mean of several."""
    members = {split: tables_of(suite, states, split) for split in ("validation", "test")}
    divisor = fit_ensemble_temperature(members["validation"], suite.labels("validation"))
    labels = suite.labels("test")
    plain, scaled = (
        mean_scores({task: score(scaled_mean(each, by), labels[task]) for task, each in members["test"].items()})
        for by in (1.0, divisor)
    )
    seen = {task: scaled_mean(each, 1.0) for task, each in members["validation"].items()}
    divergence = functional_score({name: seen}, own, seed=0, logits=True).mean(name).value
    return Line(name, plain, scaled, divergence, seconds)


def tables_of(suite: Suite, states: list[dict[str, Tensor]], split: str) -> Logits:
    """Logits of every member by task, (members, n, classes)."""
    tables = [task_logits(suite, {k: v.detach() for k, v in state.items()}, split) for state in states]
    return {task: torch.stack([table[task] for table in tables]) for task in suite.tasks}


def report(found: Mapping[tuple[str, int], list[Line]], machines: list[str], command: str) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    body = []
    for (suite, seed), lines in found.items():
        for each in lines:
            seconds = "" if each.cpu_seconds != each.cpu_seconds else f"{each.cpu_seconds:.0f}"
            numbers = (each.plain.accuracy, each.plain.nll, each.scaled.nll, each.plain.ece, each.scaled.ece)
            cells = [f"{number:.3f}" for number in (*numbers, each.divergence)]
            body.append([suite, str(seed), each.name, *cells, seconds])
    header = ["suite", "seed", "method", "accuracy", "NLL", "NLL scaled", "ECE", "ECE scaled", "KL", "CPU s"]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/functional.md"))
    parser.add_argument("--kept", type=Path, default=Path("out/functional"), help="where what is done is kept")
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training, examples and draws")
    parser.add_argument("--full", action="store_true", help="more examples of every kind in training and tests")
    parser.add_argument("--examples", type=int, default=128, help="unlabelled, of each task")
    parser.add_argument("--device", default="cpu", help="where models run and updates are merged")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the suites' caches (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console, machines = Console(), []
    found = {}
    for name in arguments.suites:
        for seed in arguments.seeds:
            suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)

            def make(suite: Suite = suite, seed: int = seed) -> dict[str, object]:
                lines = lines_of(suite, seed, arguments.examples, lambda line: console.print(line, highlight=False))
                return {"machine": machine(suite.device), "lines": [asdict(each) for each in lines]}

            settings = (IMPORTANCE, STEPS, BATCH, LEARNING_RATE, MEMBERS, arguments.examples)
            saved = kept(arguments.kept / f"{name}-{seed}-{key_of(suite.key, settings)}.json", make)
            machines.append(saved["machine"])
            scores = ("plain", "scaled")
            rows = [Line(**{**each, **{s: Scores(**each[s]) for s in scores}}) for each in saved["lines"]]
            found[name, seed] = rows
    command = command_line("benchmarks.functional", parser, arguments)
    text = report(found, machines, command)
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
