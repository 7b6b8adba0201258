"""Names and shapes of two modules."""

from __future__ import annotations

import torch
from torch import Tensor

from poe_models import AbsolutePrecision, Anchor
from poe_models.residual_maps import MomentKind

NAMES = ("a", "b", "c")


MODULES = ("one", "two")


SHAPE = (4, 3)


def statistics(generator: torch.Generator, kind: MomentKind, shape: tuple[int, int] = SHAPE, rows: int = 20) -> dict:
    made: dict[str, dict[str, Tensor]] = {}
    for name in NAMES:
        for module in MODULES:
            inputs = torch.randn(rows, shape[1], generator=generator, dtype=torch.float64)
            fisher = torch.rand(shape, generator=generator, dtype=torch.float64)
            made.setdefault(name, {})[module] = fisher if kind == "fisher" else inputs.mT @ inputs / rows
    return made


def anchor(eta: float) -> Anchor:
    return Anchor(precision=AbsolutePrecision(eta))
