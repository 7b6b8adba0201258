"""Does sampling calibrate a merge better than dividing its logits? Over training seeds, and seeds of draws in each.

`python -m benchmarks.calibration` merges the experts of each suite and training seed (`InputGram`, Cauchy, λ chosen
on validation) and draws ensembles of the last layer around the merge with several seeds: exact Gibbs draws, Laplace's
approximation, the Gaussian twin, and white noise as the control, as far from the merge as Gibbs draws at the same
temperature. Each has the temperature that validation NLL chooses, as it is and together with a number that divides the
members' logits; the MAP is shown as it is and with its logits so divided. Keeps test predictions under
`out/calibration`, tables where `benchmarks.runs` keeps plain data, and writes `benchmarks/results/calibration.md` and a
CSV beside it.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from benchmarks.folders import key_of, write_page
from benchmarks.harness.demo import save_merge
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import evaluate, mean_scores
from benchmarks.harness.methods import METHODS, Loaded, solve
from benchmarks.harness.outcomes import KINDS, LAST, MAP, SCALED, SCALED_MAP, Budget
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import interval, markdown_table, signed
from benchmarks.harness.search import Settings
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, load, recipe_of, suite_parser
from diagnostics.estimates import Estimate
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods
from poe_models.weights.saving import save_file

METHOD = next(method for method in METHODS if method.name == "InputGram, Cauchy")
ETA = 0.1
SCALINGS = (0.6, 1.0, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True, eq=False)
class Run:
    """Test predictions around one merge with one seed of draws.

    Args:
        predictions: Way to predict -> task -> probabilities (n, classes); the MAP comes first.
        facts: λ, the machine, the lowest temperature that was tried, and the temperature and logit temperature of each
            way, as plain data.
        labels: Task -> (n,).
    """

    predictions: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]
    labels: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        tables = {f"{way}|{task}": table for way, by in self.predictions.items() for task, table in by.items()}
        labels = {f"labels|{task}": each for task, each in self.labels.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        order = {"ways": list(self.predictions), "tasks": list(self.labels)}
        metadata = {"facts": json.dumps(dict(self.facts)), "order": json.dumps(order)}
        save_file(tables | labels, part, metadata=metadata)
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            order, facts = (json.loads(file.metadata()[key]) for key in ("order", "facts"))
            ways, tasks = order["ways"], order["tasks"]
            tables = {way: {task: file.get_tensor(f"{way}|{task}") for task in tasks} for way in ways}
            return cls(tables, facts, {task: file.get_tensor(f"labels|{task}") for task in tasks})


def runs(suite: Suite, seeds: Sequence[int], budget: Budget) -> Iterator[Run]:
    """Merge, and draw ensembles around the merge.

    Args:
        suite: Tasks, heads and experts.
        seeds: Of draws.
        budget: How much is drawn.

    Yields:
        A run for each seed of draws.
    """
    merge = solve(METHOD, Loaded(suite.vectors()), ETA)
    accuracies = {
        scaling: mean_scores(evaluate(suite, merge.state(scaling), "validation")).accuracy for scaling in SCALINGS
    }
    scaling = max(accuracies, key=accuracies.__getitem__)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        design = save_merge(METHOD, Settings(scaling, ETA), suite, merged)
        for seed in seeds:
            ensembles = Ensembles(suite, design, merged, seed, budget)
            outcomes = ensembles.compare(lambda done, total: None)
            found = {each.name: each.probabilities for each in outcomes}
            heat = {each.name: (each.temperature, each.logit_temperature) for each in outcomes}
            facts = {"λ": scaling, "machine": machine(suite.device), "members": budget.members, "temperatures": heat}
            yield Run(found, facts | {"coldest": ensembles.temperatures(LAST)[0]}, suite.labels("test"))


def compared(runs: Sequence[Sequence[Run]]) -> Comparison:
    """All ways to predict: means over training seeds and draws.

    Args:
        runs: Those of every training seed, in the order of the seeds of draws.
    """
    first = runs[0][0]

    def of_draw(number: int) -> Comparison:
        tables = {
            way: {task: [each[number].predictions[way][task] for each in runs] for task in first.labels}
            for way in first.predictions
        }
        return compare_methods(tables, first.labels, seed=0)

    return over_draws([of_draw(number) for number in range(len(runs[0]))])


def over_draws(found: Sequence[Comparison]) -> Comparison:
    """The mean over seeds of draws, which are resampled, too.

    Args:
        found: One for each seed of draws, of the same resamples of everything else.
    """
    first, several = found[0], len(found)
    picks = torch.randint(several, (len(first.replicates["nll"]), several), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(len(picks)).unsqueeze(1)
    return replace(
        first,
        values={score: torch.stack([each.values[score] for each in found]).mean(0) for score in SCORES},
        replicates={
            score: torch.stack([each.replicates[score] for each in found], 1)[rows, picks].mean(1) for score in SCORES
        },
    )


Gaps = Mapping[str, Mapping[tuple[str, str], Estimate]]
"""Score -> pair of ways -> difference, with intervals that hold for all pairs of the score."""
BASES = (("accuracy", MAP), ("nll", SCALED_MAP), ("ece", SCALED_MAP))
"""Scores, and the way that the others are held against."""


def gaps_of(found: Comparison) -> Gaps:
    """Every way less the one it is held against."""
    return {score: found.differences([(w, base) for w in found.methods if w != base], score) for score, base in BASES}


def table(runs: Sequence[Sequence[Run]], found: Comparison, gaps: Gaps) -> str:
    """Scores of every way, its differences, and what was chosen for it."""
    header = ["members", "accuracy", "minus MAP", "NLL", "minus MAP, scaled", "ECE", "minus MAP, scaled", "T"]
    header += ["the MAP again", "NLL over draws"]
    body = []
    for way in found.methods:
        cells = [way]
        for score, base in BASES:
            gap = "" if way == base else signed(gaps[score][way, base])
            cells += [interval(found.mean(way, score)), gap]
        body.append([*cells, *heat(runs, way), spread(runs, way)])
    return markdown_table(header, body)


def heat(runs: Sequence[Sequence[Run]], way: str) -> tuple[str, str]:
    """Least and largest temperature that was chosen, and how often it was the lowest, where members are the MAP."""
    every = [each.facts for by_draw in runs for each in by_draw]
    chosen = [facts["temperatures"][way][0] for facts in every]
    if None in chosen:
        return "", ""
    lowest = sum(heat <= facts["coldest"] * (1 + 1e-9) for heat, facts in zip(chosen, every, strict=True))
    return f"{min(chosen):.1e} to {max(chosen):.1e}", f"{lowest} of {len(chosen)}"


def spread(runs: Sequence[Sequence[Run]], way: str) -> str:
    """Least and largest NLL of one way over seeds of draws, each the mean over training seeds and tasks."""
    if way in (MAP, SCALED_MAP):
        return ""
    means = []
    for number in range(len(runs[0])):
        rows = [
            each[number].predictions[way][task].gather(1, labels.unsqueeze(1)).log().neg().mean()
            for each in runs
            for task, labels in each[number].labels.items()
        ]
        means.append(float(torch.stack(rows).mean()))
    return f"{min(means):.3f} to {max(means):.3f}"


def verdict(found: Comparison, gaps: Gaps) -> str:
    """What the intervals say about every kind of ensemble, and what is doubtful about them."""
    parts = []
    for way in (way for kind in KINDS for way in (kind, kind + SCALED) if way in found.methods):
        gap = gaps["nll"][way, SCALED_MAP]
        words = "lower" if gap.high < 0 else "higher" if gap.low > 0 else "not told apart"
        parts.append(f"{way}: {words} ({signed(gap)})")
    return " ".join([f"NLL against the MAP with scaled logits: {'; '.join(parts)}.", *found.warnings])


def page(found: Mapping[str, Sequence[Sequence[Run]]], seeds: Sequence[int], draws: Sequence[int], command: str) -> str:
    """The page as Markdown.

    Args:
        found: Suite to its runs by training seed and seed of draws.
        seeds: Of training.
        draws: Of the draws.
        command: What made it.
    """
    first = next(iter(found.values()))[0][0]
    machines = " and ".join(dict.fromkeys(str(x.facts["machine"]) for a in found.values() for b in a for x in b))
    parts = [
        f"Ensembles of the last layer around {METHOD.name} (λ chosen on validation, η = {ETA:g}) beside the MAP: "
        f"{first.facts['members']} members each, at the temperature that validation NLL chooses. Training seeds "
        f"{', '.join(map(str, seeds))}, in each the seeds of draws {', '.join(map(str, draws))}. Made by `{command}` "
        f"on {machines}.",
        "*Scaled*: all logits divided by one number that minimises validation NLL, of an ensemble chosen together with "
        "its temperature. Means over tasks, training seeds and seeds of draws; NLL in nats, ECE in 20 bins. Brackets "
        "are 95 % bootstrap intervals over test examples, training seeds and seeds of draws, of differences paired and "
        "for all rows of a column together. *T*: least and largest of the temperatures chosen. *The MAP again*: how "
        "often that was the lowest tried, at which members are the MAP. *NLL over draws*: least and largest mean over "
        "seeds of draws.",
    ]
    for suite, runs in found.items():
        scalings = ", ".join(f"{by_draw[0].facts['λ']:g}" for by_draw in runs)
        sizes = ", ".join(f"{task} ({len(labels)})" for task, labels in runs[0][0].labels.items())
        comparison = compared(runs)
        gaps = gaps_of(comparison)
        parts += [f"## {suite}", f"Test examples: {sizes}. λ by training seed: {scalings}."]
        parts += [table(runs, comparison, gaps), verdict(comparison, gaps)]
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, found: Mapping[str, Sequence[Sequence[Run]]]) -> None:
    """One line for each suite, way to predict, task and score: value and interval."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("suite", "members", "task", "score", "value", "low", "high"))
        for suite, runs in found.items():
            each = compared(runs)
            for way in each.methods:
                for task in each.tasks:
                    for score in SCORES:
                        value = each.on_task(way, task, score)
                        numbers = (f"{number:.6g}" for number in (value.value, value.low, value.high))
                        writer.writerow((suite, way, task, score, *numbers))


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "calibration", "of the experts")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of draws")
    parser.add_argument("--members", type=int, default=10, help="of every ensemble")
    parser.add_argument("--validation", type=int, default=None, help="most validation examples of a task")
    parser.add_argument("--test", type=int, default=None, help="most test examples of a task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    warnings.filterwarnings("ignore", message=".*standard deviations of the draws from the merge", category=UserWarning)
    console, budget = Console(), Budget(members=arguments.members, everywhere=())
    found: dict[str, list[list[Run]]] = {}
    for name in arguments.suites:
        found[name] = []
        for seed in arguments.seeds:
            suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)
            suite = suite.limited(arguments.validation, arguments.test)
            key = key_of(suite.key, arguments.validation, arguments.test, METHOD.name, SCALINGS, ETA, asdict(budget))
            files = {draw: arguments.kept / f"{name}-{seed}-{draw}-{key}.safetensors" for draw in arguments.draws}
            missing = [draw for draw, file in files.items() if not file.exists()]
            if missing:
                for draw, each in zip(missing, runs(suite, missing, budget), strict=True):
                    each.save(files[draw])
                    console.print(f"{name}, training seed {seed}, draws {draw}: done", highlight=False)
            found[name].append([Run.read(file) for file in files.values()])
    text = page(found, arguments.seeds, arguments.draws, command_line("benchmarks.calibration", parser, arguments))
    write_page(arguments.out, text)
    write_csv(arguments.out.with_suffix(".csv"), found)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
