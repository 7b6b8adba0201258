"""Do evidence and hierarchical scales find the truth that updates were drawn from?

`python -m benchmarks.evidence_recovery` draws updates from the model itself (Identity maps, `gamma = 1`, tails of
`nu` = 3, 10 and infinity) with 4, 64 and 1024 numbers each and writes `benchmarks/results/evidence_recovery.md`: which
family and scale the evidence prefers, what `hierarchical` infers, and how often its 90 % intervals cover over models
drawn from the prior.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.folders import write_page
from inference.evidence.designs import compare_designs
from inference.hierarchical.sampler import HierarchicalDraws, hierarchical
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Energy,
    Gaussian,
    Identity,
    ProductOfExperts,
    StudentT,
)

ETA = 0.5
NAMES = ("a", "b", "c", "d")
SIZES = (4, 64, 1024)
TAILS = (3.0, 10.0, math.inf)
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.8, 2.2)
FAMILIES: dict[float, Energy] = {nu: Gaussian() if math.isinf(nu) else StudentT(nu, "multivariate") for nu in TAILS}


def design(energy: Energy, gamma: float) -> ProductOfExperts:
    """Experts of the truth's kind."""
    anchor = Anchor(precision=AbsolutePrecision(ETA))
    return ProductOfExperts.of(NAMES, Identity(), energy, Absolute(gamma), anchor=anchor)


def simulate(gamma: Tensor, nu: Tensor, modules: int, size: int, generator: torch.Generator) -> Tensor:
    """Updates `(M, N, 1, D)`; `gamma` and `nu` are scalars or have one number per module.

    Args:
        gamma: Scale.
        nu: Degrees of freedom; infinite for normal noise.
        modules: How many.
        size: Numbers of an update.
        generator: Source of all randomness.
    """
    z = torch.randn(modules, 1, 1, size, generator=generator, dtype=torch.float64) / math.sqrt(2 * ETA)
    noise = torch.randn(modules, len(NAMES), 1, size, generator=generator, dtype=torch.float64)
    half = (torch.where(nu.isinf(), 1.0, nu) / 2).reshape(-1, 1).expand(modules, len(NAMES))
    mixing = torch._standard_gamma(half.contiguous(), generator=generator) / half
    mixing = torch.where(nu.reshape(-1, 1).isinf(), 1.0, mixing)
    return z + (gamma.reshape(-1, 1) / mixing.sqrt())[..., None, None] * noise


def preferred(size: int, nu: float, modules: int, generator: torch.Generator) -> list[str]:
    """How far every family, at its best scale, is below the best of all: a row of the first table."""
    truth = torch.tensor(1.0, dtype=torch.float64), torch.tensor(nu, dtype=torch.float64)
    updates = simulate(*truth, modules, size, generator)
    designs = {f"{tail:g} {gamma:g}": design(energy, gamma) for tail, energy in FAMILIES.items() for gamma in SCALES}
    rows = compare_designs(designs, updates, generator=generator, samples=400).rows
    cells = []
    for tail in TAILS:
        row = next(each for each in rows if each.name.startswith(f"{tail:g} "))
        below = row.evidence.total - rows[0].evidence.total
        cells.append(f"{below:.1f} ± {row.evidence.total_error:.1f} (γ {row.name.split()[1]})")
    return [str(size), f"{nu:g}", *cells]


def inferred(size: int, nu: float, modules: int, draws: int, generator: torch.Generator) -> list[str]:
    """Posterior medians and 90 % intervals of one pooled model: a row of the second table."""
    truth = torch.tensor(1.0, dtype=torch.float64), torch.tensor(nu, dtype=torch.float64)
    updates = simulate(*truth, modules, size, generator)
    found = hierarchical(design(StudentT(10.0, "multivariate"), 2.0), updates, draws, seed=1, chains=1, warmup=100)
    assert found.nu is not None
    return [str(size), f"{nu:g}", _interval(found.gamma), _interval(found.nu), str(found.num_divergences)]


def coverage(size: int, models: int, draws: int, generator: torch.Generator) -> list[str]:
    """How many 90 % intervals cover, over models drawn from the prior: a row of the third table."""
    torch.manual_seed(size)
    gamma_prior, df_prior = dist.LogNormal(0.0, 0.5), dist.Gamma(4.0, 0.5)
    gamma, nu = gamma_prior.sample((models,)).double(), df_prior.sample((models,)).double()
    updates = simulate(gamma, nu, models, size, generator)
    found: HierarchicalDraws = hierarchical(
        design(StudentT(5.0, "multivariate"), 1.0), updates, draws, seed=1, shared="module", chains=1, warmup=100,
        gamma_prior=gamma_prior, df_prior=df_prior,
    )  # fmt: skip
    assert found.nu is not None
    cells = []
    for truth, values in ((gamma, found.gamma), (nu, found.nu)):
        level = (values < truth).double().mean((0, 1))
        cells.append(f"{int(((level > 0.05) & (level < 0.95)).sum())} of {models}")
    return [str(size), *cells]


def _interval(values: Tensor) -> str:
    low, middle, high = torch.quantile(values.flatten(), torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)).tolist()
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    Args:
        header: Titles.
        rows: Cells.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Draw, infer and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence_recovery.md"))
    parser.add_argument("--modules", type=int, default=40, help="of a model")
    parser.add_argument("--models", type=int, default=100, help="whose intervals are counted")
    parser.add_argument("--draws", type=int, default=300, help="per model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, started, generator = Console(), time.perf_counter(), torch.Generator().manual_seed(0)
    cases = [(size, nu) for size in SIZES for nu in TAILS]
    first, second = [], []
    for size, nu in cases:
        console.print(f"{size} numbers, nu = {nu:g}", highlight=False)
        first.append(preferred(size, nu, arguments.modules, generator))
        second.append(inferred(size, nu, arguments.modules, arguments.draws, generator))
    third = [coverage(size, arguments.models, arguments.draws, generator) for size in SIZES]
    command = (
        f"python -m benchmarks.evidence_recovery --modules {arguments.modules} --models {arguments.models} "
        f"--draws {arguments.draws}"
    )
    text = "\n\n".join([
        f"Updates drawn from the model itself: {arguments.modules} modules, {len(NAMES)} experts, γ = 1. Made by "
        f"`{command}` in {time.perf_counter() - started:.0f} seconds on a {platform.machine()} CPU.",
        "Log evidence in nats below the best, of each family at its best scale of the grid:",
        table(["numbers", "true ν", *(f"ν = {tail:g}" for tail in TAILS)], first),
        "Posterior medians and 90 % intervals of `hierarchical`, one γ and ν for the model (prior mean of ν 20):",
        table(["numbers", "true ν", "γ", "ν", "divergences"], second),
        "90 % intervals that cover, over models of one module whose γ and ν are drawn from the prior:",
        table(["numbers", "γ", "ν"], third),
    ]) + "\n"  # fmt: skip
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
