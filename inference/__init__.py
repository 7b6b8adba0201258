"""From belief to numbers: the MAP of a product of experts, its posterior, and whole merged checkpoints.

``fixed_point(poe, updates)`` solves modules and ``merge_checkpoint(task_vectors, poe, out)`` a whole model;
``laplace(poe, updates, at=solution)`` and ``gibbs(poe, updates, num_samples, generator=...)`` describe the posterior of
the merged update, ``gibbs_posterior``, ``hmc`` and ``nuts`` that of a bound posterior in its own (Span) coordinates;
``minimize(posterior)`` serves experts that are only a function.
"""

from inference.design import Design
from inference.draws import Draws, RegeneratedDraws, StoredDraws
from inference.fixed_point import fixed_point, solve_posterior
from inference.gibbs import gibbs, gibbs_posterior
from inference.hmc import hmc
from inference.laplace import DenseLaplace, Laplace, laplace
from inference.lbfgs import minimize
from inference.nuts import nuts
from inference.propriety import require_proper
from inference.reweighting import SolverOptions
from inference.solution import Solution, Status
from inference.streaming import MergeReport, merge_checkpoint, plan

__all__ = [
    "DenseLaplace",
    "Design",
    "Draws",
    "Laplace",
    "MergeReport",
    "RegeneratedDraws",
    "Solution",
    "SolverOptions",
    "Status",
    "StoredDraws",
    "fixed_point",
    "gibbs",
    "gibbs_posterior",
    "hmc",
    "laplace",
    "merge_checkpoint",
    "minimize",
    "nuts",
    "plan",
    "require_proper",
    "solve_posterior",
]
