"""What the solver spends, counted, and what it finds at awkward points, beside dense float64 algebra."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from inference import fixed_point, laplace
from inference.gradient_check import judged, relative_gradient, settled
from inference.map import plain_iterates
from inference.problem import FORWARD_ERROR, Problem
from inference.summed_residuals import SummedResiduals
from poe_models import (
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    Welsch,
    sums,
)
from poe_models.least_squares import NormalMatrix, Quadratic, quadratic_of
from poe_models.operators import Gram, matrix_rank
from poe_models.sums import gram_matrix, inner, inner_each, inner_products, largest_entry
from tests.helpers import assert_close, name_of, random_updates

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of factorisations, sums of Gram matrices, products with factors, and float64 gradients."""
    counts: Counter[str] = Counter()
    methods = ((NormalMatrix, "factored"), (Quadratic, "normal"), (Gram, "root"), (Quadratic, "exact_half_gradient"))
    for owner, name in methods:
        original = getattr(owner, name)

        def counted(*given: object, _name: str = name, _original: object = original) -> object:
            counts[_name] += 1
            return _original(*given)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, counted)
    return counts


def test_a_gaussian_merge_factors_once_and_makes_no_product_for_a_residual(
    work: Counter[str], generator: torch.Generator
) -> None:
    updates = torch.randn(1, 4, 80, 60, generator=generator)
    posterior = ProductOfExperts.of(NAMES, InputGram(), Gaussian()).bind(updates)
    solution = judged(posterior, fixed_point(posterior))
    assert solution.converged
    assert work["factored"] == work["normal"] == 1  # the gradient's matrix is the one that was factored
    assert work["exact_half_gradient"] == 1  # of a few rows
    assert work["root"] == 0


def test_a_heavy_tail_factors_once_a_step_and_starts_once(work: Counter[str], generator: torch.Generator) -> None:
    updates = torch.randn(1, 4, 80, 60, generator=generator)
    posterior = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(3.0)).bind(updates)
    solution = judged(posterior, fixed_point(posterior))
    assert solution.converged
    assert solution.info.start_energies.shape == (1, 1)
    assert work["factored"] == int(solution.info.steps) + int(solution.info.rejected)
    assert work["root"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()], ids=name_of)
def test_summed_residuals_are_those_of_products(
    residual_map: ResidualMap, dtype: torch.dtype, work: Counter[str], generator: torch.Generator
) -> None:
    """At ordinary points from one Gram matrix; near a target, where its terms cancel, by a product."""
    updates = random_updates(generator, 2, 3, 30, 40).to(dtype)
    posterior = ProductOfExperts.of(NAMES[:3], residual_map, Gaussian()).bind(updates)
    quadratic = quadratic_of(posterior)
    residuals = SummedResiduals(posterior, quadratic, quadratic.pulls())
    middle, near = updates.mean(1), updates[:, 0] + 1e-4 * updates[:, 1]
    for x, products in ((middle, 0), (near, 1)):
        work.clear()
        found = residuals.at(x)
        assert work["root"] == products
        exact = [
            (u.double() @ (x - u).double().mT if residual_map == InputGram() else u.double().mT @ (x - u).double())
            for u in updates.unbind(1)
        ]
        assert_close(
            found,
            torch.stack([each.square().sum((-2, -1)) for each in exact], -1),
            1e-5 if dtype == torch.float32 else 1e-11,
        )


def test_one_module_whose_terms_cancel_leaves_the_others_as_they_are(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 30, 40)
    x = torch.stack([updates[0].mean(0), updates[1, 0]])
    poe = ProductOfExperts.of(NAMES[:3], InputGram(), Gaussian())

    def summed(some: slice) -> Tensor:
        posterior = poe.bind(updates[some])
        quadratic = quadratic_of(posterior)
        return SummedResiduals(posterior, quadratic, quadratic.pulls()).at(x[some])

    both = summed(slice(0, 2))
    assert float(both[1, 0]) == 0.0
    assert_close(both[:1], summed(slice(0, 1)), 1e-13)


def test_no_start_leads_lower_than_a_minimum_in_the_convex_range(generator: torch.Generator) -> None:
    for energy in (Cauchy(), Welsch()):
        posterior = ProductOfExperts.of(NAMES, OutputGram(), energy, Relative(3.0)).bind(
            torch.randn(3, 4, 6, 5, generator=generator, dtype=torch.float64)
        )
        found = fixed_point(posterior)
        assert found.info.start_energies.shape == (3, 1)
        for start in posterior.experts:
            weights = posterior.weights(posterior.residuals(start.update))
            for _, z in zip(range(300), plain_iterates(posterior, weights), strict=False):
                last = z
            assert_close(last, found.value, 1e-6)


def test_a_minimum_outside_the_convex_range_has_all_starts(generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(NAMES, OutputGram(), Cauchy(), Relative(0.05)).bind(
        random_updates(generator, 1, 4, 6, 5)
    )
    assert fixed_point(posterior).info.start_energies.shape == (1, 5)


def awkward(generator: torch.Generator, case: str) -> Tensor:
    """Updates ``(1, N, d_out, d_in)`` in float64 that float32 holds exactly."""
    updates = random_updates(generator, 1, 4, 12, 30)
    if case == "one expert":
        updates = updates[:, :1]
    elif case == "identical":
        updates = updates[:, :1].expand(-1, 4, -1, -1)
    elif case == "rank one":
        updates = updates[..., :1] @ updates[..., :1, :]
    elif case == "tall":
        updates = updates.mT
    elif case == "more experts than rows":
        updates = random_updates(generator, 1, 4, 3, 30)
    elif case == "bfloat16":
        updates = updates.bfloat16()
    return updates.float().double().contiguous()


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()], ids=name_of)
@pytest.mark.parametrize(
    "case", ["one expert", "identical", "rank one", "wide", "tall", "more experts than rows", "bfloat16"]
)
def test_a_float32_map_is_the_dense_float64_one(
    case: str, residual_map: ResidualMap, generator: torch.Generator
) -> None:
    updates = awkward(generator, case)
    poe = ProductOfExperts.of(NAMES[: updates.shape[1]], residual_map, Cauchy(), temperature=0.3)
    found = fixed_point(poe.bind(updates.float()))
    posterior = poe.bind(updates)
    units = torch.eye(updates[0, 0].numel(), dtype=torch.float64).unflatten(1, updates.shape[2:]).unsqueeze(1)
    dense = [expert.operator.apply(units).flatten(1) for expert in posterior.experts]
    targets = [expert.update.flatten() for expert in posterior.experts]
    weights = posterior.weights(torch.zeros(1, updates.shape[1], dtype=torch.float64))
    for _ in range(200):
        matrix = sum(w * p for w, p in zip(weights[0], dense, strict=True))
        matrix = matrix + posterior.anchor_precision * torch.eye(len(units))
        b = sum(w * (p @ t) for w, p, t in zip(weights[0], dense, targets, strict=True))
        z = torch.linalg.solve(matrix, b)
        q = torch.stack([(z - t) @ p @ (z - t) for p, t in zip(dense, targets, strict=True)])
        weights = posterior.weights(q.unsqueeze(0))
    assert found.converged
    assert_close(found.value.double(), z.view(1, *updates.shape[2:]), 2 * FORWARD_ERROR[torch.float32])


@pytest.mark.parametrize("energy", [Gaussian(), Cauchy(), Welsch()], ids=name_of)
def test_what_is_settled_has_a_small_gradient(energy: Energy, generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(NAMES, InputGram(), energy).bind(random_updates(generator, 3, 4, 6, 5))
    solution = fixed_point(posterior)
    assert bool(settled(posterior, solution.info).all())
    assert bool((relative_gradient(posterior, solution.value) < 1e-8).all())
    loose = fixed_point(posterior, tolerance=0.5, max_steps=1, starts=["ones"])
    large = relative_gradient(posterior, loose.value) > 1e-3
    assert not bool((settled(posterior, loose.info) & large).any())


def test_the_measured_error_is_that_of_all_rows(generator: torch.Generator) -> None:
    """Evenly spaced rows of a solution that was moved by a known amount tell that amount."""
    posterior = ProductOfExperts.of(NAMES, InputGram(), Gaussian()).bind(random_updates(generator, 1, 4, 60, 20))
    problem = Problem(posterior, quadratic_of(posterior))
    weights = posterior.weights(torch.zeros(1, 4, dtype=torch.float64))
    x = problem.solve(weights).x
    precision = problem.precision_near(weights)
    assert float(problem._measured_error(weights, precision, x)) < 1e-12
    assert float(problem._measured_error(weights, precision, 1.01 * x)) == pytest.approx(0.01 / 1.01, rel=1e-6)
    x[:, ::2] = 0.0  # of 60 rows every other one is looked at: they cannot tell
    assert float(problem._measured_error(weights, precision, x)) == float("inf")


def test_a_product_takes_the_cheaper_of_two_ways(generator: torch.Generator) -> None:
    for rows, columns in ((40, 9), (9, 40), (20, 20)):
        factor = torch.randn(1, 20, columns, generator=generator, dtype=torch.float64)
        operator = Gram(factor, "right", (rows, 20))
        x = torch.randn(1, rows, 20, generator=generator, dtype=torch.float64)
        assert_close(operator.apply(x), x @ factor @ factor.mT, 1e-12)
        assert ("gram" in vars(operator)) == operator._gram_is_cheaper(rows)
    assert Gram(torch.ones(1, 20, 20), "right", (100, 20))._gram_is_cheaper(100)
    assert not Gram(torch.ones(1, 20, 2), "right", (100, 20))._gram_is_cheaper(100)


def test_sums_over_blocks_are_sums(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (torch.randn(3, 50, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected, squares = (left * right).sum((-2, -1)), left.square().sum((-2, -1))
    for block in (1, 100, 2**17):
        monkeypatch.setitem(sums.BLOCK, "cpu", block)
        assert_close(inner(left, right), expected, 1e-13)
        assert_close(inner(left.expand(2, 3, 50, 7), right), expected.expand(2, 3), 1e-13)
        assert_close(inner_each(left, [right, left]), torch.stack([expected, squares], -1), 1e-13)
        assert_close(inner_each(left.mT, [right.mT])[..., 0], expected, 1e-13)
        assert_close(inner_products([left, right])[:, 0], torch.stack([squares, expected], -1), 1e-13)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [1, 100, 2**17])
def test_sums_in_float32_round_within_a_block_only(
    block: int, turned: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sums.BLOCK, "cpu", block)
    left, right = (torch.randn(3, 50, 7, generator=generator) for _ in range(2))
    products = left.double() * right.double()
    expected = torch.stack([products.sum((-2, -1)), left.double().square().sum((-2, -1))], -1)
    size = torch.stack([products.abs().sum((-2, -1)), expected[:, 1]], -1)
    found = inner_each(left.mT, [right.mT, left.mT]) if turned else inner_each(left, [right, left])
    rounded = (
        0 if block > left[0].numel() else max(block, 50) + 1
    )  # additions and a product (Higham, 2002, section 3.1)
    bound = (rounded * torch.finfo(torch.float32).eps / 2 + 1e-13) * size
    assert bool(((found - expected).abs() <= bound).all())
    for each in (left, left.mT) if turned else (left,):
        assert torch.equal(inner(each, each), found[:, 1]) or block > left[0].numel()
    assert torch.equal(found[:1], inner_each(left[:1], [right[:1], left[:1]])) or turned  # alone as in a batch


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_sums_of_float32_entries_of_any_size(size: float, generator: torch.Generator) -> None:
    x = torch.randn(300, 300, generator=generator)
    scaled = x * size
    assert_close(inner(scaled, scaled), scaled.double().square().sum(), 1e-7)
    assert float(inner_each(scaled, [torch.zeros_like(x)])) == 0


@pytest.mark.parametrize("side", [1, 7, 8, 50, 67])
def test_half_a_gram_matrix_is_the_whole(side: int, generator: torch.Generator) -> None:
    factor = torch.randn(2, side, 9, generator=generator, dtype=torch.float64)
    found = gram_matrix(factor)
    assert torch.equal(found, found.mT)
    assert_close(found, factor @ factor.mT, 1e-13)


def test_the_largest_entry_counts_whatever_its_sign() -> None:
    assert largest_entry(torch.tensor([[[1.0, -3.0]], [[2.0, 0.5]]])).tolist() == [3.0, 2.0]


def test_ranks_in_float32_are_those_of_singular_values(generator: torch.Generator) -> None:
    for rank in (0, 1, 5, 9):
        low = torch.randn(2, 30, rank, generator=generator) @ torch.randn(2, rank, 9, generator=generator)
        assert matrix_rank(low).tolist() == torch.linalg.matrix_rank(low).tolist() == [rank, rank]
        assert matrix_rank(low.mT).tolist() == [rank, rank]


def test_a_side_on_which_nothing_acts_has_a_basis_for_low_rank_only(generator: torch.Generator) -> None:
    """Rows of a tall matrix are solved for one by one: a basis of them would take more products than it saves."""
    shapes = (1, 2, 50, 2), (1, 2, 2, 8)
    factors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    updates = factors[0] @ factors[1]
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian())
    dense, low = poe.bind(updates), poe.bind(updates, low_rank=factors)
    assert quadratic_of(dense).compression.left is None
    found = quadratic_of(low).compression.left
    assert found is not None
    assert found.shape == (1, 50, 4)
    values = [fixed_point(each).value for each in (dense, low)]
    assert_close(values[0], values[1], 1e-9)


@pytest.mark.parametrize("apart", [1e-4, 1e-5, 1e-7])
@pytest.mark.parametrize("residual_map", [Directional(), (Directional(), Identity())], ids=str)
def test_nearly_parallel_updates_keep_their_difference(
    residual_map: ResidualMap | tuple[ResidualMap, ...], apart: float, generator: torch.Generator
) -> None:
    """The MAP is where the gradient vanishes in all coordinates, not in those of the solver alone."""
    first = random_updates(generator, 1, 1, 7, 5)
    updates = torch.cat([first, 1.3 * (first + apart * random_updates(generator, 1, 1, 7, 5))], 1)
    anchor = Anchor(precision=RelativePrecision(1e-8))
    posterior = ProductOfExperts.of(["a", "b"], residual_map, Cauchy(), anchor=anchor).bind(updates)
    found = fixed_point(posterior)
    assert found.converged
    assert float(relative_gradient(posterior, found.value)) < 1e-9


def test_sums_that_share_a_buffer_are_differentiated_all_the_same(generator: torch.Generator) -> None:
    x = random_updates(generator, 1, 1, 400, 400)[0].requires_grad_(True)  # more than one block of rows
    others = [torch.randn(1, 400, 400, generator=generator, dtype=torch.float64) for _ in range(2)]
    (gradient,) = torch.autograd.grad(inner_each(x, [*others, x]).sum(), x)
    assert_close(gradient, others[0] + others[1] + 2 * x.detach(), 1e-12)
    updates = random_updates(generator, 1, 2, 4, 5)
    posterior = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy()).bind(updates)
    found = laplace(posterior)
    z = updates[:, 0].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(found.log_density(z).sum(), z)
    step = torch.randn(1, 4, 5, generator=generator, dtype=torch.float64)
    near = [found.log_density(z.detach() + sign * 1e-5 * step) for sign in (1, -1)]
    assert_close((slope * step).sum(), (near[0] - near[1])[0] / 2e-5, 1e-6)
