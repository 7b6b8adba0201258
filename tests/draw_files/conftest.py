"""The task vectors of a small model."""

from __future__ import annotations

import pytest
import torch

from poe_models import TaskVectors
from tests.draw_files.toys import states


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    return TaskVectors(*states(generator), dtype=torch.float64)
