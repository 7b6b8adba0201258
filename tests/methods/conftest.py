"""Updates and Fisher information of small modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import random_updates
from tests.methods.toys import SHAPE


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return random_updates(generator, 2, 3, *SHAPE)
