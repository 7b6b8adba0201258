"""What the fixed point starts from and what it says of its solution, part by part and against autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference.map import _contraction, _initial_weights, _status, fixed_point, plain_iterates
from inference.problem import Problem
from inference.solution import Status
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Directional,
    Energy,
    Expert,
    FactorExpert,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    average,
    span_statistics,
)
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior
from poe_models.span import span_basis
from tests.helpers import assert_close, merged, name_of, random_updates

NAMES = ["a", "b", "c"]


def design_of(
    residual_map: object, energy: Energy, gamma: float = 0.7, center: object = average, eta: float = 0.2
) -> ProductOfExperts:
    anchor = Anchor(center, AbsolutePrecision(eta))  # type: ignore[arg-type]
    return ProductOfExperts.of(NAMES, residual_map, energy, Relative(gamma), [1.0, 2.0, 0.5], anchor)  # type: ignore[arg-type]


def problem_of(posterior: Posterior) -> Problem:
    return Problem(posterior, quadratic_of(posterior))


def test_every_start_has_the_weights_of_its_place(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    posterior = design_of((OutputGram(), InputGram()), StudentT(3.0)).bind(updates)
    place = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    found = list(_initial_weights(problem_of(posterior), ("ones", "twin", "center", "experts", place)))
    assert [name for name, _ in found] == ["ones", "twin", "center", "expert:a", "expert:b", "expert:c", "point"]
    at_zero = posterior.weights(torch.zeros(2, 6, dtype=torch.float64))
    places = [average(updates), *updates.unbind(1), place]
    expected = [torch.ones(2, 6, dtype=torch.float64), at_zero]
    expected += [posterior.weights(posterior.residuals(each)) for each in places]
    for (name, weights), value in zip(found, expected, strict=True):
        assert_close(weights, value, 1e-12)
        assert weights.shape == (2, 6), name
    with pytest.raises(ValueError, match="no start is called 'middle'"):
        fixed_point(posterior, starts=("twin", "middle"))  # type: ignore[arg-type]


@pytest.mark.parametrize("center", [None, average])
def test_plain_iterates_are_solves_one_after_another(center: object, generator: torch.Generator) -> None:
    posterior = design_of(InputGram(), Cauchy(), center=center).bind(random_updates(generator, 2, 3, 4, 5))
    problem, weights = problem_of(posterior), torch.ones(2, 3, dtype=torch.float64)
    steps = plain_iterates(posterior, weights)
    for _ in range(3):
        z = problem.quadratic.lift(problem.solve(weights).x)
        z = z if posterior.center is None else posterior.center + z
        assert_close(next(steps), z)
        weights = posterior.weights(posterior.residuals(z))


@pytest.mark.parametrize("energy", [Cauchy(), StudentT(3.0), GeneralizedGaussian(4.0), Huber(0.5)], ids=name_of)
@pytest.mark.parametrize("residual_map", [InputGram(), Identity(), (OutputGram(), InputGram())], ids=name_of)
def test_contraction_is_that_of_the_log_weight_map(
    residual_map: object, energy: Energy, generator: torch.Generator
) -> None:
    """At any point: the Jacobian by autograd, Eq. 41's bound written out, and the sign of the dense Hessian."""
    posterior = design_of(residual_map, energy).bind(random_updates(generator, 1, 3, 3, 4))
    problem = problem_of(posterior)
    x = torch.randn(1, *problem.quadratic.event_shape, generator=generator, dtype=torch.float64)
    point = problem.at(x)
    found = _contraction(problem, point)
    weights, curvatures = posterior.weights(point.q)[0], posterior.curvatures(point.q)[0]
    z = posterior.center + problem.quadratic.lift(x)  # type: ignore[operator]
    forces = [e.operator.apply(z - e.update).flatten() for e in posterior.experts]
    units = torch.eye(12, dtype=torch.float64).unflatten(1, (3, 4)).unsqueeze(1)
    h = float(posterior.anchor_precision) * torch.eye(12, dtype=torch.float64)
    for weight, expert in zip(weights, posterior.experts, strict=True):
        h = h + weight * expert.operator.apply(units).flatten(1)
    solved = [torch.linalg.solve(h, force) for force in forces]
    inner = torch.stack([torch.stack([f @ s for s in solved]) for f in forces])
    jacobian = -2 * curvatures[:, None] * inner
    assert float(found.rate) == pytest.approx(float(torch.linalg.eigvals(jacobian).abs().max()), rel=1e-8)
    bound = 2 * sum(abs(c) * f.norm() * s.norm() for c, f, s in zip(curvatures, forces, solved, strict=True))
    assert float(found.bound) == pytest.approx(float(bound), rel=1e-9)
    assert float(found.bound) >= float(found.rate) - 1e-12
    hessian = torch.func.hessian(lambda v: posterior.energy(v.view(1, 3, 4)).sum())(z.flatten())
    assert bool(found.strict) == (float(torch.linalg.eigvalsh(hessian)[0]) > 0)


def test_a_strict_minimum_bends_up_by_more_than_rounding() -> None:
    """Two opposed experts: at zero the curvature is ``2 (1 - ratio)`` of the majoriser's for a ratio worked by hand."""
    updates = torch.tensor([[[[1.0]], [[-1.0]]]], dtype=torch.float64)
    for gamma, strict in ((1.2, True), (0.8, False)):
        # rho = log(1 + q / s^2), rho' + 2 q rho'': positive where q < s^2.
        poe = ProductOfExperts.of(
            ["a", "b"], Identity(), Cauchy(), Relative(gamma), anchor=Anchor(precision=AbsolutePrecision(0.0))
        )
        problem = problem_of(poe.bind(updates))
        found = _contraction(problem, problem.at(torch.zeros(1, 1, 1, dtype=torch.float64)))
        assert bool(found.strict) is strict
        assert float(found.rate) == pytest.approx(2 / (1 + gamma**2), rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ((True, False, False, True), Status.CONVERGED),
        ((True, False, True, True), Status.CONVERGED_LINE_SEARCH),
        ((True, False, False, False), Status.SADDLE),
        ((True, False, True, False), Status.SADDLE),
        ((False, True, False, True), Status.ROUNDING),
        ((False, False, True, True), Status.MAX_STEPS),
    ],
)
def test_a_status_for_every_way_to_stop(flags: tuple[bool, bool, bool, bool], status: Status) -> None:
    assert _status(*flags) is status
    assert status.converged is (status in {Status.CONVERGED, Status.CONVERGED_LINE_SEARCH})


def test_information_is_about_the_solution(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 4, 5)
    updates[1, 2] = 0.0
    updates[2] = 0.0
    posterior = design_of(InputGram(), StudentT(3.0), 0.4, None).bind(updates)
    solution = fixed_point(posterior)
    info, z = solution.info, solution.value
    q = posterior.residuals(z)
    assert info.experts == ("a", "b", "c")
    assert_close(info.energy, posterior.energy(z), 1e-12)
    assert_close(info.weights, posterior.weights(q), 1e-8)
    relative = posterior.weights(q) / posterior.weights(torch.zeros_like(q))
    assert info.inactive.tolist() == [[False] * 3, [False, False, True], [True] * 3]
    assert_close(info.relative_weights[0], relative[0], 1e-8)
    assert_close(info.relative_weights[1, :2], relative[1, :2], 1e-8)
    assert_close(info.weight_spread[0], relative[0].max() / relative[0].min(), 1e-8)
    assert_close(info.weight_spread[1], relative[1, :2].max() / relative[1, :2].min(), 1e-8)
    assert float(info.weight_spread[2]) == 1.0
    scales = torch.stack([e.scale_squared for e in posterior.experts], -1)
    assert_close(info.residuals, q / scales, 1e-8)
    assert torch.equal(info.anchor_precision, posterior.anchor_precision)
    assert info.start_energies.shape[0] == 3
    assert_close(info.start_energies.min(-1).values, info.energy, 1e-9)
    assert info.steps.dtype == info.rejected.dtype == torch.int64
    assert_close(info.energy_trace[:, -1], info.energy, 1e-9)
    assert set(info.start) <= {"twin", "expert:a", "expert:b", "expert:c"}


def test_the_lowest_start_wins_and_the_first_of_equals(generator: torch.Generator) -> None:
    """Experts at 3 and -1 with narrow tails: a minimum near each, and the one of greater importance is lower."""
    updates = torch.tensor([[[[3.0]], [[-1.0]]], [[[3.0]], [[3.0]]]], dtype=torch.float64)
    poe = Expert("a", Identity(), Cauchy(), Relative(0.1)) * Expert(
        "b", Identity(), Cauchy(), Relative(0.1), importance=3.0
    )
    poe = poe * Anchor(precision=AbsolutePrecision(1e-3))
    found = fixed_point(poe.bind(updates), starts=("experts",))
    assert found.info.start == ("expert:b", "expert:a")
    assert float(found.value[0]) == pytest.approx(-1.0, abs=0.01)
    assert float(found.info.start_energies[0, 1]) < float(found.info.start_energies[0, 0])
    single = fixed_point(poe.bind(updates), starts=(torch.full((2, 1, 1), 2.9, dtype=torch.float64),))
    assert single.info.start == ("point", "point")
    assert float(single.value[0]) == pytest.approx(3.0, abs=0.1)


def test_convex_energies_need_one_start(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 4)
    starts = ("experts", "twin")
    for energy, count in ((Gaussian(), 1), (Huber(0.7), 1), (Cauchy(), 4)):
        found = fixed_point(design_of(InputGram(), energy).bind(updates), starts=starts)  # type: ignore[arg-type]
        assert found.info.start_energies.shape == (1, count)
    mixed = Expert("a", InputGram(), Gaussian(), Relative(0.3)) * Expert("b", InputGram(), Cauchy(), Relative(0.3))
    assert fixed_point((mixed * Anchor()).bind(updates[:, :2]), starts=starts).info.start_energies.shape == (1, 3)  # type: ignore[arg-type]


def test_values_are_batched_in_the_posteriors_coordinates_and_dtype(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = design_of(InputGram(), StudentT(3.0, "multivariate"))
    for coordinates, event, half in (("full", (4, 5), torch.float32), ("span", (4, 1), torch.float64)):
        posterior = poe.bind(updates, coordinates=coordinates)  # type: ignore[arg-type]
        found = fixed_point(posterior)
        alone = poe.bind(updates[0], coordinates=coordinates)  # type: ignore[arg-type]
        value = fixed_point(alone).value
        assert value.shape == (1, *event)
        assert alone.update(value).shape == (1, 4, 5)
        assert_close(alone.update(value), posterior.update(found.value)[:1], 1e-9)
        of_half = poe.bind(updates.half(), coordinates=coordinates)  # type: ignore[arg-type]
        assert fixed_point(of_half).value.dtype == of_half.dtype == half
    coefficients = posterior.coefficients(found.value)
    of_coefficients = torch.einsum("mj,mjab->mab", coefficients, span_basis(poe, updates))
    assert_close(posterior.update(found.value), of_coefficients, 1e-12)
    from_statistics = poe.bind(span_statistics(poe, updates))
    assert_close(from_statistics.coefficients(fixed_point(from_statistics).value), coefficients, 1e-9)
    with pytest.raises(ValueError, match="Full coordinates have none"):
        poe.bind(updates).coefficients(fixed_point(poe.bind(updates)).value)


def test_one_expert_alone_from_the_centre(generator: torch.Generator) -> None:
    update = random_updates(generator, 1, 1, 4, 5)
    poe = ProductOfExperts.of(
        ["a"], InputGram(), Cauchy(), Relative(0.7), anchor=Anchor(precision=AbsolutePrecision(0.2))
    )
    found = fixed_point(poe.bind(update), starts=("center",))
    assert found.converged
    assert found.info.start == ("center",)
    assert_close(found.value, fixed_point(poe.bind(update)).value, 1e-8)


def test_ranks_are_found_in_span_as_soon_as_one_energy_needs_them(generator: torch.Generator) -> None:
    """Directional experts, for which Span is Full: one energy knows its dimension, the other does not."""
    updates = random_updates(generator, 2, 2, 4, 5)
    poe = Expert("a", Directional(), StudentT(3.0, "multivariate"), Relative(0.7))
    poe = poe * Expert("b", Directional(), Cauchy(), Relative(0.7)) * Anchor(precision=AbsolutePrecision(0.2))
    assert_close(merged(poe.bind(updates, coordinates="span")), merged(poe.bind(updates)), 1e-7)


def test_a_step_tolerance_gives_the_iterate_as_it_is(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    poe = design_of(InputGram(), Cauchy())
    found = fixed_point(poe.bind(updates), starts=("ones",), step_tolerance=1e-2, acceleration=False)
    assert bool(found.info.forward_error.isnan())
    steps = plain_iterates(poe.bind(updates), torch.ones(1, 3, dtype=torch.float64))
    iterates = [next(steps) for _ in range(int(found.info.steps))]
    assert_close(found.value, iterates[-1], 1e-12)
    assert float((iterates[-1] - iterates[-2]).norm()) <= 1e-2 < float((iterates[-2] - iterates[-3]).norm())


def test_what_cannot_be_solved_is_named(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = design_of(InputGram(), Cauchy())
    with pytest.raises(ValueError, match="'full' or 'span'"):
        fixed_point(poe.bind(updates, coordinates="half"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factors save nothing"):
        fixed_point(poe.bind(updates, coordinates="span", low_rank=(updates, updates)))
    with pytest.raises(ValueError, match="a sequence of starts"):
        fixed_point(poe.bind(updates), starts="twin")  # type: ignore[arg-type]
    steep = replace(poe, experts=(*poe.experts[:2], replace(poe.experts[2], energy=Custom(lambda q: q.sqrt()))))
    with pytest.raises(ValueError, match=r"expert 'c' .* at the start 'twin' in module 0"):
        fixed_point(steep.bind(updates))
    fixed_point(steep.bind(updates), starts=("ones",), max_steps=2)
    factor = poe * FactorExpert("own", lambda c: c.square().sum(-1), coordinates="span")
    with pytest.raises(ValueError, match="'own' is a FactorExpert"):
        fixed_point(factor.bind(updates, coordinates="span"))
