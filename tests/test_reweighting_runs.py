"""Runs of the reweighted iteration: where they stop, and what they reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from inference.problem import TOLERANCE, Problem
from inference.reweighting import SolverOptions, run_from
from poe_models import AbsolutePrecision, Anchor, Custom, Gaussian, GeneralizedGaussian, ProductOfExperts, Relative
from poe_models.least_squares import quadratic_of
from tests.helpers import assert_close, name_of, random_updates
from tests.reweighted import MAPS, a_run, problem_of
from tests.seeds import seeded

EPS = torch.finfo(torch.float64).eps


def test_the_iteration_stops_where_it_is_told_to(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5), gamma=0.3)
    for steps in (1, 2, 5):
        run = a_run(problem, max_steps=steps, acceleration=False)
        assert run.trace.shape == (2, steps)
        assert run.steps.tolist() == [steps, steps]
        assert not bool(run.converged.any())
        assert not bool(run.rounding.any())
    loose = a_run(problem, tolerance=1e-2, acceleration=False)
    tight = a_run(problem, acceleration=False)
    assert int(loose.steps.max()) < int(tight.steps.min())
    for run, tolerance in ((loose, 1e-2), (tight, TOLERANCE[torch.float64])):
        assert bool((run.gradient_norm <= tolerance).all())
        assert bool((run.weight_change <= tolerance).all())
    # One module may be done before the other, and then stays.
    assert int(tight.steps.min()) < int(tight.steps.max())
    first = int(tight.steps.argmin())
    alone = problem_of(random_updates(seeded(20261122), 2, 3, 4, 5)[first : first + 1], gamma=0.3)
    assert_close(a_run(alone, acceleration=False).point.x, tight.point.x[first : first + 1], 1e-13)
    assert tight.trace[first, -1] == tight.point.energy[first]


def test_steps_go_on_as_long_as_the_weights_settle_though_the_energy_no_longer_tells() -> None:
    """Errors of the energy are squares: it is level at 1e-8, and the weights have half of the way to go."""
    slow = random_updates(torch.Generator().manual_seed(0), 2, 3, 4, 5)  # one fixed problem, whose rate is 0.95
    problem = problem_of(slow, gamma=0.1)
    run = a_run(problem, acceleration=False, max_steps=1000)
    falls = run.trace[0].diff() < -problem.slack(run.point.energy)[0]
    assert int(run.steps[0]) - int(falls.nonzero().max()) > 30
    assert (run.converged.tolist(), run.rounding.tolist()) == ([True, True], [False, False])


def test_ten_steps_without_progress_are_rounding() -> None:
    problem = problem_of(random_updates(torch.Generator().manual_seed(0), 1, 3, 4, 5, dtype=torch.float32), gamma=0.3)
    options = {"acceleration": False, "tolerance": 1e-12}
    run = a_run(problem, max_steps=400, **options)
    assert (run.converged.tolist(), run.rounding.tolist()) == ([False], [True])
    changes = [float(a_run(problem, max_steps=k, **options).weight_change) for k in range(1, int(run.steps) + 1)]
    lowest = [min(changes[:k], default=math.inf) for k in range(len(changes))]
    progress = [change < low for change, low in zip(changes, lowest, strict=True)]
    assert not any(progress[-10:])
    assert int(run.steps) == 11 + max(i for i, made in enumerate(progress) if made) + 1


def test_zero_tolerance_is_met_where_nothing_moves() -> None:
    problem = problem_of(torch.zeros(1, 2, 3, 4, dtype=torch.float64))
    run = a_run(problem, tolerance=0.0)
    assert run.converged.tolist() == [True]
    refined = problem.refine(run)
    assert (refined.converged.tolist(), refined.forward_error.tolist()) == ([True], [0.0])
    assert problem.uphill(run.point, run.point).tolist() == [False]


def test_a_run_that_starts_at_its_end_is_done_at_once(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5))
    end = a_run(problem, tolerance=1e-13).point.log_weights.exp()
    again = run_from(problem, end, SolverOptions())
    assert again.steps.tolist() == [1.0, 1.0]
    assert again.converged.tolist() == [True, True]
    assert again.rejected.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("design", MAPS, ids=name_of)
def test_one_expert_alone_is_met_but_for_the_anchor(design: object, generator: torch.Generator) -> None:
    update = random_updates(generator, 1, 1, 4, 5)
    poe = ProductOfExperts.of(["a"], design, Gaussian(), Relative(1.0), anchor=Anchor(precision=AbsolutePrecision(0.3)))  # type: ignore[arg-type]
    posterior = poe.bind(update)
    problem = Problem(posterior, quadratic_of(posterior))
    point = a_run(problem).point
    leaf = problem.quadratic.lift(point.x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(posterior.energy(leaf).sum(), leaf)
    assert float(gradient.abs().max()) < 1e-10


def test_a_step_tolerance_is_a_frobenius_norm(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 1, 3, 4, 5), gamma=0.3)
    points = [a_run(problem, max_steps=k, acceleration=False).point.x for k in range(1, 30)]
    lengths = [float((b - a).norm()) for a, b in zip(points, points[1:], strict=False)]
    for limit in (lengths[2] * 1.001, lengths[9] * 1.001):
        expected = 2 + next(i for i, length in enumerate(lengths) if length <= limit)
        run = a_run(problem, step_tolerance=limit, acceleration=False)
        assert run.steps.tolist() == [expected]
        assert bool(run.converged.all())


def test_convex_energies_in_q_are_searched_along_the_line(generator: torch.Generator) -> None:
    steep = random_updates(torch.Generator().manual_seed(20261122), 2, 3, 4, 5)  # one fixed problem that overshoots
    problem = problem_of(steep, energy=GeneralizedGaussian(6.0))
    run = a_run(problem, acceleration=False, max_steps=400)
    assert bool(run.searched.any())
    assert torch.equal(run.searched, run.rejected > 0)
    assert bool((run.trace.diff() <= 8 * EPS * run.trace[:, :1]).all())
    assert bool((run.gradient_norm < 1e-6).all())
    plain = a_run(problem_of(random_updates(generator, 2, 3, 4, 5)), acceleration=False)
    assert not bool(plain.searched.any())
    assert plain.rejected.tolist() == [0.0, 0.0]


def test_a_run_takes_over_a_known_minimum_that_it_approaches(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5), gamma=0.3)
    known = a_run(problem)
    near = known.point.log_weights.exp() * 1.001
    marked = replace(known, rejected=known.rejected + 77.0)
    again = run_from(problem, near, SolverOptions(), known=marked)
    assert again.rejected.tolist() == marked.rejected.tolist()
    only_one = replace(marked, converged=torch.tensor([True, False]))
    mixed = run_from(problem, near, SolverOptions(), known=only_one)
    assert float(mixed.rejected[0]) == float(marked.rejected[0])
    assert float(mixed.rejected[1]) < 77.0


def test_custom_energies_run_like_shipped_ones(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    shipped = a_run(problem_of(updates))
    own = a_run(problem_of(updates, energy=Custom(torch.log1p)))
    assert_close(own.point.x, shipped.point.x, 1e-8)
