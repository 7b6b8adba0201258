"""Predictions of three methods."""

from __future__ import annotations

import torch

from diagnostics.predictions.evaluation import OWN_EXPERTS
from diagnostics.predictions.files import Predictions, predictions_of
from tests.seeds import seeded

NAMES = ("mnist", "emoji", "animals")


def predictions(size: int = 60) -> Predictions:
    generator = seeded(1)
    labels = {task: torch.randint(4, (size,), generator=generator) for task in NAMES}
    tables = {
        method: {t: (k * torch.nn.functional.one_hot(y, 4).double()).softmax(1) for t, y in labels.items()}
        for method, k in (("average", 0.5), ("product/Cauchy", 1.5), (OWN_EXPERTS, 4.0))
    }
    return predictions_of(labels, tables)
