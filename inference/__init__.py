"""From belief to numbers: the MAP of a product of experts and whole merged checkpoints.

``fixed_point(poe, updates)`` solves modules, ``merge_checkpoint(task_vectors, ...)`` solves a model file by file;
``minimize(posterior)`` serves experts that are only a function.
"""

from inference.fixed_point import fixed_point, solve_posterior
from inference.lbfgs import minimize
from inference.reweighting import SolverOptions
from inference.solution import Solution, Status

__all__ = ["Solution", "SolverOptions", "Status", "fixed_point", "minimize", "solve_posterior"]
