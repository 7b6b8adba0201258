"""Task vectors of low rank, and draws around their merge."""

from __future__ import annotations

import pytest
import torch

from poe_models import TaskVectors
from tests.surrounding.toys import LENGTHS, NAMES, SHAPES, low_rank


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    experts = {
        name: {key: value + low_rank(generator, SHAPES[key], length) for key, value in base.items()}
        for name, length in zip(NAMES, LENGTHS, strict=True)
    }
    return TaskVectors(base, experts, dtype=torch.float64)
