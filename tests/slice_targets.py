"""Posteriors to sample by slices, and comparisons of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.draws import Draws
from inference.slice import Reference, init, latents, step
from poe_models import (
    Anchor,
    Cauchy,
    FactorExpert,
    InputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    span_statistics,
)
from tests.sampling import assert_same_mean

SKEWED = ProductOfExperts.of(
    ["a", "b"],
    InputGram(),
    Cauchy(),
    Relative(0.3),
    [1.0, 2.0],
    Anchor(precision=RelativePrecision(0.05)),
    temperature=0.5,
)
"""Two experts that disagree: skewness 1.5 and kurtosis 6 along one coordinate."""


TIE = FactorExpert(
    "tie", lambda c: 3.0 * (c[..., 0, 0] - c[..., 1, 1] - 1.0).square(), coordinates="span", scope="model"
)


def span_of(poe: ProductOfExperts, updates: Tensor) -> Posterior:
    return poe.bind(span_statistics(poe, updates))


def agree(posterior: Posterior, draws: Draws | Tensor, truth: Draws | Tensor | dict[str, Tensor]) -> None:
    """The shared comparison, with the R-hat that 16 short chains of one distribution have."""
    assert_same_mean(posterior, draws, truth, max_rhat=1.04)


def chain(
    posterior: Posterior, reference: Reference, generator: torch.Generator, num_samples: int = 1000, chains: int = 16
) -> Tensor:
    """Draws of chains of single steps with a reference that stays as it is."""
    state = init(torch.randn(chains, 1, 3, generator=generator, dtype=torch.float64), posterior)
    positions = []
    for _ in range(num_samples + 100):
        state, _ = step(state, posterior, reference, generator)
        positions.append(state.position)
    return latents(posterior, torch.stack(positions[100:], 1))
