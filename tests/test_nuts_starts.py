"""Starts of NUTS, its temperature and its silence: what is refused, and what stands in the draws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.nuts import _require_start, nuts
from poe_models import AbsolutePrecision, Anchor, Gaussian, Identity, Posterior, ProductOfExperts, Relative
from poe_models.posterior import BoundFactor
from tests.helpers import assert_close, random_updates


def small(generator: torch.Generator, modules: int = 2) -> Posterior:
    anchor = Anchor(precision=AbsolutePrecision(1.0))
    poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Relative(1.0), anchor=anchor, temperature=0.5)
    return poe.bind(random_updates(generator, modules, 2, 1, 2))


@pytest.mark.parametrize(("chain", "module"), [(0, 1), (1, 0), (2, 1)])
def test_a_start_without_density_is_refused_in_any_module_of_any_chain(
    chain: int, module: int, generator: torch.Generator
) -> None:
    start = torch.zeros(3, 2, 1, 2, dtype=torch.float64)
    _require_start(small(generator), start, 3)
    start[chain, module, 0, 1] = math.inf
    with pytest.raises(ValueError, match=f"not finite where chain {chain} starts"):
        _require_start(small(generator), start, 3)


def test_a_factor_that_couples_modules_counts_as_a_whole(generator: torch.Generator) -> None:
    barrier = BoundFactor("barrier", lambda z: torch.where(z.sum((-3, -2, -1)) > 1, math.inf, 0.0), True)
    posterior = replace(small(generator), factors=(barrier,))
    start = torch.zeros(3, 2, 1, 2, dtype=torch.float64)
    start[2] = 1.0
    with pytest.raises(ValueError, match="chain 2 starts"):
        _require_start(posterior, start, 3)


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (3, 1, 1, 2), (3, 2, 2, 1), (2, 1, 2)])
def test_starts_of_another_shape_are_refused(shape: tuple[int, ...], generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"has shape .* but 3 chains of this posterior have \(3, 2, 1, 2\)"):
        _require_start(small(generator), torch.zeros(shape), 3)


def test_nothing_is_printed_and_progress_goes_on_over_chains(
    generator: torch.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    ticks: list[tuple[int, int]] = []
    posterior = small(generator)
    start = torch.zeros(2, 2, 1, 2, dtype=torch.float64)
    found = nuts(
        posterior, 2, chains=2, warmup=3, start=start, generator=generator, progress=lambda i, n: ticks.append((i, n))
    )
    assert ticks == [(i, 10) for i in range(1, 11)]
    assert capfd.readouterr() == ("", "")
    assert found.values.shape == (2, 2, 2, 1, 2)
    assert found.values.dtype == torch.float64
    assert found.temperature == 0.5
    assert found.sampler == "nuts"
    assert_close(found.stats["lp"], -posterior.energy(found.values) / 0.5)


def test_trees_are_no_deeper_than_they_may_be(generator: torch.Generator) -> None:
    found = nuts(small(generator), 5, chains=1, warmup=2, max_tree_depth=1, generator=generator)
    assert found.stats["n_steps"].unique().tolist() == [1]  # 2^1 - 1
    assert bool(found.stats["reached_max_treedepth"].all())


def test_every_chain_starts_where_it_is_told(generator: torch.Generator) -> None:
    start = torch.randn(2, 2, 1, 2, generator=generator, dtype=torch.float64)
    seen: list[Tensor] = []

    def note(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return torch.zeros(z.shape[:-3], dtype=z.dtype)

    posterior = replace(small(generator), factors=(BoundFactor("noted", note, True),))
    nuts(posterior, 1, chains=2, warmup=1, start=start, generator=generator)
    for chain in range(2):
        assert any(torch.equal(z, start[chain]) for z in seen)
