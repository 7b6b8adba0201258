"""Effective samples per CPU second of Gibbs, slice sampling and Pyro's NUTS on one posterior of the vision suite.

`python -m benchmarks.sampling` takes the Span posterior of all matrices of the suite's SqueezeNet, draws from it with
each sampler, and writes `benchmarks/results/sampling.md`. A sampler's figure is its smallest bulk effective sample size
over all coefficients, over its CPU seconds, warmup included. A ratio is given only for samplers that mixed, with
rank-normalised split R-hat below 1.01 for every coefficient (Vehtari et al., 2021, Bayesian Analysis 16(2)).
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.folders import write_page
from benchmarks.vision.train import make_suite
from diagnostics.arviz_adapter import chain_summary
from inference.draws import Draws
from inference.gibbs import gibbs
from inference.nuts import nuts
from inference.slice import slice_sample
from poe_models import Balanced, Cauchy, InputGram, Posterior, ProductOfExperts, TaskVectors
from poe_models.span import SpanStatistics, concatenate, span_statistics

MIXED = 1.01
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Sampler:
    """One way to draw.

    Args:
        name: row of the table.
        setting: what it was given, in words.
        draw: maps a posterior and a generator to draws.
    """

    name: str
    setting: str
    draw: Callable[[Posterior, torch.Generator], Draws]


@dataclass(frozen=True)
class Figure:
    """How one sampler did: CPU seconds, smallest bulk ESS and largest R-hat over coefficients, divergences."""

    seconds: float
    smallest_ess: float
    largest_rhat: float
    divergences: int

    @property
    def mixed(self) -> bool:
        """Whether every coefficient's R-hat is below the bound."""
        return self.largest_rhat < MIXED

    @property
    def rate(self) -> float:
        """Effective samples per CPU second."""
        return self.smallest_ess / self.seconds


def samplers(nuts_draws: int) -> list[Sampler]:
    """The three samplers, NUTS with a given number of draws per chain."""
    return [
        Sampler(
            "Gibbs",
            "8 chains, 200 + 2000 steps",
            lambda p, g: gibbs(p, 2000, generator=g, chains=8, warmup=200),
        ),
        Sampler(
            "elliptical slices",
            "32 chains, 200 + 500 steps",
            lambda p, g: slice_sample(p, 500, generator=g, chains=32, warmup=200),
        ),
        Sampler(
            "Pyro NUTS",
            f"4 chains, 500 + {nuts_draws} steps",
            lambda p, g: nuts(p, nuts_draws, generator=g, chains=4, warmup=500),
        ),
    ]


def span_of_suite(vectors: TaskVectors, poe: ProductOfExperts) -> SpanStatistics:
    """Statistics of every matrix of the suite."""
    return concatenate([span_statistics(poe, module.updates, [module.name]) for module in vectors])


def measure(sampler: Sampler, posterior: Posterior, seed: int) -> Figure:
    """Run one sampler and judge all coefficients on the experts' updates."""
    started = time.process_time()
    draws = sampler.draw(posterior, torch.Generator().manual_seed(seed))
    seconds = time.process_time() - started
    # The last coefficient is the zero centre's, which moves nothing.
    coefficients = posterior.coefficients(draws.values)[..., :-1].flatten(2)
    found = chain_summary(coefficients.numpy())
    diverging = draws.stats.get("diverging", torch.zeros(1))
    return Figure(
        seconds,
        float(found.ess_bulk.min()),
        float(found.r_hat.max()),
        int(diverging.sum()),
    )


def table(figures: dict[str, Figure], chosen: list[Sampler]) -> str:
    """The figures as a table, ratios to NUTS only between samplers that mixed."""
    lines = [
        "| sampler | setting | CPU s | smallest ESS | ESS / CPU s | largest R-hat | divergences | times NUTS |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    reference = figures["Pyro NUTS"]
    for sampler in chosen:
        figure = figures[sampler.name]
        ratio = f"{figure.rate / reference.rate:.0f}" if figure.mixed and reference.mixed else "-"
        rate = f"{figure.rate:.2f}" if figure.mixed else "did not mix"
        lines.append(
            f"| {sampler.name} | {sampler.setting} | {figure.seconds:.0f} | {figure.smallest_ess:.0f} | {rate} | "
            f"{figure.largest_rhat:.3f} | {figure.divergences} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.md"))
    parser.add_argument("--nuts-draws", type=int, default=1000, help="draws per NUTS chain")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    suite = make_suite(console=console)
    vectors = suite.vectors()
    poe = ProductOfExperts.of(vectors.names, InputGram(), Cauchy(), Balanced(1.0), temperature=TEMPERATURE)
    statistics = span_of_suite(vectors, poe)
    posterior = poe.bind(statistics)
    chosen = samplers(arguments.nuts_draws)
    figures = {}
    for sampler in chosen:
        console.print(f"{sampler.name}: {sampler.setting}")
        figures[sampler.name] = measure(sampler, posterior, arguments.seed)
    coordinates = len(statistics.modules) * len(vectors.names)
    title = (
        f"Cauchy experts, InputGram, Balanced(1.0), relative η = 0.1, T = {TEMPERATURE}: the Span posterior of all "
        f"{len(statistics.modules)} matrices of the vision suite's SqueezeNet, {coordinates} coefficients; one thread, "
        f"{platform.machine()} CPU. Made by `python -m benchmarks.sampling --nuts-draws {arguments.nuts_draws}`.\n"
    )
    write_page(arguments.out, "\n".join([title, table(figures, chosen), ""]))
    console.print(arguments.out.read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
