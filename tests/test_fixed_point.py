"""The fixed point against dense normal equations, published closed forms and identities."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from inference.map import plain_iterates
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Diagonal,
    Directional,
    Energy,
    Expert,
    Gaussian,
    Identity,
    InputGram,
    NormScaled,
    Operator,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    StudentT,
    Welsch,
    average,
)
from tests.helpers import ENERGIES, MAPS, assert_close, merged, name_of, random_updates

NAMES = ["a", "b", "c"]

SHAPES = [(5, 4), (3, 9), (40, 2), (2, 40), (1, 6), (6, 1)]


class InverseVariance(ResidualMap):
    """A diagonal map, standing in for Fisher: entries weigh as their squared update."""

    def operator(self, update: Tensor) -> Operator:
        return Diagonal(update.square())


def dense_solution(poe: ProductOfExperts, updates: Tensor, weights: Tensor) -> Tensor:
    """argmin of sum_i w_i q_i + eta |Z - Z_0|^2 for one module, with P_i as dense matrices on vec(Z)."""
    posterior = poe.bind(updates)
    shape = posterior.event_shape
    size = shape[0] * shape[1]
    units = torch.eye(size, dtype=torch.float64).unflatten(1, shape).unsqueeze(1)
    matrix = float(posterior.anchor_precision) * torch.eye(size, dtype=torch.float64)
    center = torch.zeros(size, dtype=torch.float64) if posterior.center is None else posterior.center.flatten()
    b = float(posterior.anchor_precision) * center
    for expert, weight in zip(posterior.experts, weights, strict=True):
        operator = expert.operator.apply(units).flatten(1)
        matrix = matrix + weight * operator
        b = b + weight * operator @ expert.update.flatten()
    return torch.linalg.solve(matrix, b).unflatten(0, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual_map", [*MAPS, InverseVariance()], ids=name_of)
@pytest.mark.parametrize("centred", [False, True])
def test_solution_satisfies_the_dense_normal_equations(
    residual_map: object, shape: tuple[int, int], centred: bool, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, *shape)
    anchor = Anchor(average if centred else None, RelativePrecision(1e-2))
    poe = ProductOfExperts.of(NAMES, residual_map, StudentT(3.0), Relative(0.5), [1.0, 2.0, 0.3], anchor)  # type: ignore[arg-type]
    solution = fixed_point(poe.bind(updates))
    assert solution.converged
    assert_close(solution.value[0], dense_solution(poe, updates, solution.info.weights[0]), 1e-7)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_energy_never_increases_and_the_gradient_vanishes(
    residual_map: object, energy: Energy, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 3, 4, 5, 6)
    poe = ProductOfExperts.of(list("abcd"), residual_map, energy, Relative(0.3), anchor=Anchor(average))  # type: ignore[arg-type]
    posterior = poe.bind(updates)
    for acceleration in (True, False):
        solution = fixed_point(poe.bind(updates), acceleration=acceleration, max_steps=3000)
        info = solution.info
        assert solution.converged
        slack = 1e-14 * info.energy_trace.abs().amax()
        assert float(info.energy_trace.diff().clamp(min=0).amax()) <= slack if info.energy_trace.shape[1] > 1 else True
        assert_close(posterior.energy(solution.value), info.energy, 1e-10)
        z = solution.value.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(posterior.energy(z).sum(), z)
        zero = torch.zeros_like(z, requires_grad=True)
        (reference,) = torch.autograd.grad(posterior.energy(zero).sum(), zero)
        assert float(gradient.norm()) < 1e-7 * float(reference.norm())
        assert_close(info.weights, posterior.weights(posterior.residuals(solution.value)), 1e-6)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_acceleration_changes_the_speed_and_not_the_answer(residual_map: object, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 4, 5, 6)
    poe = ProductOfExperts.of(list("abcd"), residual_map, Cauchy(), Relative(0.5), anchor=Anchor(average))  # type: ignore[arg-type]
    fast = fixed_point(poe.bind(updates), starts=["twin"])
    slow = fixed_point(poe.bind(updates), starts=["twin"], acceleration=False, max_steps=5000)
    assert_close(fast.value, slow.value, 1e-7)
    assert int(fast.info.steps.sum()) <= int(slow.info.steps.sum())


def test_gaussian_identity_with_equal_weights_is_the_average(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(
        NAMES, Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(1e-12))
    )
    solution = fixed_point(poe.bind(updates))
    assert_close(solution.value, updates.mean(1), 1e-11)
    assert solution.info.steps.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (50, 3), (3, 50)])
def test_gaussian_input_gram_is_bmms_formula_in_its_units(shape: tuple[int, int], generator: torch.Generator) -> None:
    # [BMM]: Z = (sum U_i P_i + lambda Z_0)(sum P_i + lambda I)^-1 with lambda = 2 eta s^2 for rho = q / 2 at scale s.
    updates = random_updates(generator, 1, 3, *shape)
    scale, eta = 1.7, 0.37
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Gaussian(), Absolute(scale), anchor=Anchor(average, AbsolutePrecision(eta))
    )
    grams = updates[0].mT @ updates[0]
    ridge = 2 * eta * scale**2
    center = updates[0].mean(0)
    numerator = (updates[0] @ grams).sum(0) + ridge * center
    expected = numerator @ torch.linalg.inv(grams.sum(0) + ridge * torch.eye(shape[1], dtype=torch.float64))
    assert_close(fixed_point(poe.bind(updates[0])).value, expected, 1e-10)


def test_directional_by_woodbury_by_dense_solve_and_as_the_interpolant(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    theta = updates[0].flatten(1).mT  # (D, N)
    gram = theta.mT @ theta
    center = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    for z_0 in (None, center):
        start = torch.zeros(20, dtype=torch.float64) if z_0 is None else z_0.flatten()
        poe = ProductOfExperts.of(
            NAMES, Directional(), Cauchy(), Relative(0.7), anchor=Anchor(z_0, RelativePrecision(0.3))
        )
        solution = fixed_point(poe.bind(updates[0]))
        weights, eta = solution.info.weights[0], float(solution.info.anchor_precision)
        # DESIGN fact 2: Z = Z_0 + Theta c, c = (eta diag(1/w) + G)^-1 (diag G - Theta^T vec Z_0).
        c = torch.linalg.solve(torch.diag(eta / weights) + gram, gram.diagonal() - theta.mT @ start)
        assert_close(solution.value.flatten(), start + theta @ c, 1e-8)
        assert_close(solution.value, dense_solution(poe, updates, weights), 1e-8)
        # As eta -> 0 every expert is satisfied at once, whatever the energy.
        interpolant = start + theta @ torch.linalg.solve(gram, gram.diagonal() - theta.mT @ start)
        for energy in (Gaussian(), Cauchy(), Welsch()):
            tight = ProductOfExperts.of(
                NAMES, Directional(), energy, Relative(0.7), anchor=Anchor(z_0, RelativePrecision(1e-9))
            )
            assert_close(fixed_point(tight.bind(updates[0])).value.flatten(), interpolant, 1e-7)


def released_poe_cauchy(updates: Tensor, gamma: float, jitter: float, steps: int) -> list[Tensor]:
    """[PoE]'s released rule from ALGORITHMS.md, written down independently, on dense matrices."""
    grams = [a @ a.mT for a in updates]
    norms = [float(a.square().sum()) for a in updates]
    alphas, iterates = [1.0] * len(updates), []
    for _ in range(steps):
        left = sum(alpha * gram for alpha, gram in zip(alphas, grams, strict=True))
        right = sum(alpha * gram @ a for alpha, gram, a in zip(alphas, grams, updates, strict=True))
        merged = torch.linalg.solve(left + jitter * torch.eye(len(left), dtype=left.dtype), right)
        iterates.append(merged)
        alphas = [
            1 / (float((a.mT @ (merged - a)).square().sum()) + gamma * norm)
            for a, norm in zip(updates, norms, strict=True)
        ]
    return iterates


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (60, 3)])
@pytest.mark.parametrize("gamma", [2.0, 0.3, 0.01])
def test_the_released_algorithm_step_by_step_and_at_convergence(
    shape: tuple[int, int], gamma: float, generator: torch.Generator
) -> None:
    updates = 0.2 * random_updates(generator, 1, 4, *shape)
    poe = ProductOfExperts.of(
        list("abcd"), OutputGram(), Cauchy(), NormScaled(gamma), anchor=Anchor(precision=AbsolutePrecision(1e-3))
    )
    reference = released_poe_cauchy(updates[0], gamma, 1e-3, 3000)
    ours = plain_iterates(poe.bind(updates), torch.ones(1, 4, dtype=torch.float64))
    for mine, theirs in zip(itertools.islice(ours, 25), reference, strict=False):
        assert_close(mine[0], theirs, 1e-8)
    # at 0.01 there are several minima, and accelerated steps may lead to another one than plain ones
    converged = fixed_point(poe.bind(updates[0]), starts=["ones"], acceleration=gamma > 0.1, max_steps=3000)
    assert converged.converged
    assert float((reference[-1] - reference[-2]).norm()) < 1e-9
    assert_close(converged.value, reference[-1], 1e-8)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
@pytest.mark.parametrize("copies", [1, 3])
def test_one_expert_and_identical_experts_come_back(
    residual_map: object, copies: int, generator: torch.Generator
) -> None:
    expert = random_updates(generator, 1, 1, 4, 5)
    updates = expert.expand(1, copies, 4, 5)
    names = NAMES[:copies]
    errors = []
    for eta in (1e-3, 1e-4):
        poe = ProductOfExperts.of(names, residual_map, anchor=Anchor(precision=RelativePrecision(eta)))  # type: ignore[arg-type]
        error = fixed_point(poe.bind(updates)).value - expert[:, 0]
        errors.append(float(error.norm() / expert.norm()))
    assert errors[0] < 0.2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # of order eta
    anchored = ProductOfExperts.of(names, residual_map, anchor=Anchor(average, RelativePrecision(0.1)))  # type: ignore[arg-type]
    assert_close(fixed_point(anchored.bind(updates)).value, expert[:, 0], 1e-14)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_order_does_not_matter_and_an_expert_twice_is_weight_two(
    residual_map: object, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    poe = ProductOfExperts.of(NAMES, residual_map, anchor=anchor)  # type: ignore[arg-type]
    expected = fixed_point(poe.bind(updates)).value
    assert_close(fixed_point(poe.bind(updates[:, [2, 0, 1]])).value, expected, 1e-8)
    doubled = ProductOfExperts.of([*NAMES, "d"], residual_map, anchor=anchor)  # type: ignore[arg-type]
    weighted = ProductOfExperts.of(NAMES, residual_map, importance=[1.0, 1.0, 2.0], anchor=anchor)  # type: ignore[arg-type]
    twice = torch.cat([updates, updates[:, 2:]], 1)
    assert_close(fixed_point(doubled.bind(twice)).value, fixed_point(weighted.bind(updates)).value, 1e-8)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_scaled_updates_give_a_scaled_merge_under_relative_scales(
    residual_map: object, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, residual_map, StudentT(2.0), Relative(0.4), anchor=Anchor(average))  # type: ignore[arg-type]
    assert_close(fixed_point(poe.bind(1e-3 * updates)).value, 1e-3 * fixed_point(poe.bind(updates)).value, 1e-8)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_a_zero_expert_is_legal(residual_map: object, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    with_zero = torch.cat([updates, torch.zeros_like(updates[:, :1])], 1)
    anchor = Anchor(precision=AbsolutePrecision(0.3))
    solution = fixed_point(ProductOfExperts.of([*NAMES, "zero"], residual_map, anchor=anchor).bind(with_zero))  # type: ignore[arg-type]
    assert solution.converged
    has_identity = "Identity" in repr(residual_map)
    if not has_identity:  # a map made from the update is zero: the expert drops out with a note
        assert solution.record(0)["inactive"] == [n for n in solution.info.experts if n.split("/")[0] == "zero"]
        without = fixed_point(ProductOfExperts.of(NAMES, residual_map, anchor=anchor).bind(updates))  # type: ignore[arg-type]
        assert_close(solution.value, without.value, 1e-7)
    everything = fixed_point(ProductOfExperts.of(NAMES, residual_map).bind(torch.zeros(2, 3, 4, 5)))  # type: ignore[arg-type]
    assert_close(everything.value, torch.zeros(2, 4, 5))
    assert everything.converged


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_more_experts_than_dimensions(residual_map: object, coordinates: str, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 9, 2, 3)
    poe = ProductOfExperts.of(list("abcdefghi"), residual_map, Cauchy(), Relative(0.5))  # type: ignore[arg-type]
    posterior = poe.bind(updates, coordinates=coordinates)  # type: ignore[arg-type]
    solution = fixed_point(posterior)
    assert solution.converged
    # Nine updates span all six entries, so Span is no restriction here.
    assert_close(posterior.update(solution.value), merged(poe.bind(updates)), 1e-6)


@pytest.mark.parametrize(
    "residual_map", [m for m in MAPS if not isinstance(m, tuple)] + [(OutputGram(), InputGram())], ids=name_of
)
@pytest.mark.parametrize("centred", [False, True])
def test_low_rank_factors_change_nothing(residual_map: object, centred: bool, generator: torch.Generator) -> None:
    left = torch.randn(2, 3, 20, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, 2, 15, generator=generator, dtype=torch.float64)
    poe = ProductOfExperts.of(NAMES, residual_map, anchor=Anchor(average if centred else None))  # type: ignore[arg-type]
    plain = fixed_point(poe.bind(left @ right))
    factored = fixed_point(poe.bind(left @ right, low_rank=(left, right)))
    assert plain.converged
    assert factored.converged
    assert_close(factored.value, plain.value, 1e-8)
    if not centred and not isinstance(residual_map, Identity):  # the merge of adapters is an adapter: rank at most N r
        assert int(torch.linalg.matrix_rank(factored.value, rtol=1e-9).max()) <= 6


@pytest.mark.parametrize(
    "residual_map",
    [Identity(), Directional(), OutputGram(), InputGram(), (OutputGram(), InputGram()), (Identity(), InputGram())],
    ids=name_of,
)
def test_adapters_under_an_anchor_whose_centre_is_outside_their_span(
    residual_map: object, generator: torch.Generator
) -> None:
    left = torch.randn(1, 3, 12, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(1, 3, 2, 10, generator=generator, dtype=torch.float64)
    updates, center = left @ right, torch.randn(1, 12, 10, generator=generator, dtype=torch.float64)
    anchor = Anchor(center, AbsolutePrecision(1e-3))
    poe = ProductOfExperts.of(NAMES, residual_map, Cauchy(), Relative(0.5), anchor=anchor)  # type: ignore[arg-type]
    solution = fixed_point(poe.bind(updates, low_rank=(left, right)))
    assert solution.converged
    dense = dense_solution(poe, updates, solution.info.weights[0])
    assert_close(solution.value[0], dense, 1e-8)
    # The merge keeps what the centre has outside the adapters' span, and what it has inside is moved.
    basis = torch.linalg.qr(left[0].transpose(0, 1).flatten(1)).Q
    if residual_map in (OutputGram(), Directional()):
        assert_close(
            solution.value[0] - basis @ (basis.mT @ solution.value[0]), center[0] - basis @ (basis.mT @ center[0])
        )
    assert float((dense - center[0]).norm()) > 0.1 * float(center.norm())


def test_span_equals_full_for_directional_and_restricts_gram_maps(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 7)
    for centre in (None, average):
        poe = ProductOfExperts.of(NAMES, Directional(), Cauchy(), Relative(0.5), anchor=Anchor(centre))
        assert_close(merged(poe.bind(updates, coordinates="span")), merged(poe.bind(updates)), 1e-8)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.5))
    posterior = poe.bind(updates, coordinates="span")
    full, span = fixed_point(poe.bind(updates)), fixed_point(posterior)
    assert bool((span.info.energy > full.info.energy + 1e-6).all())
    of_coefficients = torch.einsum("mj,mjab->mab", posterior.coefficients(span.value)[:, :3], updates)
    assert_close(of_coefficients, posterior.update(span.value), 1e-10)
    assert_close(poe.bind(updates).energy(posterior.update(span.value)), span.info.energy, 1e-10)


def test_different_designs_in_one_module(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 4, 5)
    poe = Expert("a", OutputGram(), Cauchy(), Relative(0.5)) * Expert(
        "b", InputGram(), StudentT(3.0), Absolute(2.0), 0.5
    )
    solution = fixed_point(poe.bind(updates))
    assert_close(solution.value[0], dense_solution(poe, updates, solution.info.weights[0]), 1e-8)


@pytest.mark.parametrize(
    "mixed", [(Directional(), InputGram()), (InverseVariance(), InputGram())], ids=["rank-one", "diagonal"]
)
def test_operators_without_a_common_factorisation_run_in_span(
    mixed: tuple[ResidualMap, ...], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, mixed)
    with pytest.raises(ValueError, match="Gram.*coordinates='span'"):
        fixed_point(poe.bind(updates))
    assert fixed_point(poe.bind(updates, coordinates="span")).converged
