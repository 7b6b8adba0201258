"""Merging methods on low-rank factors, and on noise in the null space of updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from poe_models import AbsolutePrecision, Anchor, ProductOfExperts
from poe_models.methods import TSVM, DogeTA, IsoC, IsoCTS, KnotsTies, MergingMethod, Wudi, WudiAdam
from tests.helpers import assert_close, name_of, random_updates
from tests.method_laws import as_modules, for_all, low_rank_batch, merge

SPECTRAL = (TSVM(), IsoC(), IsoCTS(), Wudi(), KnotsTies())


@for_all
def test_a_centre_makes_use_of_factors(
    method: MergingMethod, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = low_rank_batch(generator)
    ready = method.prepare(as_modules(batch))
    expected = ready.merge(batch)
    poe = ProductOfExperts.of(batch.experts, anchor=Anchor(ready, AbsolutePrecision(1.0))).for_modules(batch.names)
    monkeypatch.setattr(type(ready), "merged", lambda self, given: expected if given.low_rank is not None else None)
    center = poe.bind(batch.updates, low_rank=batch.low_rank).center
    assert center is not None
    assert torch.equal(center, expected)
    assert torch.equal(ready(batch.updates, batch.low_rank), expected)


@pytest.mark.parametrize("rank", [2, 5])
@for_all
def test_factors_give_what_the_dense_updates_give(method: MergingMethod, rank: int, generator: torch.Generator) -> None:
    batch = low_rank_batch(generator, rank)
    assert_close(merge(method, batch), merge(method, replace(batch, low_rank=None)), 1e-8)


@for_all
def test_noise_in_the_null_space_moves_nothing(method: MergingMethod, generator: torch.Generator) -> None:
    updates = low_rank_batch(generator).updates
    noise = 1e-7 * torch.randn(updates.shape, generator=generator, dtype=torch.float64)
    assert_close(merge(method, updates + noise), merge(method, updates), 1e-4)


@pytest.mark.parametrize("method", [TSVM(), IsoC(), IsoCTS(), Wudi(), WudiAdam(20), DogeTA(steps=20)], ids=name_of)
def test_an_expert_that_is_only_noise_counts_as_zero(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 9, 8)
    updates[:, 1] = 0
    noisy = updates.clone()
    noisy[:, 1] = 1e-7 * torch.randn(updates[:, 1].shape, generator=generator, dtype=torch.float64)
    assert_close(merge(method, noisy), merge(method, updates), 1e-5)


@pytest.mark.parametrize("method", SPECTRAL, ids=name_of)
def test_nearly_identical_experts_of_low_rank(method: MergingMethod, generator: torch.Generator) -> None:
    """The difference of two experts is noise, and no direction of its own."""
    updates = low_rank_batch(generator).updates[:, :1].expand(2, 3, 14, 12).clone()
    noise = 1e-9 * torch.randn(updates.shape, generator=generator, dtype=torch.float64)
    assert_close(merge(method, updates + noise), merge(method, updates), 1e-4)


def test_without_the_guard_noise_moves_the_merge(generator: torch.Generator) -> None:
    """So that the tests above can fail."""
    updates = low_rank_batch(generator).updates
    noise = 1e-7 * torch.randn(updates.shape, generator=generator, dtype=torch.float64)
    guarded, naive = merge(IsoC(), updates), merge(IsoC(rank_tolerance=1e-12), updates + noise)
    assert float((naive - guarded).norm()) > 0.3 * float(guarded.norm())
