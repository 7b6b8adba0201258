"""Does the evidence of a design, which needs no labels, rank designs as their held-out accuracy does?

`python -m benchmarks.evidence` takes designs that differ in energy, scale and anchor precision, under two residual
maps; merges the experts of each suite and training seed by the MAP of each (λ = 1) and compares. Evidence and MAP are
in Full coordinates. Keeps every evidence on its own under `out/evidence`, so that an interrupted run goes on, and
writes `benchmarks/results/evidence.md` and a CSV.

Evidences of one residual map are densities of the same numbers. OutputGram and InputGram see other directions of an
update unless it has full rank on both sides, so that they are ranked apart.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from benchmarks.folders import kept, key_of, write_page
from benchmarks.harness.evaluate import Scores, evaluate, mean_scores
from benchmarks.harness.methods import Method, solve
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, load, recipe_of, suite_parser
from diagnostics.estimates import Estimate
from diagnostics.predictions.agreement import rank_agreement
from inference.evidence.designs import compare_designs
from inference.map import fixed_point
from poe_models import (
    Anchor,
    Balanced,
    Cauchy,
    Energy,
    Gaussian,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
    StudentT,
    TaskVectors,
)
from poe_models.methods import About, MergingMethod, ModuleBatch

MAPS: dict[str, ResidualMap] = {"InputGram": InputGram(), "OutputGram": OutputGram()}
ENERGIES: dict[str, Energy] = {
    "Gaussian": Gaussian(),
    "Student-t(10)": StudentT(10.0, exponent="multivariate"),
    "Cauchy": Cauchy(exponent="multivariate"),
}
GAMMAS = (0.3, 1.0)
ETAS = (0.1, 1.0, 10.0)
SAMPLES = 200
Run = tuple[str, int]
"""Suite and training seed."""


@dataclass(frozen=True)
class DesignMap(MergingMethod):
    """The MAP of a design as a merging rule, for the demo's table of treatments.

    Args:
        poe: The design.
    """

    about: ClassVar[About] = About("the MAP of a design", "this benchmark")
    poe: ProductOfExperts

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        return fixed_point(self.poe.bind(batch.updates)).value


@dataclass(frozen=True, eq=False)
class Candidate:
    """A design and how good it turned out to be.

    Args:
        residual_map: Name of its map; evidences compare within one.
        name: Of its other settings.
        evidence: In nats, summed over modules.
        error: Its standard error.
        scores: Mean test scores of the MAP.
    """

    residual_map: str
    name: str
    evidence: float
    error: float
    scores: Scores


def designs(
    names: tuple[str, ...], residual_map: ResidualMap, gammas: Sequence[float] | None = None
) -> dict[str, ProductOfExperts]:
    """Every design with a residual map, by the name of its other settings.

    Args:
        names: Of the task vectors.
        residual_map: The map.
        gammas: Of the scales; `GAMMAS` by default.
    """
    found = {}
    for (name, energy), gamma, eta in itertools.product(ENERGIES.items(), gammas or GAMMAS, ETAS):
        anchor = Anchor(precision=RelativePrecision(eta))
        poe = ProductOfExperts.of(names, residual_map, energy, Balanced(gamma), anchor=anchor)
        found[f"{name}, γ = {gamma:g}, η = {eta:g}"] = poe
    return found


def merged_state(poe: ProductOfExperts, vectors: TaskVectors) -> dict[str, Tensor]:
    """State dict of the MAP of a design, in Full coordinates."""
    return solve(Method("MAP", "MAP", DesignMap(poe)), vectors, 0.0).state(1.0)


@dataclass(frozen=True)
class Known:
    """Log evidence of a design on a suite.

    Args:
        total: In nats, summed over modules.
        error: Its standard error.
        machine: Where it was computed, in words.
    """

    total: float
    error: float
    machine: str


@dataclass(frozen=True)
class Evidences:
    """Evidences of one suite and training seed, each computed once and kept in a file of its own.

    Args:
        suite: Whose experts.
        seed: Of the importance samples.
        samples: How many per module.
        folder: Where evidences of all suites are kept.
        tell: Called with a line of text before each.
    """

    suite: Suite
    seed: int
    samples: int
    folder: Path
    tell: Callable[[str], None]

    def of(self, map_name: str, name: str, poe: ProductOfExperts) -> Known:
        """Of a design with the name of its map and of its other settings, which tell it from the others."""

        def make() -> dict[str, object]:
            self.tell(f"evidence of {map_name}, {name}")
            vectors = self.suite.vectors(torch.float64)
            generator = torch.Generator(self.suite.device).manual_seed(self.seed)
            (row,) = compare_designs({name: poe}, vectors, generator=generator, samples=self.samples).rows
            return asdict(Known(row.evidence.total, row.evidence.total_error, machine(self.suite.device)))

        settings = key_of(self.suite.key, self.seed, map_name, name, self.samples)
        return Known(**kept(self.folder / f"{settings}.json", make))


def candidates(evidences: Evidences, map_name: str, gammas: Sequence[float] | None = None) -> list[Candidate]:
    """Evidence and test scores of every design with one residual map, the best evidence first.

    Args:
        evidences: Of the designs, computed or kept.
        map_name: Which of `MAPS`.
        gammas: Of the scales; `GAMMAS` by default.
    """
    vectors = evidences.suite.vectors()
    found = []
    for name, poe in designs(vectors.names, MAPS[map_name], gammas).items():
        known = evidences.of(map_name, name, poe)
        evidences.tell(f"scores of {map_name}, {name}")
        scores = mean_scores(evaluate(evidences.suite, merged_state(poe, vectors), "test"))
        found.append(Candidate(map_name, name, known.total, known.error, scores))
    return sorted(found, key=lambda each: each.evidence, reverse=True)


def maps_of(found: Sequence[Candidate]) -> list[str]:
    """Names of the residual maps, in order of appearance."""
    return list(dict.fromkeys(each.residual_map for each in found))


def agreements(found: Sequence[Candidate]) -> Mapping[tuple[str, str], Estimate]:
    """Spearman's correlation of evidence with accuracy and with minus NLL, within each map."""
    return {
        (score, name): rank_agreement(
            torch.tensor([each.evidence for each in found if each.residual_map == name]),
            torch.tensor([sign * getattr(each.scores, score) for each in found if each.residual_map == name]),
        )
        for score, sign in (("accuracy", 1), ("nll", -1))
        for name in maps_of(found)
    }


def chosen_and_best(found: Sequence[Candidate], name: str) -> tuple[Candidate, Candidate]:
    """The design of a map with the highest evidence, and the one with the highest accuracy."""
    own = [each for each in found if each.residual_map == name]
    return max(own, key=lambda each: each.evidence), max(own, key=lambda each: each.scores.accuracy)


def report(
    runs: Mapping[Run, Sequence[Candidate]], machine: str, command: str, gammas: Sequence[float] | None = None
) -> str:
    """The page.

    Args:
        runs: Suite and training seed to the designs.
        machine: Where it was measured, in words.
        command: What made it.
        gammas: Of the scales; `GAMMAS` by default.

    Returns:
        Markdown.
    """
    body = []
    for (suite, seed), found in runs.items():
        for name in maps_of(found):
            chosen, best = chosen_and_best(found, name)
            ranks = [str(agreements(found)[score, name]) for score in ("accuracy", "nll")]
            chosen_cells = (chosen.name, f"{chosen.scores.accuracy:.3f}", f"{chosen.scores.nll:.3f}")
            body.append([suite, str(seed), name, *ranks, *chosen_cells, best.name, f"{best.scores.accuracy:.3f}"])
    header = ["suite", "seed", "map", "with accuracy", "with minus NLL", "highest evidence", "its accuracy", "its NLL"]
    return "\n\n".join([
        f"Does log evidence rank designs as the test scores of their MAP (λ = 1) do? {len(ENERGIES)} energies x scales "
        f"Balanced({' and '.join(f'{gamma:g}' for gamma in gammas or GAMMAS)}) x relative anchor precisions "
        f"{', '.join(f'{eta:g}' for eta in ETAS)}; T = 1, normalised (multivariate) Student-t and Cauchy experts; "
        f"evidence and MAP in Full coordinates. Made by `{command}` on {machine}. Every design is in the CSV.",
        "Spearman's rank correlations over the designs of one map (95 % interval as if they were drawn at random; "
        "these are a grid), the design with the highest evidence, and the most accurate. Evidences of different maps "
        "are densities of different numbers.",
        markdown_table([*header, "most accurate", "its accuracy"], body, left=3),
    ]) + "\n"  # fmt: skip


def write_table(path: Path, runs: Mapping[Run, Sequence[Candidate]]) -> None:
    """Every design as a row of a CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("suite", "seed", "map", "design", "log_evidence", "standard_error", "accuracy", "nll"))
        for run, found in runs.items():
            for each in found:
                numbers = (each.evidence, each.error, each.scores.accuracy, each.scores.nll)
                writer.writerow((*run, each.residual_map, each.name, *(f"{number:.8g}" for number in numbers)))


def measured(run: Run, arguments: argparse.Namespace, console: Console) -> list[Candidate]:
    """Designs of one suite and training seed, map by map, from what is kept if it is there.

    Args:
        run: Suite and training seed.
        arguments: Of the command.
        console: Where progress is shown.

    Returns:
        The designs, the best evidence of each map first.
    """
    name, seed = run
    suite = load(name, recipe_of(name, seed, arguments.full), arguments.cache, console, arguments.device)
    settings = key_of(suite.key, seed, arguments.maps, list(ENERGIES), arguments.gammas, ETAS, arguments.samples)

    def tell(text: str) -> None:
        console.print(f"{name}, seed {seed}: {text}", highlight=False)

    def make() -> dict[str, object]:
        evidences = Evidences(suite, seed, arguments.samples, arguments.kept, tell)
        found = [
            asdict(each) for map_name in arguments.maps for each in candidates(evidences, map_name, arguments.gammas)
        ]
        return {"machine": machine(suite.device), "designs": found}

    saved = kept(arguments.kept / f"{name}-{seed}-{settings}.json", make)
    arguments.machines.append(saved["machine"])
    return [Candidate(**{**each, "scores": Scores(**each["scores"])}) for each in saved["designs"]]


def main() -> None:
    """Compare and write."""
    parser = suite_parser(__doc__, "evidence", "and of the samples")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="importance samples per module and design")
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS), help="of the scales")
    parser.add_argument(
        "--maps", nargs="+", choices=list(MAPS), default=list(MAPS), help="residual maps of the designs"
    )
    arguments = parser.parse_args()
    arguments.machines = []
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    runs = {
        (name, seed): measured((name, seed), arguments, console)
        for name in arguments.suites
        for seed in arguments.seeds
    }
    command = command_line("benchmarks.evidence", parser, arguments)
    text = report(runs, " and ".join(dict.fromkeys(arguments.machines)), command, arguments.gammas)
    write_page(arguments.out, text)
    write_table(arguments.out.with_suffix(".csv"), runs)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
