"""Modules that the forward passes of functional experts never use are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.functional import SpanModel, fit, functional
from poe_models import ProductOfExperts, TaskVectors
from tests.seeds import seeded


class Branches(nn.Module):
    """One matrix that every output goes through, and two of which a forward pass chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, branch: str = "left") -> Tensor:
        found: Tensor = getattr(self, branch)(self.trunk(x))
        return found


def left(net: Any, x: Tensor) -> Tensor:
    found: Tensor = net(x)
    return found


def right(net: Any, x: Tensor) -> Tensor:
    found: Tensor = net(x, branch="right")
    return found


def test_they_are_listed_and_stay() -> None:
    network, generator = Branches(), seeded(3)
    base = {k: v.clone() for k, v in network.state_dict().items()}
    experts = {n: {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for n in "ab"}
    model = SpanModel(network, TaskVectors(base, experts), ProductOfExperts.of(["a", "b"]))
    x = torch.randn(8, 5, generator=seeded(1))
    posterior = model.posterior(functional("a", model, x, left))
    with pytest.warns(UserWarning, match=r"no forward pass uses right\.weight: 1 of 3 modules move no output"):
        found = fit(posterior, model.start(), generator=seeded(0), steps=5, batch_size=8)
    assert found.value.shape == (3, 4, 1)
    both = model.posterior(functional("a", model, x, left), functional("b", model, x, right))
    fit(both, model.start(), generator=seeded(0), steps=1, batch_size=8)
