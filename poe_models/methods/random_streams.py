"""Random numbers that depend on a seed and on names, not on the order in which anything is merged."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, *names: str) -> torch.Generator:
    """A generator on the CPU, the same for the same seed and names.

    Args:
        seed: Seed of the method.
        names: Names of what is drawn for: a module, an expert.

    Returns:
        A new generator.

    >>> [float(torch.rand(1, generator=named_generator(0, "fc.weight", "mnist"))) for _ in range(2)]
    [0.3436172604560852, 0.3436172604560852]
    """
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
