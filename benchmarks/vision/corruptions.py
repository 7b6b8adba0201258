"""Corruptions of the vision suite's images."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.harness.corruptions import Corruptions
from benchmarks.vision.tasks import Split
from diagnostics.predictions.corruptions import CORRUPTIONS, Corruption, corrupt


def corrupted(split: Split, kind: Corruption, severity: int, seed: int) -> Split:
    """A split with corrupted images, stored as before."""
    return replace(split, images=corrupt(split.images, kind, severity, seed=seed))


IMAGES = Corruptions(
    CORRUPTIONS, ("1", "3", "5"), "severities 1, 3 and 5 of Hendrycks and Dietterich (2019)", corrupted
)
