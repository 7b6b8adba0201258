"""How the plain iteration contracts at a solution: the rate against observed steps, the bound against sums by hand."""

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
    Energy,
    GeneralizedGaussian,
    Identity,
    InputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    Welsch,
)
from tests.helpers import ENERGIES, MAPS, assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]


def test_contraction_rate_is_that_of_the_plain_iteration(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Cauchy(), Relative(0.7), anchor=Anchor(precision=RelativePrecision(0.15))
    )
    posterior = poe.bind(updates)
    solution = fixed_point(poe.bind(updates), starts=["twin"])
    start = posterior.weights(torch.zeros(1, 3, dtype=torch.float64))
    errors = [float((z - solution.value).norm()) for z in itertools.islice(plain_iterates(posterior, start), 40)]
    observed = [b / a for a, b in itertools.pairwise(errors) if b > 1e-6 * errors[0]][-1]
    assert float(solution.info.contraction_rate) == pytest.approx(observed, rel=1e-3)
    assert float(solution.info.contraction_rate) <= float(solution.info.contraction_bound)


def test_contraction_rate_below_one_is_a_positive_definite_hessian(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 3)
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Cauchy(), Relative(0.5), anchor=Anchor(precision=RelativePrecision(0.05))
    )
    posterior = poe.bind(updates)
    solution = fixed_point(poe.bind(updates))
    hessian = torch.func.hessian(lambda z: posterior.energy(z.view(1, 2, 3)).sum())(solution.value.flatten())
    assert bool((torch.linalg.eigvalsh(hessian) > 0).all())
    assert bool(solution.info.strict_minimum)
    # At a saddle between two opposed experts the same numbers say the opposite.
    opposed = torch.tensor([[[[3.0]], [[-3.0]]]], dtype=torch.float64)
    saddle = ProductOfExperts.of(
        ["a", "b"], Identity(), Welsch(), Relative(1.0), anchor=Anchor(precision=AbsolutePrecision(1e-3))
    )
    middle = fixed_point(saddle.bind(opposed), starts=[torch.zeros(1, 1, 1, dtype=torch.float64)], max_steps=1)
    assert not bool(middle.info.strict_minimum)
    steep = fixed_point(
        ProductOfExperts.of(
            NAMES, InputGram(), GeneralizedGaussian(6.0), anchor=Anchor(precision=RelativePrecision(1e-6))
        ).bind(updates),
        max_steps=2000,
    )
    assert bool(steep.info.strict_minimum)
    assert float(steep.info.contraction_rate) > 1  # plain steps overshoot at a minimum of an energy convex in q


def test_one_cauchy_expert_by_hand() -> None:
    # Scale 1 and U = 3: at Z = 1 the residual is f = -2, q = 4, the weight w = 1 / (1 + q) = 1/5 and rho'' = -w^2. The
    # gradient w f + eta Z vanishes for eta = 2/5, so H = w + eta = 3/5: L = 2 |rho''| |f| |f / H| = 2 (1/25) 4 (5/3).
    update = torch.tensor([[[3.0]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        ["a"], Identity(), Cauchy(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.4))
    )
    info = fixed_point(poe.bind(update), starts=[torch.ones(1, 1, dtype=torch.float64)]).info
    assert_close(info.contraction_bound, torch.tensor([8 / 15], dtype=torch.float64))
    assert_close(
        info.contraction_rate, torch.tensor([8 / 15], dtype=torch.float64)
    )  # one number: the bound is the rate


def test_two_experts_at_a_right_angle_by_hand() -> None:
    # U_a = (3, 0), U_b = (0, 3), scale 2: at Z = (1, 1) the residuals are f_a = (-2, 1) and f_b = (1, -2), q = 5 each,
    # w = 1 / (4 + 5) = 1/9 and a rho'' / s^4 = -w^2. The gradient w (f_a + f_b) + eta Z vanishes for eta = 1/9, so
    # H = 3/9. L = sum over two of 2 (1/81) |f| |f / H| = 2 * 2 (1/81) 5 * 3 = 20/27. The step's Jacobian is
    # 2 (1/81) 3 (f_a f_a' + f_b f_b'), whose matrix [[5, -4], [-4, 5]] has the eigenvalues 1 and 9: the rate is 2/3.
    updates = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]], dtype=torch.float64)
    poe = ProductOfExperts.of(
        ["a", "b"], Identity(), Cauchy(), Absolute(2.0), anchor=Anchor(precision=AbsolutePrecision(1 / 9))
    )
    solution = fixed_point(poe.bind(updates), starts=["twin"])
    assert_close(solution.value, torch.ones(1, 2))
    assert_close(solution.info.contraction_bound, torch.tensor([20 / 27], dtype=torch.float64))
    assert_close(solution.info.contraction_rate, torch.tensor([2 / 3], dtype=torch.float64))


def bound_and_jacobian(poe: ProductOfExperts, updates: Tensor) -> tuple[float, Tensor]:
    """The reported bound of one module, and the Jacobian of one plain step by autograd on dense matrices."""
    posterior = poe.bind(updates)
    solution = fixed_point(poe.bind(updates), max_steps=5000)
    shape, size = posterior.event_shape, solution.value.numel()
    units = torch.eye(size, dtype=torch.float64).unflatten(1, shape).unsqueeze(1)
    operators = torch.stack([expert.operator.apply(units).flatten(1) for expert in posterior.experts])
    targets = torch.stack([expert.update.flatten() for expert in posterior.experts])

    def step(z: Tensor) -> Tensor:
        offsets = z - targets
        q = torch.einsum("na,nab,nb->n", offsets, operators, offsets)
        w = torch.stack([expert.weight(value[None])[0] for expert, value in zip(posterior.experts, q, strict=True)])
        matrix = torch.einsum("n,nab->ab", w, operators) + posterior.anchor_precision * torch.eye(size)
        return torch.linalg.solve(matrix, torch.einsum("n,nab,nb->a", w, operators, targets))

    jacobian = torch.autograd.functional.jacobian(step, solution.value.flatten())
    return float(solution.info.contraction_bound), jacobian


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_the_bound_holds_for_one_step_and_the_rate_is_within_it(
    residual_map: ResidualMap | tuple[ResidualMap, ...], energy: Energy, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, 3, 4)
    poe = ProductOfExperts.of(
        NAMES, residual_map, energy, Relative(0.5), anchor=Anchor(precision=AbsolutePrecision(0.5))
    )
    bound, jacobian = bound_and_jacobian(poe, updates)
    slack = 1 + 1e-6
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= bound * slack + 1e-9
    assert float(torch.linalg.eigvals(jacobian).abs().max()) <= bound * slack + 1e-9
