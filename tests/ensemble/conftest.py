"""A small network, its fine-tuned copies and their product of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from poe_models import Anchor, ProductOfExperts, TaskVectors, average
from tests.ensemble.toys import Net, tuned
from tests.seeds import seed_of


@pytest.fixture
def model() -> Net:
    torch.manual_seed(seed_of(3))
    return Net()


@pytest.fixture
def vectors(model: Net, generator: torch.Generator) -> TaskVectors:
    return tuned(model, generator)


@pytest.fixture
def poe(vectors: TaskVectors) -> ProductOfExperts:
    return ProductOfExperts.of(vectors.names, anchor=Anchor(average), temperature=0.3)


@pytest.fixture
def loader(generator: torch.Generator) -> DataLoader[Any]:
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.zeros(23)), batch_size=10)
