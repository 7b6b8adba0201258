"""Thresholds of the solver's problem and its line search, each from the side where it matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from inference.problem import Point, Problem
from inference.reweighting import _line_search, init, step
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Expert,
    Gaussian,
    GeneralizedGaussian,
    Identity,
    ProductOfExperts,
)
from poe_models.least_squares import quadratic_of
from poe_models.precisions import NotPositiveDefiniteError
from tests.helpers import assert_close, random_updates
from tests.reweighted import a_run, problem_of


@pytest.mark.parametrize("unit", [1.0, 1e3])
@pytest.mark.parametrize(("square", "telling"), [(10.0, True), (198.0, True), (200.0, False), (220.0, False)])
def test_rows_that_are_a_hundred_times_too_small_tell_nothing(
    square: float, telling: bool, unit: float, generator: torch.Generator
) -> None:
    """Every second of 64 rows is measured; the mean square of all is `(1 + square) / 2` times theirs."""
    problem = problem_of(random_updates(generator, 2, 3, 64, 32))
    weights = torch.tensor([[1.0, 2.0, 0.5], [0.3, 1.0, 1.0]], dtype=torch.float64)
    solved = problem.solve(weights).x
    x = torch.full((2, 64, 32), unit, dtype=torch.float64)
    x[:, 1::2] *= square**0.5
    found = problem._measured_error(weights, problem.precision_near(weights), x)
    rows = (x - solved)[:, ::2]  # a correction leads to the solution
    expected = rows.square().sum((1, 2)).sqrt() / x[:, ::2].square().sum((1, 2)).sqrt()
    if telling:
        assert_close(found, expected, 1e-9)
    else:
        assert bool(found.isinf().all())


@dataclass(frozen=True, eq=False)
class Stuck:
    """A precision matrix whose every solve gives the same correction."""

    correction: Tensor

    def solve(self, _: Tensor) -> Tensor:
        return self.correction


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_an_error_above_the_limit_is_rounding(
    dtype: torch.dtype, limit: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrections of a share of the solution each, which never end."""
    problem = problem_of(random_updates(generator, 1, 3, 4, 5, dtype=dtype), Identity())
    run = a_run(problem, tolerance=1e-2)
    assert bool(run.converged)
    for share, good in ((0.9, True), (1.1, False), (1.4, False)):
        stuck = Stuck(share * limit * run.point.x)
        monkeypatch.setattr(Problem, "precision_near", lambda self, weights, stuck=stuck: stuck)
        found = problem.refine(run)
        assert (found.converged.tolist(), found.rounding.tolist()) == ([good], [not good])
        assert float(found.forward_error) == pytest.approx(share * limit, rel=1e-2)


def test_a_factored_matrix_is_used_again_for_the_same_weights_only(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5))
    weights = torch.tensor([[1e3, 2.0, 0.5], [0.3, 1e-3, 1.0]], dtype=torch.float64)
    problem.solve(weights)
    kept = problem.precision_near(weights)
    for error, same in ((0.0, True), (0.9e-10, True), (1.2e-10, False), (-0.9e-10, True), (-1.2e-10, False)):
        near = weights.clone()
        near[1, 1] *= 1 + error
        assert (problem.precision_near(near) is kept) is same
    assert Problem(problem.posterior, problem.quadratic).precision_near(weights) is not kept


@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_both_parts_of_the_gradient_are_relative_to_the_pulls(unit: float, generator: torch.Generator) -> None:
    """``|H x - b|`` and ``eta |x|`` over ``|b|``, the length of the experts' weighted pulls, whatever it is."""
    problem = problem_of(random_updates(generator, 2, 3, 4, 5) * unit, eta=0.3 / unit**2)
    point = problem.at(torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) * unit)
    weights = point.log_weights.exp()
    b = sum(weights[:, i, None, None] * pull for i, pull in enumerate(problem.pulls))
    hx = 0.3 / unit**2 * point.x
    for i, operator in enumerate(problem.quadratic.operators):
        hx = hx + weights[:, i, None, None] * operator.apply(point.x)
    length = b.square().sum((1, 2)).sqrt()  # type: ignore[union-attr]
    found = problem.gradient(point)
    assert_close(found.norm, (hx - b).square().sum((1, 2)).sqrt() / length, 1e-10)
    assert_close(found.anchor, 0.3 / unit**2 * point.x.square().sum((1, 2)).sqrt() / length, 1e-10)


def test_weights_without_a_solution_give_way_to_the_plain_ones(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5))
    plain, proposed = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    one, other = problem.solve(plain.exp()), problem.solve(proposed.exp())
    used, point = problem.extrapolated(proposed, plain)
    assert used is proposed
    assert torch.equal(point.x, other.x)
    solve = Problem.solve

    def unless_proposed(self: Problem, weights: Tensor) -> Point:
        if torch.equal(weights, proposed.exp()):
            raise NotPositiveDefiniteError([0])
        return solve(self, weights)

    monkeypatch.setattr(Problem, "solve", unless_proposed)
    used, point = problem.extrapolated(proposed, plain)
    assert used is plain
    assert torch.equal(point.x, one.x)


class Proposing:
    """An extrapolation that proposes what it is told to, and remembers what it was to forget."""

    def __init__(self, proposed: Tensor) -> None:
        self.proposed = proposed
        self.forgotten: list[list[bool]] = []

    def propose(self, used: Tensor, plain: Tensor) -> Tensor:
        return self.proposed

    def forget(self, where: Tensor) -> None:
        self.forgotten.append(where.tolist())


def test_an_extrapolation_is_taken_back_where_it_is_worse(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three modules; the third is done and stays whatever is found for it."""
    problem = problem_of(random_updates(generator, 3, 3, 4, 5))
    state = init(problem, torch.ones(3, 3, dtype=torch.float64))
    state = replace(state, converged=torch.tensor([False, False, True]))
    plain, proposed = state.point.log_weights, torch.randn(3, 3, generator=generator, dtype=torch.float64)
    answers = [torch.tensor([False, True, True]), torch.tensor([False, False, False])]
    monkeypatch.setattr(Problem, "uphill", lambda *_: answers.pop(0))
    anderson = Proposing(proposed)
    found = step(problem, state, anderson)  # type: ignore[arg-type]
    assert anderson.forgotten == [[False, True, False]]
    assert torch.equal(found.used, torch.stack([proposed[0], plain[1], state.used[2]]))
    each = [problem.solve(proposed.exp()).x[0], problem.solve(plain.exp()).x[1], state.point.x[2]]
    assert_close(found.point.x, torch.stack(each), 1e-12)
    assert (found.rejected.tolist(), found.searched.tolist()) == ([0, 1, 0], [False] * 3)
    assert found.steps.tolist() == [2, 2, 1]


def mixed_problem() -> Problem:
    """One concave expert beside one that is not."""
    poe = Expert("a", Identity(), Cauchy(), Absolute(1.0)) * Expert("b", Identity(), GeneralizedGaussian(4.0))
    updates = torch.tensor([[[[3.0]], [[1.0]]]], dtype=torch.float64)
    posterior = (poe * Anchor(precision=AbsolutePrecision(0.3))).bind(updates)
    return Problem(posterior, quadratic_of(posterior))


def test_one_expert_that_is_not_concave_is_enough_to_ask_the_gradient() -> None:
    problem = mixed_problem()
    low, high = (problem.at(torch.full((1, 1, 1), at, dtype=torch.float64)) for at in (1.0, 3.0))
    assert float(problem.gradient(high).norm) > float(problem.gradient(low).norm)
    level = replace(high, energy=low.energy)
    assert bool(problem.uphill(low, level))
    assert not bool(problem.uphill(level, low))


def test_a_step_that_lowers_the_energy_by_less_than_rounding_is_taken() -> None:
    """E = (x - 3)^2 / 2 + x^2 / 2 has its minimum 9/4 at 3/2; from 1e-9 beside it, a step of 2e-9 is halved."""
    poe = ProductOfExperts.of(
        ["a"], Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.5))
    )
    posterior = poe.bind(torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64))
    problem = Problem(posterior, quadratic_of(posterior))
    start, end = (problem.at(torch.full((1, 1, 1), 1.5 + off, dtype=torch.float64)) for off in (1e-9, -1e-9))
    assert float(start.energy) == pytest.approx(2.25, abs=1e-12)
    found = _line_search(problem, start, end, torch.tensor([True]))
    assert abs(float(found.x) - 1.5) < 1e-11
    stays = _line_search(problem, start, end, torch.tensor([False]))
    assert torch.equal(stays.x, start.x)
