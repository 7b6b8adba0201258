"""Problems of the reweighted iteration, and runs of it."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.problem import Problem, Run
from inference.reweighting import SolverOptions, run_from
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    average,
)
from poe_models.least_squares import quadratic_of

NAMES = ["a", "b", "c"]


CAUCHY, INPUTS = Cauchy(), InputGram()


MAPS = [Identity(), OutputGram(), InputGram(), Directional(), (OutputGram(), InputGram())]


def problem_of(
    updates: Tensor, design: object = INPUTS, energy: Energy = CAUCHY, eta: float = 0.3, gamma: float = 0.7
) -> Problem:
    anchor = Anchor(average, AbsolutePrecision(eta))
    poe = ProductOfExperts.of(NAMES[: updates.shape[1]], design, energy, Relative(gamma), anchor=anchor)  # type: ignore[arg-type]
    posterior = poe.bind(updates)
    return Problem(posterior, quadratic_of(posterior))


def a_run(problem: Problem, weights: Tensor | None = None, **options: object) -> Run:
    start = problem.posterior.weights(torch.zeros_like(problem.at(problem.quadratic.targets[0]).q))
    return run_from(problem, start if weights is None else weights, SolverOptions(**options))  # type: ignore[arg-type]
