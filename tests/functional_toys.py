"""A linear layer whose outputs are linear in the coefficients, and experts on its predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.functional import (
    SpanModel,
    functional,
)
from poe_models import Gaussian, InputGram, ProductOfExperts, TaskVectors
from poe_models.posterior import Posterior
from tests.seeds import seeded

NAMES = ("a", "b", "c")


class Named(NamedTuple):
    """A batch as a tokenizer's wrapper gives it."""

    x: Tensor
    places: Tensor


def linear_model(energy: Any = None, d_in: int = 5, d_out: int = 4, device: torch.device | str = "cpu") -> SpanModel:
    """A linear layer with bias: outputs are linear in the coefficients."""
    generator = seeded(3)
    network = nn.Linear(d_in, d_out)

    def draw(scale: float) -> dict[str, Tensor]:
        weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
        return {"weight": scale * weight, "bias": scale * torch.randn(d_out, generator=generator, dtype=torch.float64)}

    base = draw(1.0)
    experts = {name: {key: base[key] + value for key, value in draw(0.3).items()} for name in NAMES}
    vectors = TaskVectors(base, experts, dtype=torch.float64, device=device)
    return SpanModel(network.double(), vectors, ProductOfExperts.of(NAMES, InputGram(), energy or Gaussian()))


def inputs_of(count: int, seed: int = 0, d_in: int = 5) -> Tensor:
    return torch.randn(count, d_in, generator=seeded(seed), dtype=torch.float64)


def called(net: Any, x: Any) -> Tensor:
    found: Tensor = net(x)
    return found


def linear_posterior(model: SpanModel, divergence: Any, count: int = 12, **how: Any) -> Posterior:
    return model.posterior(
        *(functional(n, model, inputs_of(count, i), called, divergence, **how) for i, n in enumerate(NAMES))
    )
