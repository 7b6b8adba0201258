"""What NUTS notes of its chains: counts and flags by hand, with Pyro's kernel replaced where it would be chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from inference.nuts import _collect, _global_seed, _Record, nuts
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Gaussian,
    Identity,
    Posterior,
    ProductOfExperts,
    Relative,
)
from tests.helpers import assert_close, random_updates


def small(generator: torch.Generator, modules: int = 1) -> Posterior:
    anchor = Anchor(precision=AbsolutePrecision(1.0))
    poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Relative(1.0), anchor=anchor, temperature=0.5)
    return poe.bind(random_updates(generator, modules, 2, 1, 2))


def test_a_record_counts_evaluations_of_each_draw_and_notes_its_divergence() -> None:
    ticks: list[tuple[int, int]] = []
    record = _Record(lambda: torch.zeros(()), 10, 14, lambda i, n: ticks.append((i, n)))

    def step(evaluations: int, stage: str, index: int, divergences: list[int]) -> None:
        for _ in range(evaluations):
            record.model()
        kernel = SimpleNamespace(step_size=0.25, diagnostics=lambda: {"divergences": divergences})
        record.after_step(kernel, {}, stage, index)  # type: ignore[arg-type]

    step(5, "Warmup", 0, [])
    step(3, "Sample", 0, [])
    step(7, "Sample", 1, [1])
    step(1, "Sample", 2, [1])
    assert record.n_steps == [3, 7, 1]
    assert record.diverging == [False, True, False]
    assert record.step_size == [0.25] * 3
    assert ticks == [(i, 14) for i in (11, 12, 13, 14)]


def test_statistics_of_all_modules_together_stand_in_every_module(generator: torch.Generator) -> None:
    posterior = small(generator, modules=2)
    records = []
    for chain in range(2):
        record = _Record(lambda: torch.zeros(()), 0, 3, None)
        record.n_steps = [5, 6, 7 + chain]
        record.step_size = [0.1, 0.2, 0.3 + chain]
        record.diverging = [False, chain == 1, False]
        records.append(record)
    values = torch.randn(2, 3, 2, 1, 2, generator=generator, dtype=torch.float64)
    found = _collect(posterior, values, records, 3)
    assert torch.equal(found.values, values)
    assert_close(found.stats["lp"], -posterior.energy(values) / 0.5)
    for module in range(2):
        assert found.stats["n_steps"][..., module].tolist() == [[5, 6, 7], [5, 6, 8]]
        assert found.stats["reached_max_treedepth"][..., module].tolist() == [[False, False, True]] * 2  # 2^3 - 1
        assert found.stats["diverging"][..., module].tolist() == [[False] * 3, [False, True, False]]
        assert found.stats["step_size"][..., module].tolist() == [[0.1, 0.2, 0.3], [0.1, 0.2, 1.3]]


def test_one_draw_of_one_chain_is_the_least(generator: torch.Generator) -> None:
    posterior = small(generator)
    found = nuts(posterior, 1, chains=1, warmup=1, generator=generator)
    assert found.values.shape == (1, 1, 1, 1, 2)
    for options in ({"chains": 0, "warmup": 1}, {"chains": 1, "warmup": 0}):
        with pytest.raises(ValueError, match="at least one of each"):
            nuts(posterior, 1, generator=generator, **options)
    with pytest.raises(ValueError, match="at least one of each"):
        nuts(posterior, 0, chains=1, warmup=1, generator=generator)


def test_chains_have_seeds_of_their_own_from_a_wide_range(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    @contextmanager
    def noted(seed: int) -> Iterator[None]:
        seeds.append(seed)
        with _global_seed(seed):
            yield

    monkeypatch.setattr(import_module("inference.nuts"), "_global_seed", noted)
    nuts(small(generator), 1, chains=3, warmup=1, generator=generator)
    assert len(set(seeds)) == 3
    assert max(seeds) > 2**50  # all below: a chance of 2^-36


def test_the_global_generator_is_put_back() -> None:
    before = torch.get_rng_state()
    with _global_seed(5):
        first = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    with _global_seed(5):
        assert torch.equal(torch.randn(3), first)
