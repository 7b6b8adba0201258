"""The weighted least-squares problem of a posterior against dense matrices on the whole update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Expert,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    ResidualMap,
    average,
)
from poe_models.least_squares import Compression, Quadratic, quadratic_of
from poe_models.operators import Diagonal, Operator
from poe_models.posterior import Posterior
from poe_models.precisions import DiagonalPrecision, GramPrecision, KroneckerSum
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b"]
SHAPES = [(3, 4), (7, 3), (3, 7), (9, 9), (2, 2)]
DESIGNS: list[ResidualMap | tuple[ResidualMap, ...]] = [
    Identity(),
    Directional(),
    OutputGram(),
    InputGram(),
    (OutputGram(), InputGram()),
    (Identity(), InputGram()),
    (Directional(), Identity()),
]


def posterior_of(design: object, updates: Tensor, center: object = average) -> Posterior:
    poe = ProductOfExperts.of(NAMES, design, Cauchy(), Relative(0.7), anchor=Anchor(center, AbsolutePrecision(0.4)))  # type: ignore[arg-type]
    return poe.bind(updates)


def dense(operator: Operator, shape: tuple[int, int], modules: int) -> Tensor:
    """``P`` as a matrix on ``vec(x)``, ``(M, D, D)``."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).unflatten(1, shape).unsqueeze(1)
    return operator.apply(units.expand(-1, modules, -1, -1)).flatten(2).permute(1, 2, 0)


def solved(posterior: Posterior, weights: Tensor, shift: Tensor) -> Tensor:
    """The minimiser over the whole update by one dense solve, ``(M, d_out, d_in)``."""
    modules, shape = posterior.num_modules, posterior.event_shape
    center = torch.zeros(modules, *shape, dtype=torch.float64) if posterior.center is None else posterior.center
    size = shape[0] * shape[1]
    matrix = shift[:, None, None] * torch.eye(size, dtype=torch.float64)
    right = torch.zeros(modules, size, 1, dtype=torch.float64)
    for i, expert in enumerate(posterior.experts):
        term = weights[:, i, None, None] * dense(expert.operator, shape, modules)
        matrix = matrix + term
        right = right + term @ (expert.update - center).flatten(1).unsqueeze(-1)
    return center + torch.linalg.solve(matrix, right).squeeze(-1).unflatten(-1, shape)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("design", "for_draws"), [(d, False) for d in DESIGNS] + [(d, True) for d in DESIGNS[:-1]], ids=name_of
)
def test_the_minimiser_is_that_of_the_whole_problem(
    design: object, shape: tuple[int, int], for_draws: bool, centered: bool, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 2, *shape)
    updates[:, :, :, 1:] = updates[:, :, :, :1] * torch.randn(shape[1] - 1, generator=generator, dtype=torch.float64)
    posterior = posterior_of(design, updates, average if centered else None)
    problem = quadratic_of(posterior, for_draws)
    weights = 0.2 + torch.rand(2, len(posterior.experts), generator=generator, dtype=torch.float64)
    shift = torch.tensor([0.3, 1.1], dtype=torch.float64)
    pulls = problem.pulls()
    b = sum(weights[:, i, None, None] * pull for i, pull in enumerate(pulls))
    x = problem.precision(weights, shift).solve(b)  # type: ignore[arg-type]
    z = problem.lift(x) if posterior.center is None else posterior.center + problem.lift(x)
    assert_close(z, solved(posterior, weights, shift), 1e-9)
    assert_close(problem.residuals(x), posterior.residuals(z), 1e-9)
    assert_close(problem.normal(weights, shift).apply(x), b, 1e-9)  # type: ignore[arg-type]
    # Forces are half the gradients of the residuals.
    leaf = x.clone().requires_grad_(True)
    for i, force in enumerate(problem.forces(x)):
        (gradient,) = torch.autograd.grad(problem.residuals(leaf)[..., i].sum(), leaf)
        assert_close(2 * force, gradient, 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("design", DESIGNS[:-1], ids=name_of)
def test_what_draws_leave_out_no_expert_sees(
    design: object, shape: tuple[int, int], generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 2, *shape)
    updates[:, :, 1:] = updates[:, :, :1] * torch.randn(shape[0] - 1, 1, generator=generator, dtype=torch.float64)
    posterior = posterior_of(design, updates)
    problem = quadratic_of(posterior, for_draws=True)
    z = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    inside = problem.compression.compress(z)
    outside = z - problem.lift(inside)
    for expert in posterior.experts:
        assert float(expert.operator.quadratic(outside).max()) < 1e-18 * float(expert.operator.quadratic(z).max())
    assert_close(problem.lift(inside).square().sum((-2, -1)), inside.square().sum((-2, -1)))


def test_only_what_is_smaller_is_compressed(generator: torch.Generator) -> None:
    """Two updates of rank 2 span four directions of a side: compressed if it has five, not if it has four."""
    for rows, compressed in ((5, True), (4, False)):
        updates = random_updates(generator, 1, 2, rows, 2)
        problem = quadratic_of(posterior_of(OutputGram(), updates), for_draws=True)
        assert (problem.compression.left is not None) is compressed
        assert problem.event_shape == (4, 2)
        assert problem.compression.right is None
        assert problem.compression.trivial is not compressed
    sides = quadratic_of(posterior_of((OutputGram(), InputGram()), random_updates(generator, 1, 2, 5, 2)), True)
    assert sides.compression.trivial


def test_a_map_compresses_the_other_side_as_well(generator: torch.Generator) -> None:
    """Rank-one updates move a MAP only along themselves, on both sides; draws move along whole rows."""
    updates = random_updates(generator, 1, 2, 6, 1) @ torch.randn(1, 2, 1, 5, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.svd(updates)[0][..., :1], updates[..., :1, :]
    factors = (left, left.mT @ updates)
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Cauchy(), Relative(0.7), anchor=Anchor(precision=AbsolutePrecision(0.4))
    )
    thin = poe.bind(updates, low_rank=factors)
    assert right.shape == (1, 2, 1, 5)
    assert quadratic_of(thin).event_shape == (2, 2)
    assert quadratic_of(thin, for_draws=True).event_shape == (6, 2)
    weights, shift = torch.tensor([[0.8, 0.3]], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    problem = quadratic_of(thin)
    b = sum(weights[:, i, None, None] * pull for i, pull in enumerate(problem.pulls()))
    found = problem.lift(problem.precision(weights, shift).solve(b))  # type: ignore[arg-type]
    assert_close(found, solved(thin, weights, shift))
    # A centre takes the targets out of the factors' range.
    displaced = (poe * Anchor(torch.ones(1, 6, 5), AbsolutePrecision(0.4))).bind(updates, low_rank=factors)
    problem = quadratic_of(displaced)
    assert problem.event_shape == (6, 2)
    b = sum(weights[:, i, None, None] * pull for i, pull in enumerate(problem.pulls()))
    found = 1.0 + problem.lift(problem.precision(weights, shift).solve(b))  # type: ignore[arg-type]
    assert_close(found, solved(displaced, weights, shift))


def test_factorisations_by_kind_of_operator(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    weights, shift = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    kinds = {Identity(): DiagonalPrecision, OutputGram(): GramPrecision, InputGram(): GramPrecision}
    for design, kind in kinds.items():
        assert type(quadratic_of(posterior_of(design, updates)).precision(weights, shift)) is kind
    both = quadratic_of(posterior_of((OutputGram(), InputGram()), updates))
    assert type(both.precision(weights, shift)) is KroneckerSum


def test_diagonal_operators_add_up_elementwise(generator: torch.Generator) -> None:
    values = torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    x, target = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    operators = (Diagonal(values[0]), Diagonal(values[1]))
    problem = Quadratic(operators, (target, -target), Compression(), (3, 4))
    weights, shift = torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    matrix = 2 * values[0] + 0.5 * values[1] + 0.25
    assert_close(problem.normal(weights, shift).apply(x), matrix * x)
    assert_close(problem.precision(weights, shift).solve(x), x / matrix)
    residuals = [(v * (x - t).square()).sum((-2, -1)) for v, t in zip(values, (target, -target), strict=True)]
    assert_close(problem.residuals(x), torch.stack(residuals, -1))


def test_weights_may_have_chains(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    for design in (Identity(), OutputGram(), InputGram(), (OutputGram(), InputGram())):
        problem = quadratic_of(posterior_of(design, updates))
        experts = len(problem.operators)
        weights = 0.1 + torch.rand(5, 2, experts, generator=generator, dtype=torch.float64)
        shift = 0.1 + torch.rand(5, 2, generator=generator, dtype=torch.float64)
        x = torch.randn(5, 2, *problem.event_shape, generator=generator, dtype=torch.float64)
        for s in range(5):
            assert_close(problem.normal(weights, shift).apply(x)[s], problem.normal(weights[s], shift[s]).apply(x[s]))
            alone = problem.precision(weights[s], shift[s]).solve(x[s])
            assert_close(problem.precision(weights, shift).solve(x)[s], alone)


def test_what_cannot_be_factored_is_refused(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="Gram and RankOne"):
        quadratic_of(posterior_of((Directional(), InputGram()), updates))
    mixed = posterior_of((Directional(), Identity()), updates)
    with pytest.raises(ValueError, match="cannot mix Directional with Identity"):
        quadratic_of(mixed, for_draws=True)
    quadratic_of(mixed)
    quadratic_of(posterior_of(Directional(), updates), for_draws=True)


@pytest.mark.parametrize(
    ("design", "expected"), [(Directional(), (1, 1)), (OutputGram(), (2, 2)), (InputGram(), (5, 2))]
)
def test_one_expert_alone(design: ResidualMap, expected: tuple[int, int], generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 1, 5, 2)
    posterior = (Expert("a", design) * Anchor(precision=AbsolutePrecision(0.5))).bind(updates)
    problem = quadratic_of(posterior)
    assert problem.event_shape == expected
    weights, shift = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    x = problem.precision(weights, shift).solve(0.7 * problem.pulls()[0])
    assert_close(problem.lift(x), solved(posterior, weights, shift))
