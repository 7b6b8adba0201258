"""What the tests on a GPU share: generators there, and posteriors in both places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poe_models import Posterior, ProductOfExperts
from tests.helpers import random_updates
from tests.seeds import seed_of


def on(device: torch.device, seed: int) -> torch.Generator:
    """A generator on the device."""
    return torch.Generator(device).manual_seed(seed_of(seed))


def both(poe: ProductOfExperts, updates: Tensor, device: torch.device, **how: Any) -> tuple[Posterior, Posterior]:
    """The posterior on the CPU and on the device."""
    there = poe.bind(updates.to(device), **how)
    assert there.like.device.type == there.anchor_precision.device.type == device.type
    return poe.bind(updates, **how), there


def small(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_updates(generator, *(shape or (2, 3, 12, 9)), dtype=dtype)
