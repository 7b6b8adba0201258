"""Does the evidence of a design, which needs no labels, rank designs as their held-out accuracy does?

`python -m benchmarks.evidence` takes designs that differ in energy, scale and anchor precision, under two
residual maps; merges the vision suite's experts by the MAP of each (λ = 1) and compares. Evidence and MAP are in Full
coordinates. Writes `benchmarks/results/evidence.md`.

Evidences of one residual map are densities of the same numbers. OutputGram and InputGram see other directions of an
update unless it has full rank on both sides, so that they are ranked apart.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from benchmarks.harness.evaluate import Scores, evaluate, mean_scores
from benchmarks.harness.methods import Method, solve
from benchmarks.harness.rule_report import machine, markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.vision.train import make_suite
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


def designs(names: tuple[str, ...], residual_map: ResidualMap) -> dict[str, ProductOfExperts]:
    """Every design with a residual map, by the name of its other settings.

    Args:
        names: Of the task vectors.
        residual_map: The map.
    """
    found = {}
    for (name, energy), gamma, eta in itertools.product(ENERGIES.items(), GAMMAS, ETAS):
        anchor = Anchor(precision=RelativePrecision(eta))
        poe = ProductOfExperts.of(names, residual_map, energy, Balanced(gamma), anchor=anchor)
        found[f"{name}, γ = {gamma:g}, η = {eta:g}"] = poe
    return found


def merged_state(poe: ProductOfExperts, vectors: TaskVectors) -> dict[str, Tensor]:
    """State dict of the MAP of a design, in Full coordinates."""
    return solve(Method("MAP", "MAP", DesignMap(poe)), vectors, 0.0).state(1.0)


def candidates(suite: Suite, seed: int, samples: int, progress: Callable[[str], None]) -> list[Candidate]:
    """Evidence and test scores of every design, the best evidence of each map first.

    Args:
        suite: What to merge and to judge by.
        seed: Of the importance samples.
        samples: How many.
        progress: Called with the name of each design before it is judged.

    Returns:
        All designs, map by map.
    """
    vectors = suite.vectors()
    exact = suite.vectors(torch.float64)
    found = []
    for map_name, residual_map in MAPS.items():
        progress(f"evidence of all designs with {map_name}")
        poes = designs(vectors.names, residual_map)
        generator = torch.Generator().manual_seed(seed)
        for row in compare_designs(poes, exact, generator=generator, samples=samples).rows:
            progress(f"{map_name}, {row.name}")
            state = merged_state(poes[row.name], vectors)
            scores = mean_scores(evaluate(suite, state, "test"))
            found.append(Candidate(map_name, row.name, row.evidence.total, row.evidence.total_error, scores))
    return found


def agreements(found: list[Candidate]) -> Mapping[tuple[str, str], Estimate]:
    """Spearman's correlation of evidence with accuracy and with minus NLL, within each map."""
    return {
        (score, name): rank_agreement(
            torch.tensor([each.evidence for each in found if each.residual_map == name]),
            torch.tensor([sign * getattr(each.scores, score) for each in found if each.residual_map == name]),
        )
        for score, sign in (("accuracy", 1), ("nll", -1))
        for name in MAPS
    }


def report(found: list[Candidate], tasks: list[str], command: str, seconds: float) -> str:
    """The page."""
    best = {name: max(each.evidence for each in found if each.residual_map == name) for name in MAPS}
    body = [
        [
            each.residual_map,
            each.name,
            f"{each.evidence - best[each.residual_map]:.0f} ± {each.error:.1f}",
            f"{each.scores.accuracy:.3f}",
            f"{each.scores.nll:.3f}",
        ]
        for each in found
    ]
    rows = [[score, name, str(each)] for (score, name), each in agreements(found).items()]
    return "\n\n".join([
        f"Log evidence of designs and test scores of their MAP (λ = 1), both in Full coordinates, on the vision suite "
        f"({', '.join(tasks)}). Balanced scales, relative anchor precisions, T = 1, normalised (multivariate) "
        f"Student-t and Cauchy experts. Made by `{command}` in {seconds:.0f} seconds on {machine()}.",
        "Evidence in nats below the best of the same map, with the standard error of importance sampling (0 for "
        "Gaussian designs, which are exact). Evidences of different maps are densities of different numbers.",
        markdown_table(["map", "design", "log evidence", "accuracy", "NLL"], body, left=2),
        "Spearman's rank correlation of the evidence with the accuracy, and with minus the NLL (95 % interval over "
        "designs as if they were drawn at random; these are a grid):",
        markdown_table(["score", "designs", "correlation"], rows, left=2),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence.md"))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="importance samples per module and design")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    suite = make_suite(cache=arguments.cache, console=console)
    started = time.perf_counter()
    found = candidates(suite, arguments.seed, arguments.samples, lambda name: console.print(name, highlight=False))
    command = f"python -m benchmarks.evidence --samples {arguments.samples} --seed {arguments.seed}"
    text = report(found, list(suite.tasks), command, time.perf_counter() - started)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
