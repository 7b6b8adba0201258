"""The parts of the reweighted iteration: gradients by autograd, line minima, refinement, selection."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from inference.problem import FORWARD_ERROR, Point, Problem, Run
from inference.reweighting import SolverOptions, _line_search, choose, select
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Identity,
    OutputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    Welsch,
)
from poe_models.least_squares import quadratic_of
from tests.helpers import assert_close, name_of, random_updates
from tests.reweighted import MAPS, NAMES, a_run, problem_of

EPS = torch.finfo(torch.float64).eps


def somewhere(problem: Problem, generator: torch.Generator) -> Tensor:
    return torch.randn(
        problem.posterior.num_modules, *problem.quadratic.event_shape, generator=generator, dtype=torch.float64
    )


def energy_along(problem: Problem, x: Tensor) -> Tensor:
    """The posterior's own energy of a displacement, ``(M,)``."""
    center = problem.posterior.center
    assert center is not None
    return problem.posterior.energy(center + problem.quadratic.lift(x))


@pytest.mark.parametrize("design", MAPS, ids=name_of)
def test_energy_and_gradient_at_a_point_are_the_posteriors(design: object, generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5), design)
    x = somewhere(problem, generator)
    point = problem.at(x)
    assert_close(point.energy, energy_along(problem, x))
    assert_close(point.q, problem.quadratic.residuals(x))
    assert_close(point.log_weights.exp(), problem.posterior.weights(point.q))
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy_along(problem, leaf).sum(), leaf)
    assert_close(2 * problem.half_gradient(point), gradient)
    weights = point.log_weights.exp()
    b = sum(weights[:, i, None, None] * pull for i, pull in enumerate(problem.pulls))
    size = (gradient / 2).square().sum((-2, -1)).sqrt() / b.square().sum((-2, -1)).sqrt()  # type: ignore[union-attr]
    assert_close(problem.gradient(point).norm, size)


def test_a_gradient_beside_cancelling_pulls_is_measured_by_their_size() -> None:
    """Two opposed experts: their pulls cancel, and half a unit of rounding of the sum is no gradient."""
    updates = torch.tensor([[[[3.0]], [[-3.0]]]], dtype=torch.float64)
    problem = problem_of(updates, Identity(), Gaussian())
    weight = 0.5 / (0.49 * 9)  # rho' over s^2
    tiny = torch.full((1, 1, 1), 1e-17, dtype=torch.float64)
    half = (2 * weight + 0.3) * 1e-17
    assert_close(problem.gradient(problem.at(tiny)).norm, half / (EPS * 2 * weight * 3))
    assert float(problem.gradient(problem.at(0 * tiny)).norm) == 0.0


@pytest.mark.parametrize("energy", [Cauchy(), StudentT(3.0), GeneralizedGaussian(4.0)], ids=name_of)
@pytest.mark.parametrize("design", MAPS, ids=name_of)
def test_the_line_minimum_is_newtons(design: object, energy: Energy, generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 3, 3, 4, 5), design, energy)
    x = somewhere(problem, generator)
    ahead = -problem.half_gradient(problem.at(x))
    away = torch.tensor([3.0, 1e-3, 1.0], dtype=torch.float64)[:, None, None]
    direction = ahead * away  # far, hardly, somewhat: the step is cut at 1 where it is longer

    def along(size: Tensor) -> Tensor:
        return energy_along(problem, x + size[:, None, None] * direction).sum()

    zero = torch.zeros(3, dtype=torch.float64)
    first = torch.func.grad(along)(zero)
    second = torch.func.hessian(along)(zero).diagonal()
    slope, size = problem.line_minimum(problem.at(x), direction)
    assert_close(slope, first)
    newton = torch.where(second > 0, (-first / second).clamp(max=1.0), 0.5)
    assert_close(size, newton)


def test_the_line_minimum_has_every_kind_of_step() -> None:
    """A quadratic cut at 1, one inside, and a direction that bends down, where half of the step is tried."""
    problem = problem_of(torch.tensor([[[[2.0]], [[1.0]]]], dtype=torch.float64), Identity(), Gaussian(), gamma=1.0)
    at = problem.at(torch.full((1, 1, 1), 1.0, dtype=torch.float64))
    # H = 1 / 8 + 1 / 2 + 0.3 about the average; a direction of -1 has its minimum at a step of 1.
    gradient = float(problem.half_gradient(at).squeeze())
    curvature = 1 / 8 + 1 / 2 + 0.3
    for length, expected in ((0.5, 1.0), (gradient / curvature, 1.0), (4.0, gradient / curvature / 4.0)):
        _, size = problem.line_minimum(at, torch.full((1, 1, 1), -length, dtype=torch.float64))
        assert float(size) == pytest.approx(expected, rel=1e-12)
    bent = problem_of(torch.tensor([[[[3.0]], [[-3.0]]]], dtype=torch.float64), Identity(), Welsch(), 1e-3, 0.3)
    slope, size = bent.line_minimum(
        bent.at(torch.full((1, 1, 1), 2.0, dtype=torch.float64)), torch.ones(1, 1, 1, dtype=torch.float64)
    )
    assert float(size) == 0.5


def moved(point: Point, energy: float) -> Point:
    return replace(point, energy=point.energy + energy)


def test_uphill_is_beyond_rounding_and_for_energies_that_are_not_concave_by_the_gradient() -> None:
    updates = torch.tensor([[[[3.0]], [[1.0]]]], dtype=torch.float64)
    for energy, concave in ((Cauchy(), True), (GeneralizedGaussian(4.0), False)):
        problem = problem_of(updates, Identity(), energy)
        low, high = (problem.at(torch.full((1, 1, 1), at, dtype=torch.float64)) for at in (0.1, 0.5))
        slack = 8 * EPS * float(low.energy)
        assert float(problem.slack(low.energy)) == slack
        assert float(problem.slack(-low.energy)) == slack
        steeper = replace(high, energy=low.energy)  # as far as the energy tells, no higher
        assert float(problem.gradient(high).norm) > float(problem.gradient(low).norm)
        assert bool(problem.uphill(low, steeper)) is not concave
        assert not bool(problem.uphill(steeper, low))
        assert not bool(problem.uphill(low, low))
        assert bool(problem.uphill(low, moved(steeper, 2 * slack)))
        assert not bool(problem.uphill(low, moved(steeper, -2 * slack)))
        assert bool(problem.uphill(low, moved(low, math.nan)))
        assert not bool(problem.uphill(low, moved(low, 0.5 * slack)))


def test_a_module_that_nothing_holds_stays_at_the_centre(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    updates[0] = 0.0
    poe = ProductOfExperts.of(
        NAMES[:2], OutputGram(), Cauchy(), Relative(1.0), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    posterior = poe.bind(updates)
    problem = Problem(posterior, quadratic_of(posterior))
    assert problem.ridge.tolist() == [1.0, 0.0, 0.0]
    anchored = problem_of(updates, OutputGram())
    assert anchored.ridge.tolist() == [0.3, 0.3, 0.3]
    assert_close(problem.solve(torch.ones(3, 2, dtype=torch.float64)).x[0], torch.zeros_like(updates[0, 0]))


def test_refinement_undoes_what_was_done_to_a_solution(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5))
    run = a_run(problem)
    assert bool(run.converged.all())
    shifted = replace(run.point, x=run.point.x * (1 + 1e-6))
    refined = problem.refine(replace(run, point=shifted))
    assert_close(refined.point.x, run.point.x, 1e-9)
    assert_close(refined.point.energy, problem.at(refined.point.x).energy, 1e-15)
    assert bool((refined.forward_error < 0.01 * FORWARD_ERROR[torch.float64]).all())
    # A module that had not converged is left as it is, without an error of its own.
    loose = problem.refine(replace(run, point=shifted, converged=torch.tensor([True, False])))
    assert_close(loose.point.x[1], shifted.x[1], 1e-15)
    assert bool(loose.forward_error[1].isnan())
    assert not bool(loose.forward_error[0].isnan())
    assert loose.rounding.tolist() == [False, False]


def test_refinement_goes_on_until_the_last_module_is_done(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 2, 3, 4, 5))
    run = a_run(problem)
    off = run.point.x * torch.tensor([1.0, 1.1], dtype=torch.float64)[:, None, None]
    refined = problem.refine(replace(run, point=replace(run.point, x=off)))
    assert bool((refined.forward_error < 0.01 * FORWARD_ERROR[torch.float64]).all())
    assert bool(refined.converged.all())
    assert_close(refined.point.x, run.point.x, 1e-9)


def test_refinement_says_what_it_could_not_mend(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections that solve with half of the precision matrix overshoot for ever: an error of the size of ``Z``."""
    problem = problem_of(random_updates(generator, 1, 3, 4, 5))
    run = a_run(problem)
    off = replace(run, point=replace(run.point, x=1.1 * run.point.x))
    problem = Problem(problem.posterior, problem.quadratic)  # without what the run has factored
    precision = problem.quadratic.precision

    def twice_too_far(self: object, weights: Tensor, shift: Tensor) -> object:
        return precision(0.5 * weights, 0.5 * shift)

    monkeypatch.setattr(type(problem.quadratic), "precision", twice_too_far)
    found = problem.refine(off)
    # Every correction turns the error of 10 % around: 0.2 of the solution from one side to the other.
    assert float(found.forward_error) == pytest.approx(0.2 / 0.9, rel=1e-6)
    assert (found.converged.tolist(), found.rounding.tolist()) == ([False], [True])
    silent = problem.refine(replace(off, converged=torch.tensor([False])))
    assert silent.rounding.tolist() == [False]


def test_a_basin_is_a_log_weight_on_either_side(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    updates[:, 2] = 0.0
    problem = problem_of(updates)
    known = problem.at(problem.quadratic.targets[0])
    assert problem.posterior.active.tolist() == [[True, True, False]]
    for place, off, same in ((0, 0.5, False), (1, -0.5, False), (0, 0.01, True), (1, -0.01, True), (2, 5.0, True)):
        moved_there = known.log_weights.clone()
        moved_there[:, place] += off
        assert problem.same_basin(replace(known, log_weights=moved_there), known).tolist() == [same]


def test_a_line_search_ends_between_the_points_and_lower(generator: torch.Generator) -> None:
    problem = problem_of(random_updates(generator, 3, 3, 4, 5), energy=GeneralizedGaussian(6.0))
    point = problem.at(somewhere(problem, generator))
    candidate = problem.at(point.x - 3 * problem.half_gradient(point) / problem.half_gradient(point).norm())
    worse = torch.tensor([True, True, False])
    found = _line_search(problem, point, candidate, worse)
    direction = candidate.x - point.x
    slope, size = problem.line_minimum(point, direction)
    assert bool((slope < 0).all())
    share = ((found.x - point.x) * direction).sum((-2, -1)) / direction.square().sum((-2, -1))
    assert_close(found.x, point.x + share[:, None, None] * direction)
    assert float(share[2]) == 0.0
    # The first trial is Newton's; each after it half of the one before.
    halvings = torch.log2(size / share)[:2]
    assert_close(halvings, halvings.round(), 1e-9)
    assert bool((halvings > -1e-9).all())
    assert bool((found.energy < point.energy)[:2].all())
    assert_close(found.energy, problem.at(found.x).energy, 1e-14)


def filled(length: int, value: float) -> Run:
    """A run of two modules in which every number is the same."""
    of = {
        field.name: torch.full((2,), value)
        for field in fields(Run)
        if field.name not in {"point", "trace", "converged", "rounding", "searched"}
    }
    flags = {name: torch.full((2,), value > 1) for name in ("converged", "rounding", "searched")}
    point = Point(*(torch.full(shape, value) for shape in ((2, 3, 4), (2, 5), (2,), (2, 5))))
    trace = value + torch.arange(length).expand(2, -1) / 10
    return Run(point=point, trace=trace, **of, **flags)  # type: ignore[arg-type]


def test_selection_is_by_module_and_traces_end_level() -> None:
    one, other = filled(2, 2.0), filled(4, 1.0)
    where = torch.tensor([True, False])
    chosen = select(where, one, other)
    for field in fields(Run):
        value = getattr(chosen, field.name)
        if field.name not in {"point", "trace"}:
            assert value.tolist() == [getattr(one, field.name)[0], getattr(other, field.name)[1]], field.name
    assert_close(chosen.trace, torch.tensor([[2.0, 2.1, 2.1, 2.1], [1.0, 1.1, 1.2, 1.3]]), 1e-6)
    assert_close(select(~where, other, one).trace, chosen.trace, 1e-6)
    for field in fields(Point):
        for point in (chosen.point, choose(where, one.point, other.point)):
            value = getattr(point, field.name)
            assert bool((value[0] == 2.0).all())
            assert bool((value[1] == 1.0).all())


def test_settings_that_cannot_be_are_refused() -> None:
    for options in ({"starts": ()}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="at least one start and one step"):
            SolverOptions(**options)  # type: ignore[arg-type]
    SolverOptions(max_steps=1)
    assert SolverOptions() == SolverOptions(("twin", "experts"), 100, None, None, True)
