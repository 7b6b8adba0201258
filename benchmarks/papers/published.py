"""Published numbers that were at hand, in percent, with where they are from; what was not at hand has no number here.

FusionBench's tables (Tang et al., 2024, the collection's documentation) are of the very checkpoints of `setups`. Of
[BMM] only what its abstract says was at hand, of [PoE] none of the scores. The experts of [BMM] are other checkpoints,
as their mean shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.papers.merges import REGMEAN
from benchmarks.papers.setups import EIGHT, GLUE, TWENTY

BASE, OWN = "base", "own experts"
FUSION_BENCH = "FusionBench"
BMM = "[BMM], abstract"


@dataclass(frozen=True)
class Published:
    """One published row.

    Args:
        source: Where it is from.
        scores: Task to score, in percent; without the tasks that it does not have.
        mean: Mean over the tasks as published; None if it is not.
    """

    source: str
    scores: Mapping[str, float]
    mean: float | None = None


def _row(tasks: tuple[str, ...], *numbers: float | None, mean: float | None = None) -> Published:
    return Published(FUSION_BENCH, {t: n for t, n in zip(tasks, numbers, strict=True) if n is not None}, mean)


_B32_20 = _row(
    TWENTY, 63.18, 59.58, 60.27, 45.00, 31.63, 32.53, 48.26, 44.20, 66.45, 60.64, 41.25, 83.32, 97.12, 63.72, 89.83,
    82.36, 63.01, 11.98, 9.95, 58.65,
)  # fmt: skip
_B32_20_OWN = _row(
    TWENTY, 74.86, 78.52, 95.14, 99.07, 97.27, 98.91, 99.58, 79.68, 88.55, 87.96, 71.61, 92.45, 97.55, 88.38, 97.60,
    88.41, 94.75, 95.62, 98.23, 71.28,
)  # fmt: skip
_L14_20 = _row(
    TWENTY, 68.22, 77.86, 71.33, 61.19, 58.43, 50.52, 76.31, 55.53, 79.25, 51.21, 49.96, 93.21, 99.36, 75.05, 95.59,
    91.18, 66.96, 12.34, 9.71, 68.92,
)  # fmt: skip
_L14_20_OWN = _row(
    TWENTY, 82.76, 92.77, 97.38, 99.11, 97.92, 99.24, 99.76, 85.48, 97.67, 91.13, 75.93, 95.75, 99.23, 93.00, 99.13,
    94.77, 95.28, 95.43, 98.30, 80.45,
)  # fmt: skip

PUBLISHED: Mapping[str, Mapping[str, tuple[Published, ...]]] = {
    "clip-b32-8": {
        BASE: (_row(EIGHT, 63.2, 59.8, 60.7, 46.0, 31.6, 32.5, 48.2, 43.9, mean=48.2),),
        OWN: (_row(EIGHT, 75.0, 78.3, 95.2, 99.0, 97.3, 98.9, 99.6, 79.7, mean=90.3),),
        "average": (_row(EIGHT, 65.4, 62.6, 70.8, 76.9, 64.5, 54.9, 86.3, 50.9, mean=66.5),),
        "task arithmetic": (_row(EIGHT, 57.1, 55.7, 64.9, 76.7, 77.9, 68.5, 96.1, 47.2, mean=68.0),),
        "TIES": (_row(EIGHT, 67.1, 64.2, 74.1, 76.8, 77.7, 69.4, 94.1, 54.0, mean=72.2),),
        REGMEAN: (_row(EIGHT, 68.6, 70.0, 84.6, 95.4, 92.6, 83.4, 98.4, 66.1, mean=82.4),),
    },
    "clip-b32-14": {BASE: (_B32_20,), OWN: (_B32_20_OWN,)},
    "clip-b32-20": {BASE: (_B32_20,), OWN: (_B32_20_OWN,)},
    "clip-l14-8": {
        BASE: (_row(EIGHT, 68.3, 77.8, 71.0, 58.9, 58.4, 50.6, 76.4, 55.5, mean=64.6),),
        OWN: (
            _row(EIGHT, 82.8, 92.9, 97.4, 99.2, 97.9, 99.2, 99.8, 85.5, mean=94.3),
            Published(BMM, {}, 95.8),
        ),
        "average": (_row(EIGHT, 72.5, 81.5, 82.2, 90.0, 81.6, 74.0, 96.6, 61.8, mean=80.0),),
        "task arithmetic": (_row(EIGHT, 72.0, 79.0, 80.5, 86.0, 87.5, 83.5, 98.0, 58.8, mean=80.7),),
        "TIES": (_row(EIGHT, 74.7, 83.3, 86.4, 91.3, 89.7, 85.2, 97.8, 63.9, mean=84.0),),
        REGMEAN: (_row(EIGHT, 76.9, 89.8, 93.0, 97.5, 96.3, 94.1, 98.7, 77.0, mean=90.4),),
        "BMM, best": (Published(BMM, {}, 95.1),),
    },
    "clip-l14-14": {BASE: (_L14_20,), OWN: (_L14_20_OWN,)},
    "clip-l14-20": {BASE: (_L14_20,), OWN: (_L14_20_OWN,)},
    "flan-t5-base-glue": {
        BASE: (_row(GLUE, 69.1, 56.5, 76.2, 88.4, 82.1, 80.1, 91.2, 62.2, mean=75.7),),
        OWN: (_row(GLUE, 69.1, 82.7, 85.5, 90.9, 84.0, 84.4, 92.9, 87.4, mean=84.6),),
        # RTE is printed as 90.5, with which the mean of the row would be 79.5 and not the printed 78.2: left out.
        "average": (_row(GLUE, 69.7, 59.7, 78.9, 90.1, 83.8, None, 91.2, 72.0, mean=78.2),),
        "task arithmetic": (_row(GLUE, 68.8, 55.2, 78.7, 89.8, 83.7, 79.1, 91.5, 72.4, mean=77.4),),
        "TIES": (_row(GLUE, 68.3, 56.3, 79.4, 89.8, 83.7, 79.4, 91.6, 71.2, mean=77.5),),
    },
    "flan-t5-large-glue": {
        BASE: (_row(GLUE, 73.7, 56.6, 82.4, 91.1, 85.5, 85.6, 94.3, 87.5, mean=82.1),),
        OWN: (_row(GLUE, 80.2, 88.5, 89.2, 94.4, 87.2, 91.7, 95.2, 90.9, mean=89.6),),
        "average": (_row(GLUE, 74.6, 84.3, 84.1, 92.8, 86.3, 87.4, 94.8, 88.0, mean=86.5),),
        "task arithmetic": (_row(GLUE, 76.9, 85.4, 85.3, 93.9, 85.8, 88.1, 95.2, 87.8, mean=87.3),),
        "TIES": (_row(GLUE, 77.1, 85.1, 86.3, 93.9, 86.0, 87.7, 95.1, 88.0, mean=87.4),),
    },
}
"""Set-up, then method, to its published rows."""


def published(setup: str, method: str) -> tuple[Published, ...]:
    """Published rows of a method on a set-up; none where none was at hand."""
    return PUBLISHED.get(setup, {}).get(method, ())
