"""Does the evidence of a design, which needs no labels, rank designs as their held-out accuracy does?

`python -m benchmarks.vision.evidence` takes designs that differ in residual map, energy, scale and anchor precision,
all in Span coordinates, where their evidences are densities of the same numbers; merges the vision suite's experts by
the MAP of each (λ = 1) and compares. Writes `benchmarks/results/evidence.md`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.vision.evaluate import Scores, evaluate, mean_scores
from benchmarks.vision.methods import Method, solve
from benchmarks.vision.rule_report import machine, markdown_table
from benchmarks.vision.train import Suite, make_suite
from diagnostics.agreement import rank_agreement
from diagnostics.estimates import Estimate
from inference.evidence import compare_designs, with_restricted_exponents
from inference.fixed_point import solve_posterior
from inference.statistics_files import collect_statistics
from poe_models import (
    Anchor,
    Cauchy,
    Energy,
    Gaussian,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    TaskVectors,
    span_posterior,
)
from poe_models.anchors import AdaMerging
from poe_models.posterior import Posterior
from poe_models.span import SpanCoordinates

MAPS: dict[str, ResidualMap] = {"InputGram": InputGram(), "OutputGram": OutputGram()}
ENERGIES: dict[str, Energy] = {"Gaussian": Gaussian(), "Cauchy": Cauchy(exponent="multivariate")}
GAMMAS = (0.3, 1.0)
ETAS = (0.1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A design and how good it turned out to be.

    Args:
        name: Of the design.
        evidence: In nats, summed over modules; by annealed importance sampling.
        error: Its standard error.
        laplace: By Laplace's approximation.
        scores: Mean test scores of the MAP.
    """

    name: str
    evidence: float
    error: float
    laplace: float
    scores: Scores


def posteriors(vectors: TaskVectors) -> dict[str, tuple[Posterior, SpanCoordinates]]:
    """Every design bound to the suite's updates, by name."""
    found = {}
    for map_name, residual_map in MAPS.items():
        statistics = collect_statistics(vectors, ProductOfExperts.of(vectors.names, residual_map))
        for (energy_name, energy), gamma, eta in itertools.product(ENERGIES.items(), GAMMAS, ETAS):
            anchor = Anchor(precision=RelativePrecision(eta))
            poe = ProductOfExperts.of(vectors.names, residual_map, energy, Relative(gamma), anchor=anchor)
            posterior, coordinates = span_posterior(poe, statistics)
            name = f"{map_name}, {energy_name}, γ = {gamma:g}, η = {eta:g}"
            found[name] = (with_restricted_exponents(poe, posterior), coordinates)
    return found


def merged_state(posterior: Posterior, coordinates: SpanCoordinates, vectors: TaskVectors) -> dict[str, Tensor]:
    """State dict of a MAP: the updates of every module by the coefficients found."""
    coefficients = coordinates.coefficients(solve_posterior(posterior).value)[:, :-1]  # the last is the zero centre's
    names = [module.name for module in vectors]
    found = tuple((name, tuple(row)) for name, row in zip(names, coefficients.tolist(), strict=True))
    return solve(Method("span", "span", AdaMerging(coefficients=found)), vectors, 0.0).state(1.0)


def candidates(suite: Suite, seed: int, particles: int, progress: Callable[[str], None]) -> list[Candidate]:
    """Evidence and test scores of every design, the best evidence first.

    Args:
        suite: What to merge and to judge by.
        seed: Of the annealed particles.
        particles: How many.
        progress: Called with the name of each design before it is judged.

    Returns:
        All designs.
    """
    vectors = TaskVectors(suite.base, suite.experts)
    bound = posteriors(TaskVectors(suite.base, suite.experts, dtype=torch.float64))
    designs = {name: posterior for name, (posterior, _) in bound.items()}
    progress("evidence of all designs")
    rows = compare_designs(designs, generator=torch.Generator().manual_seed(seed), particles=particles).rows
    found = []
    for row in rows:
        progress(row.name)
        scores = mean_scores(evaluate(merged_state(*bound[row.name], vectors), suite.tasks, suite.heads, "test"))
        error = row.annealed.total_error
        assert error is not None
        found.append(Candidate(row.name, row.annealed.total, error, row.laplace.total, scores))
    return found


def agreements(found: list[Candidate]) -> Mapping[str, Estimate]:
    """Spearman's correlation of evidence with accuracy and with minus NLL: of all designs, and within each map."""
    groups = {"all designs": found}
    groups |= {name: [each for each in found if each.name.startswith(name)] for name in MAPS}
    return {
        f"{score}, {group}": rank_agreement(
            torch.tensor([each.evidence for each in members]),
            torch.tensor([sign * getattr(each.scores, score) for each in members]),
        )
        for score, sign in (("accuracy", 1), ("nll", -1))
        for group, members in groups.items()
    }


def report(found: list[Candidate], tasks: list[str], command: str, seconds: float) -> str:
    """The page."""
    best = found[0].evidence
    body = [
        [
            each.name,
            f"{each.evidence - best:.0f} ± {each.error:.1f}",
            f"{each.laplace - best:.0f}",
            f"{each.scores.accuracy:.3f}",
            f"{each.scores.nll:.3f}",
        ]
        for each in found
    ]
    rows = [
        [score, group, str(each)]
        for (score, group), each in ((key.split(", ", 1), value) for key, value in agreements(found).items())
    ]
    return "\n\n".join([
        f"Log evidence of designs and test scores of their MAP (λ = 1) in Span coordinates, on the vision suite "
        f"({', '.join(tasks)}). Relative scales and anchor precisions, T = 1, Cauchy experts normalised on the span. "
        f"Made by `{command}` in {seconds:.0f} seconds on {machine()}.",
        "Evidence in nats below the best, with the standard error of annealed importance sampling, and by Laplace's "
        "approximation.",
        markdown_table(["design", "log evidence", "Laplace", "accuracy", "NLL"], body),
        "Spearman's rank correlation of the evidence with the accuracy, and with minus the NLL (95 % interval over "
        "designs as if they were drawn at random; these are a grid):",
        markdown_table(["score", "designs", "correlation"], rows, left=2),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence.md"))
    parser.add_argument("--particles", type=int, default=256, help="of annealed importance sampling")
    parser.add_argument("--seed", type=int, default=0, help="of the particles")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    suite = make_suite(cache=arguments.cache, console=console)
    started = time.perf_counter()
    found = candidates(suite, arguments.seed, arguments.particles, lambda name: console.print(name, highlight=False))
    command = f"python -m benchmarks.vision.evidence --particles {arguments.particles} --seed {arguments.seed}"
    text = report(found, list(suite.tasks), command, time.perf_counter() - started)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
