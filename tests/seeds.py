"""Where the tests' randomness comes from: `TEST_SEED` (0 by default) moves the seed of every generator."""

from __future__ import annotations

import os

import numpy as np
import torch

SHIFT = int(os.environ.get("TEST_SEED", "0"))


def seed_of(seed: int) -> int:
    """The seed that stands for `seed` in this run."""
    return seed + 1_000_003 * SHIFT


def seeded(seed: int) -> torch.Generator:
    """A generator of torch's."""
    return torch.Generator().manual_seed(seed_of(seed))


def seeded_numpy(seed: int) -> np.random.Generator:
    """A generator of NumPy's."""
    return np.random.default_rng(seed_of(seed))
