"""What ranks merges without labels: the functional score, the evidence, or validation accuracy on a few labels?

`python -m benchmarks.ranking` merges the experts of each suite and training seed by designs of two residual maps and by
the rules of the literature, each at several λ, and judges every merge by the mean divergence of its predictions from
the own experts' on validation inputs (no labels), by the design's log evidence (no labels, no inputs), and by accuracy
on 8, 32 and 128 validation labels a task. Test scores say who ranks best. Every merge is kept on its own under
`out/ranking`, and every evidence where `benchmarks.evidence` keeps it, so that an interrupted run goes on, and one with
`--samples 0`, which leaves the evidence out, gives its merges to one with it; writes `benchmarks/results/ranking.md`
and a CSV.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.evidence import MAPS, SAMPLES, DesignMap, Evidences, designs
from benchmarks.folders import kept, key_of
from benchmarks.harness.evaluate import mean_scores, score, task_logits
from benchmarks.harness.methods import BASELINES, RULES, Loaded, Merge, Method, solve
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, load, recipe_of, suite_parser
from diagnostics import functional_score
from diagnostics.predictions.agreement import rank_agreement

SCALINGS = (0.3, 0.6, 1.0, 2.0)
LABELS = (8, 32, 128)
SUBSETS = 20
"""Random subsets of the validation labels, of each size."""
INPUTS = 128
"""Unlabelled validation inputs a task that the smaller functional score sees."""
Run = tuple[str, int]
"""Suite and training seed."""


@dataclass(frozen=True)
class Row:
    """A merge, what the judges say of it, and how good it is.

    Args:
        name: Of the design or rule.
        scaling: λ.
        evidence: Of the design in nats; nan where it has none or none was asked for, or λ is not 1.
        residual_map: Of the design; evidences of one map compare. None of a rule.
        divergence: From the own experts on all validation inputs, nats.
        divergence_few: The same on `INPUTS` a task.
        few_labels: Number of labels a task to the validation accuracy on each of the random subsets.
        accuracy: On test, mean over tasks.
        nll: On test, nats.
    """

    name: str
    scaling: float
    evidence: float
    residual_map: str
    divergence: float
    divergence_few: float
    few_labels: dict[str, list[float]]
    accuracy: float
    nll: float


@dataclass(frozen=True)
class Judged:
    """How one judge ranks the merges of a run.

    Args:
        judge: Its name.
        merges: How many it ranks.
        with_accuracy: Spearman's correlation with test accuracy.
        with_nll: With minus the test NLL.
        regret: Best test accuracy less that of the merge that it puts first, in points.
        scaling_regret: The same where it chooses λ alone, mean over designs and rules; nan where all have one λ.
    """

    judge: str
    merges: int
    with_accuracy: float
    with_nll: float
    regret: float
    scaling_regret: float = math.nan


def rows_of(
    suite: Suite,
    seed: int,
    folder: Path,
    scalings: Sequence[float],
    evidences: Evidences | None,
    tell: Callable[[str], None],
) -> list[Row]:
    """All merges of a suite, those that are not in the folder made.

    Args:
        suite: What to merge and to judge by.
        seed: Of subsets.
        folder: Where merges are kept, one file each.
        scalings: Each λ.
        evidences: Of the designs, computed or kept; None leaves them out.
        tell: Called with each merge before it is judged.
    """
    loaded = Loaded(suite.vectors())
    own = {task: task_logits(suite, place, "validation")[task] for task, place in suite.experts.items()}
    found = []
    for map_name, residual_map in MAPS.items():
        for name, poe in designs(loaded.vectors.names, residual_map).items():
            known = math.nan if evidences is None else evidences.of(map_name, name, poe).total
            method = Method(f"{map_name}, {name}", map_name, DesignMap(poe))
            for row in _at_scalings(suite, loaded, method, own, seed, folder, scalings, tell):
                found.append(replace(row, residual_map=map_name, evidence=known if row.scaling == 1.0 else math.nan))
    for method in (*BASELINES, *RULES):
        found += _at_scalings(suite, loaded, method, own, seed, folder, scalings, tell)
    return found


def _at_scalings(
    suite: Suite,
    loaded: Loaded,
    method: Method,
    own: Mapping[str, Tensor],
    seed: int,
    folder: Path,
    scalings: Sequence[float],
    tell: Callable[[str], None],
) -> list[Row]:
    """One merge at every λ, solved once if any of them is missing; without its evidence."""
    solved: list[Merge] = []
    found = []
    for scaling in scalings:

        def make(scaling: float = scaling) -> dict[str, object]:
            tell(f"{method.name}, λ = {scaling:g}")
            if not solved:
                solved.append(solve(method, loaded, 0.0))
            state = solved[0].state(scaling)
            return asdict(_judged(suite, state, own, seed, method.name, scaling))

        found.append(Row(**kept(folder / f"{key_of(method.name, scaling)}.json", make)))
    return found


def _judged(
    suite: Suite, state: Mapping[str, Tensor], own: Mapping[str, Tensor], seed: int, name: str, scaling: float
) -> Row:
    """What the judges see of one merge, and its test scores."""
    validation, test = (task_logits(suite, state, split) for split in ("validation", "test"))
    labels = {split: suite.labels(split) for split in ("validation", "test")}
    few = {task: _subset(len(values), INPUTS, seed) for task, values in own.items()}
    scores = mean_scores({task: score(values, labels["test"][task]) for task, values in test.items()})
    right = {task: (v.argmax(-1) == labels["validation"][task]).double() for task, v in validation.items()}
    return Row(
        name,
        scaling,
        math.nan,
        "",
        _divergence(validation, own),
        _divergence({t: validation[t][few[t]] for t in own}, {t: own[t][few[t]] for t in own}),
        {str(count): [_accuracy(right, count, seed + 1 + draw) for draw in range(SUBSETS)] for count in LABELS},
        scores.accuracy,
        scores.nll,
    )


def _divergence(merged: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    found = functional_score({"merge": dict(merged)}, dict(own), seed=0, logits=True)
    return found.mean("merge").value


def _accuracy(right: Mapping[str, Tensor], count: int, seed: int) -> float:
    """Mean accuracy on a random subset of the labels of each task."""
    means = [float(values[_subset(len(values), count, seed)].mean()) for values in right.values()]
    return sum(means) / len(means)


def _subset(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def judged(rows: Sequence[Row]) -> list[Judged]:
    """How every judge ranks the merges of one run."""
    found = [ranking_of("functional score, all inputs", rows, [-row.divergence for row in rows])]
    if not all(math.isclose(row.divergence_few, row.divergence, rel_tol=1e-9) for row in rows):  # there are no more
        few = [-row.divergence_few for row in rows]
        found.append(ranking_of(f"functional score, {INPUTS} inputs", rows, few))
    for name in MAPS:
        own = [row for row in rows if row.residual_map == name and not math.isnan(row.evidence)]
        if not own:  # λ = 1 or the evidence was not asked for
            continue
        found.append(ranking_of(f"evidence, {name}", own, [row.evidence for row in own]))
        found.append(ranking_of(f"functional score, the same {name}", own, [-row.divergence for row in own]))
    for count in LABELS:
        name = f"accuracy on {count} labels"
        each = [ranking_of(name, rows, [row.few_labels[str(count)][draw] for row in rows]) for draw in range(SUBSETS)]
        keys = ("with_accuracy", "with_nll", "regret", "scaling_regret")
        found.append(Judged(name, len(rows), *(sum(getattr(one, key) for one in each) / SUBSETS for key in keys)))
    return found


class Scored(Protocol):
    """A merge whose test scores are known."""

    @property
    def name(self) -> str:
        """Of the design or rule."""

    @property
    def accuracy(self) -> float:
        """On test, mean over tasks."""

    @property
    def nll(self) -> float:
        """On test, nats."""


def ranking_of(judge: str, rows: Sequence[Scored], values: Sequence[float]) -> Judged:
    """How one judge ranks merges.

    Args:
        judge: Its name.
        rows: The merges.
        values: What it says of each, the higher the better.
    """
    said = torch.tensor(values, dtype=torch.float64)
    accuracy = torch.tensor([row.accuracy for row in rows], dtype=torch.float64)
    nll = torch.tensor([row.nll for row in rows], dtype=torch.float64)
    agreement = rank_agreement(said, accuracy).value, rank_agreement(said, -nll).value
    return Judged(judge, len(rows), *agreement, _regret(said, accuracy), _scaling_regret(rows, said, accuracy))


def _regret(said: Tensor, accuracy: Tensor) -> float:
    return 100 * float(accuracy.max() - accuracy[int(said.argmax())])


def _scaling_regret(rows: Sequence[Scored], said: Tensor, accuracy: Tensor) -> float:
    """Mean regret over designs and rules that are there at several λ, of which the judge chooses one."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.name, []).append(place)
    each = [_regret(said[some], accuracy[some]) for some in places.values() if len(some) > 1]
    return sum(each) / len(each) if each else math.nan


def report(runs: Mapping[Run, Sequence[Row]], machines: Sequence[str], command: str) -> str:
    """The page.

    Args:
        runs: Suite and training seed to the merges.
        machines: Where they were measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    body = [
        [suite, str(seed), one.judge, str(one.merges)]
        + [f"{one.with_accuracy:.2f}", f"{one.with_nll:.2f}", f"{one.regret:.1f}", _or_blank(one.scaling_regret)]
        for (suite, seed), rows in runs.items()
        for one in judged(rows)
    ]
    header = ["suite", "seed", "judge", "merges", "with accuracy", "with minus NLL", "regret", "regret of λ"]
    return "\n\n".join([
        "Which judge ranks merges as their test scores do? Designs of two residual maps (those of "
        "`benchmarks.evidence`) and rules of the literature, each at several λ. The functional score is the mean "
        "divergence from the own experts' predictions on validation inputs, without labels; evidence is that of a "
        "design, compared within one map at λ = 1, beside the functional score of the same merges; accuracies are on "
        f"few validation labels a task, means over {SUBSETS} random subsets. Made by `{command}` on "
        f"{' and '.join(dict.fromkeys(machines))}.",
        "Spearman's rank correlations over the merges, and the regret: the best test accuracy less that of the merge "
        "that the judge puts first, in points; *of λ*: where only λ is chosen, for each design and rule, in the mean. "
        "The merges are a grid, not a sample, and some are the same: with Gaussian experts and a relative anchor "
        "γ changes the evidence alone.",
        markdown_table(header, body, left=3),
    ]) + "\n"  # fmt: skip


def _or_blank(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.1f}"


def write_table(path: Path, runs: Mapping[Run, Sequence[Row]]) -> None:
    """Every merge as a row of a CSV."""
    keys = [key for key in Row.__dataclass_fields__ if key != "few_labels"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["suite", "seed", *keys, *(f"accuracy on {count} labels" for count in LABELS)])
        for (suite, seed), rows in runs.items():
            for row in rows:
                few = [sum(row.few_labels[str(count)]) / SUBSETS for count in LABELS]
                writer.writerow([suite, seed, *(getattr(row, key) for key in keys), *few])


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "ranking", "subsets and samples", (0,))
    parser.add_argument("--scalings", type=float, nargs="+", default=list(SCALINGS), help="each λ")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="importance samples of the evidence; 0 for none")
    parser.add_argument("--evidence", type=Path, default=Path("out/evidence"), help="where `benchmarks.evidence` keeps")
    parser.add_argument("--validation", type=int, default=None, help="most validation examples of a task")
    parser.add_argument("--test", type=int, default=None, help="most test examples of a task")
    arguments = parser.parse_args()
    limits = arguments.validation, arguments.test
    torch.set_num_threads(1)  # see `parallel`
    console, runs, machines = Console(), {}, []
    for name in arguments.suites:
        for seed in arguments.seeds:
            suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)
            suite = suite.limited(*limits)
            settings = key_of(suite.key, limits, LABELS, SUBSETS, INPUTS)
            folder = arguments.kept / f"{name}-{seed}-{settings}"

            def tell(text: str, name: str = name, seed: int = seed) -> None:
                console.print(f"{name}, seed {seed}: {text}", highlight=False)

            def measured(suite: Suite = suite) -> str:
                return machine(suite.device)

            evidences = (
                Evidences(suite, seed, arguments.samples, arguments.evidence, tell) if arguments.samples else None
            )
            runs[name, seed] = rows_of(suite, seed, folder, arguments.scalings, evidences, tell)
            machines.append(kept(folder / "machine.json", measured))
    command = command_line("benchmarks.ranking", parser, arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = report(runs, machines, command)
    arguments.out.write_text(text, encoding="utf-8")
    write_table(arguments.out.with_suffix(".csv"), runs)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
