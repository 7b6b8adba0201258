"""One result of every diagnostic, small and made in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diagnostics.chains import chain_convergence, coefficient_intervals
from diagnostics.predictions.comparison import compare_methods
from diagnostics.predictions.reliability import reliability
from diagnostics.predictions.selective import risk_coverage
from diagnostics.predictions.shift import under_corruption
from diagnostics.residuals import Residuals, module_residuals
from diagnostics.sensitivity import gamma_sensitivity
from diagnostics.solver import fixed_point_convergence, solution_records
from diagnostics.tails import fit_tails
from inference import fixed_point
from inference.models.model_draws import SpanDraws
from poe_models import Cauchy, InputGram, ModuleUpdates, ProductOfExperts, Relative
from tests.helpers import random_updates
from tests.seeds import seeded, seeded_numpy

NAMES = ("mnist", "emoji", "animals")
MODULES = ("layers.0.fc.weight", "layers.1.fc.weight")


@dataclass(frozen=True)
class Results:
    """One result of each kind."""

    convergence: Any
    sensitivity: Any
    chains: Any
    intervals: Any
    tails: Any
    values: np.ndarray
    residuals: Any
    reliability: Any
    selective: Any
    comparison: Any
    corrupted: Any


def made() -> Results:
    """The results, of two modules, three tasks and three methods; one expert of the first module is silent."""
    generator = seeded(0)
    updates = random_updates(generator, 2, 3, 6, 7)
    updates[0, 1] = 0
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.5))
    modules = [ModuleUpdates(n, n, NAMES, torch.zeros(6, 7), u) for n, u in zip(MODULES, updates, strict=True)]
    solution = fixed_point(poe.bind(updates))
    coefficients = torch.randn(4, 60, 2, 4, generator=generator, dtype=torch.float64)
    draws = SpanDraws(MODULES, torch.tensor([[1.0, 1, 1, 0]] * 2), "", NAMES, coefficients)
    values = seeded_numpy(0).standard_t(2.0, 300)
    labels = {task: torch.randint(4, (80,), generator=generator) for task in NAMES}
    tables = {
        method: {t: (k * torch.nn.functional.one_hot(y, 4) + torch.rand(80, 4)).softmax(1) for t, y in labels.items()}
        for method, k in (("average", 0.5), ("product", 1.5), ("TIES", 1.0))
    }
    first = tables["product"]["mnist"]
    entries = [e for m, z in zip(modules, solution.value, strict=True) for e in module_residuals(z, m, InputGram())]
    return Results(
        fixed_point_convergence(solution_records(solution, MODULES)),
        gamma_sensitivity(poe, modules, [0.3, 1.0, 3.0], lambda merged: -float(merged[MODULES[0]].norm())),
        chain_convergence(draws),
        coefficient_intervals(draws),
        fit_tails(values, ["Gaussian", "Student-t", "Cauchy"], num_draws=200),
        values,
        Residuals(tuple(entries)),
        reliability(first, labels["mnist"], seed=0, num_resamples=50),
        risk_coverage(first.amax(1), (first.argmax(1) != labels["mnist"]).double(), seed=0, num_resamples=50),
        compare_methods(tables, labels, seed=0, num_resamples=50),
        under_corruption(
            lambda shown: torch.stack([shown[:, 0, 0, 0] / 255, 1 - shown[:, 0, 0, 0] / 255], 1),
            torch.randint(256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8),
            torch.arange(30) % 2,
            seed=0,
            kinds=["contrast", "brightness"],
            num_resamples=20,
        ),
    )
