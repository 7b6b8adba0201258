"""The solver's safeguards at their thresholds: same basin, sufficient decrease, the longest extrapolation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from inference.problem import Problem
from inference.reweighting import Anderson, SolverOptions, _line_search, run_from
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Expert,
    Huber,
    Identity,
    ProductOfExperts,
)
from poe_models.least_squares import quadratic_of
from tests.helpers import assert_close

OPTIONS = SolverOptions(acceleration=False)


def scalar(*values: float) -> Tensor:
    """Updates or points of one module with a single entry, `(1, n, 1, 1)` for n values and `(1, 1, 1)` for one."""
    return torch.tensor(values, dtype=torch.float64).view((1, len(values), 1, 1) if len(values) > 1 else (1, 1, 1))


def problem_of(poe: ProductOfExperts, *updates: float) -> Problem:
    posterior = poe.bind(torch.tensor(updates, dtype=torch.float64).view(1, -1, 1, 1))
    return Problem(posterior, quadratic_of(posterior))


@pytest.mark.parametrize(("distance", "same"), [(0.014, True), (-0.014, True), (0.027, False), (-0.027, False)])
def test_a_run_stops_at_a_known_minimum_within_a_log_weight_of_0_02(
    distance: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # U = 3, scale 1, eta = 2/5: the minimum is Z = 1 with w = 1/5, and a plain step shrinks the log-weight's distance
    # to 8/15 (worked by hand in test_contraction.py). So one solve from a distance 15/8 as large arrives there.
    anchor = Anchor(precision=AbsolutePrecision(0.4))
    problem = problem_of(ProductOfExperts.of(["a"], Identity(), Cauchy(), Absolute(1.0), anchor=anchor), 3.0)
    weight = torch.full((1, 1), 0.2, dtype=torch.float64)
    known = run_from(problem, weight, OPTIONS)
    assert bool(known.converged)
    solves: list[Tensor] = []
    solve = Problem.solve
    monkeypatch.setattr(Problem, "solve", lambda self, weights: (solves.append(weights), solve(self, weights))[1])
    run = run_from(problem, weight * torch.tensor(distance * 15 / 8).exp(), OPTIONS, known=known)
    assert (len(solves) == 1) == same
    assert_close(run.point.x, torch.ones(1, 1, 1), 1e-9)


def test_two_minima_with_close_weights_are_told_apart() -> None:
    # Cauchy experts at 1 and -1 with s^2 = 1 - z^2 have minima at z and -z, where (s^2 + (1 + z)^2) / (s^2 + (1 - z)^2)
    # = (1 + z) / (1 - z): log-weights differ by 2 atanh z = 0.06. The slightly more important expert has the lower one.
    z = 0.03
    light, heavy = (
        Expert(name, Identity(), Cauchy(), Absolute((1 - z**2) ** 0.5), importance)
        for name, importance in (("light", 1.0), ("heavy", 1.0 + 2e-6))
    )
    poe = light * heavy * Anchor(precision=AbsolutePrecision(1e-12))
    solution = fixed_point(poe.bind(scalar(1.0, -1.0)), starts=[scalar(z), scalar(-z)])
    assert solution.converged
    assert_close(solution.value, scalar(-z), 0.05)
    assert float(solution.info.start_energies.diff()) < -1e-8


@pytest.mark.parametrize(("share", "accepted"), [(3e-4, True), (1.2e-4, True), (0.9e-4, False), (3e-5, False)])
def test_the_line_search_wants_a_decrease_of_1e_4_of_the_slope(share: float, accepted: bool) -> None:
    # Beyond |x| = 1 Huber's energy is |x| - 1/2. A full step from 10 across the minimum to -10 (1 - 2 share) lowers it
    # by 20 share, while the slope promises 20 (1 - share). Half that step ends at 10 share, next to the minimum.
    center = scalar(2.0)
    anchor = Anchor(center, AbsolutePrecision(1e-9))
    problem = problem_of(ProductOfExperts.of(["a"], Identity(), Huber(1.0), Absolute(1.0), anchor=anchor), 2.0)
    start, full = problem.at(scalar(10.0)), problem.at(scalar(-10.0 * (1 - 2 * share)))
    slope, size = problem.line_minimum(start, full.x - start.x)
    assert float(size) == 1.0
    assert float((full.energy - start.energy) / slope) == pytest.approx(share, rel=1e-3)
    found = _line_search(problem, start, full, torch.tensor([True]))
    assert_close(found.x, full.x if accepted else scalar(10 * share), 1e-9)


@pytest.mark.parametrize("start", [0.5, 0.604, 0.63, 2.0, -0.604, -0.63])
def test_extrapolation_reaches_a_linear_fixed_point_unless_it_is_5_away(start: float) -> None:
    # v -> 0.9 v + b from v = 0 has its fixed point at 10 b, 8.1 b beyond the second plain step 1.9 b. In log-weights.
    anderson = Anderson(depth=1)
    v = scalar(0.0).view(1, 1)
    first = 0.9 * v + start
    assert torch.equal(anderson.propose(v, first), first)
    second = 0.9 * first + start
    expected = 10 * start if abs(8.1 * start) <= 5 else 1.9 * start + 5 * (1 if start > 0 else -1)
    assert_close(anderson.propose(first, second), torch.tensor([[expected]], dtype=torch.float64), 1e-9)


def test_a_forgotten_history_extrapolates_nothing() -> None:
    anderson = Anderson(depth=2)
    points = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    for _ in range(2):
        proposed, points = anderson.propose(points, 0.9 * points + 0.1), 0.9 * points + 0.1
    assert bool((proposed > points).all())
    anderson.forget(torch.tensor([True, False]))
    # The next difference is a new one, so the first iteration starts again from it and the second has two.
    assert bool((anderson._residuals[0][0] == 0).all())
    assert bool((anderson._residuals[0][1] != 0).all())
