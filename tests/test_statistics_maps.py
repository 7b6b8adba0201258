"""Residual maps on given statistics: their operators, and where solver, Span and program agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference import fixed_point, gibbs, laplace
from poe_models import (
    Absolute,
    Activation,
    Cauchy,
    Expert,
    Fisher,
    Gaussian,
    InputGram,
    Mixed,
    ModuleMoments,
    OutputGram,
    ProductOfExperts,
    ResidualMap,
    TaskVectors,
    log_density,
    span_statistics,
)
from poe_models.operators import root_of
from poe_models.program import log_constant
from tests.helpers import assert_close, random_updates
from tests.made_statistics import MODULES, NAMES, SHAPE, anchor, statistics


def maps(generator: torch.Generator) -> list[ResidualMap]:
    fisher = ModuleMoments("fisher", statistics(generator, "fisher"))
    activations = ModuleMoments("activations", statistics(generator, "activations"))
    return [Fisher(fisher), Fisher(fisher, floor=0.1), Activation(activations, 0.9), Mixed(activations, 0.3)]


def formula(residual_map: ResidualMap, given: Tensor, update: Tensor, x: Tensor) -> Tensor:
    """q as DESIGN's table has it, with dense matrices and no factorisation."""
    if isinstance(residual_map, Fisher):
        return ((given + residual_map.floor) * x * x).sum((-2, -1))
    factor = residual_map.off_diagonal  # type: ignore[attr-defined]
    mask = torch.full_like(given, factor)
    mask.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    p = given * mask
    if isinstance(residual_map, Mixed):
        gram = update.mT @ update
        if residual_map.unit_trace:
            p = torch.stack([m / m.trace() * len(m) for m in p])
            gram = torch.stack([m / m.trace() * len(m) for m in gram])
        p = residual_map.share * p + (1 - residual_map.share) * gram
    return torch.einsum("mij,mjk,mik->m", x, p, x)


@pytest.mark.parametrize("index", range(4))
def test_operators_are_the_formulas(index: int, generator: torch.Generator) -> None:
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    for i, name in enumerate(NAMES):
        operator = residual_map.for_modules(name, MODULES).operator(updates[:, i])
        given = residual_map.source(name).read(name, MODULES, SHAPE)  # type: ignore[attr-defined]
        expected = formula(residual_map, given, updates[:, i], x)
        assert_close(operator.quadratic(x), expected)
        assert_close((x * operator.apply(x)).sum((-2, -1)), expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("unit_trace", [True, False])
def test_mixed_is_linear_in_its_parts(off_diagonal: float, unit_trace: bool, generator: torch.Generator) -> None:
    given = ModuleMoments("activations", statistics(generator, "activations"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    residual_map = Mixed(given, 0.25, off_diagonal, unit_trace)
    q = residual_map.for_modules("b", MODULES).operator(updates[:, 1]).quadratic(x)
    assert_close(q, formula(residual_map, given.read("b", MODULES, SHAPE), updates[:, 1], x))


def test_mixed_of_a_zero_update_is_the_data_alone(generator: torch.Generator) -> None:
    given = ModuleMoments("activations", statistics(generator, "activations"))
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    zero = torch.zeros_like(x)
    q = Mixed(given, 0.25, unit_trace=False).for_modules("a", MODULES).operator(zero).quadratic(x)
    assert_close(q, 0.25 * Activation(given).for_modules("a", MODULES).operator(zero).quadratic(x))
    assert bool(Mixed(given).for_modules("a", MODULES).operator(zero).quadratic(x).isfinite().all())


@pytest.mark.parametrize("index", range(4))
def test_full_span_and_program_agree(index: int, generator: torch.Generator) -> None:
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, residual_map, Cauchy())
    full = poe.for_modules(MODULES).bind(updates)
    span = poe.bind(span_statistics(poe, updates, MODULES))
    coordinates = span.span
    c = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    c[:, -1] = 0
    z = torch.einsum("mj,mjab->mab", c[:, :3], updates)
    x = coordinates.latents(c)
    assert_close(full.residuals(z), span.residuals(x))
    assert_close(full.anchor_precision, span.anchor_precision)
    assert_close(log_density(full)(z), -full.energy(z) + log_constant(full))
    solution = fixed_point(poe.for_modules(MODULES).bind(updates))
    point = solution.value.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_density(full)(point).sum(), point)
    assert float(gradient.abs().max()) < 1e-6
    assert solution.converged


@pytest.mark.parametrize("index", range(4))
def test_samplers_take_modules_with_names(index: int, generator: torch.Generator) -> None:
    base = {name: torch.zeros(SHAPE, dtype=torch.float64) for name in MODULES}
    updates = random_updates(generator, 2, 3, *SHAPE)
    vectors = TaskVectors(
        base, {n: dict(zip(MODULES, updates[:, i], strict=True)) for i, n in enumerate(NAMES)}, dtype=torch.float64
    )
    poe = ProductOfExperts.of(NAMES, maps(generator)[index], Gaussian())
    for m, module in enumerate(vectors):
        solution = fixed_point(poe.bind(module))
        assert_close(solution.value[0], fixed_point(poe.for_modules(MODULES).bind(updates)).value[m])
        assert_close(laplace(poe.bind(module), at=solution).mode, solution.value)
        draws = gibbs(poe.bind(module), 20, chains=1, warmup=0, generator=generator)
        assert draws.num_draws == 20


def test_gaussian_map_by_the_normal_equations(generator: torch.Generator) -> None:
    """The MAP of a dense least-squares problem on vec(Z), solved with numpy-like dense algebra."""
    for residual_map in maps(generator):
        updates = random_updates(generator, 2, 3, *SHAPE)
        poe = ProductOfExperts.of(NAMES, residual_map, Gaussian(), Absolute(0.7), anchor=anchor(0.3))
        value = fixed_point(poe.for_modules(MODULES).bind(updates)).value
        units = torch.eye(12, dtype=torch.float64).unflatten(1, SHAPE)
        for m in range(2):
            hessian, pull = 2 * 0.3 * torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
            for i, name in enumerate(NAMES):
                given = residual_map.source(name).read(name, [MODULES[m]], SHAPE)  # type: ignore[attr-defined]
                u = updates[m : m + 1, i]
                p = torch.stack(
                    [
                        torch.stack(
                            [
                                (
                                    formula(residual_map, given, u, (a + b)[None])
                                    - formula(residual_map, given, u, a[None])
                                    - formula(residual_map, given, u, b[None])
                                )[0]
                                / 2
                                for a in units
                            ]
                        )
                        for b in units
                    ]
                )
                hessian += p / 0.49
                pull += p @ u.flatten() / 0.49
            assert_close(value[m].flatten(), torch.linalg.solve(hessian, pull), 1e-9)


def test_roots_of_singular_matrices(generator: torch.Generator) -> None:
    thin = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        matrix = (thin @ thin.mT).to(dtype)
        factor = root_of(matrix)
        assert_close(factor @ factor.mT, matrix.double(), tolerance)
        assert torch.linalg.matrix_rank(factor).tolist() == [2, 2]
    with pytest.raises(ValueError, match="not positive semi-definite"):
        root_of(torch.diag(torch.tensor([1.0, -0.5])))
    assert_close(root_of(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3, dtype=torch.float64))


def test_roots_keep_small_inputs_beside_large_ones(generator: torch.Generator) -> None:
    sizes = torch.logspace(-5, 5, 6, dtype=torch.float64)
    for rows in (3, 40):
        inputs = sizes * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        matrix = (inputs.mT @ inputs / rows).float()
        factor = root_of(matrix)
        assert_close((factor @ factor.mT) / sizes / sizes[:, None], matrix.double() / sizes / sizes[:, None], 1e-5)
        assert int((factor.abs().amax(0) > 0).sum()) == min(rows, 6)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("unit_trace", [True, False])
def test_mixed_takes_single_precision_statistics_of_few_rows(
    share: float, unit_trace: bool, generator: torch.Generator
) -> None:
    """Their rounding is that of float32, though they are mixed in float64."""
    given = statistics(generator, "activations", (4, 12), rows=5)
    single = {name: {module: value.float() for module, value in each.items()} for name, each in given.items()}
    left, right = random_updates(generator, 2, 1, 4, 1)[:, 0], random_updates(generator, 2, 1, 1, 12)[:, 0]
    update, x = left @ right, random_updates(generator, 2, 1, 4, 12)[:, 0]
    residual_map = Mixed(ModuleMoments("activations", single), share, unit_trace=unit_trace)
    found = residual_map.for_modules("a", MODULES).operator(update).quadratic(x)
    expected = formula(residual_map, torch.stack([given["a"][module] for module in MODULES]), update, x)
    assert_close(found, expected, 1e-5)


def test_activation_with_fewer_rows_than_inputs_has_their_rank(generator: torch.Generator) -> None:
    given = ModuleMoments("activations", statistics(generator, "activations", (4, 6), rows=2))
    update = random_updates(generator, 2, 1, 4, 6)[:, 0]
    assert Activation(given).for_modules("a", MODULES).operator(update).dimension().tolist() == [8.0, 8.0]


def test_an_entry_without_fisher_information_needs_an_anchor_or_a_floor() -> None:
    updates = torch.ones(1, 2, *SHAPE, dtype=torch.float64)
    values = torch.ones(SHAPE)
    values[1, 2] = 0
    given = ModuleMoments("fisher", {n: {"one": values} for n in "ab"})
    poe = ProductOfExperts.of(["a", "b"], Fisher(given), Gaussian(), Absolute(1.0), anchor=anchor(0.0))
    with pytest.raises(ValueError, match="some entry has neither an expert nor an anchor"):
        fixed_point(poe.for_modules(["one"]).bind(updates))
    poe = ProductOfExperts.of(["a", "b"], Fisher(given, 1e-6), Gaussian(), Absolute(1.0), anchor=anchor(0.0))
    assert_close(fixed_point(poe.for_modules(["one"]).bind(updates)).value, updates.mean(1))


def test_activations_on_one_side_and_updates_on_the_other(generator: torch.Generator) -> None:
    given = ModuleMoments("activations", statistics(generator, "activations"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, (Activation(given), OutputGram()), Cauchy()).for_modules(MODULES)
    solution = fixed_point(poe.bind(updates))
    assert solution.converged
    point = solution.value.clone().requires_grad_(True)
    energy = poe.bind(updates).energy(point).sum()
    (gradient,) = torch.autograd.grad(energy, point)
    assert float(gradient.abs().max()) < 1e-6


def test_fisher_and_gram_in_one_module_run_in_span_only(generator: torch.Generator) -> None:
    given = ModuleMoments("fisher", statistics(generator, "fisher"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, (Fisher(given), InputGram())).for_modules(MODULES)
    with pytest.raises(ValueError, match="Diagonal and Gram"):
        fixed_point(poe.bind(updates))
    assert all(s.converged for s in fixed_point(poe.bind(updates, coordinates="span")).status)


def test_callers_statistics_and_updates_are_not_changed(generator: torch.Generator) -> None:
    made = statistics(generator, "activations")
    before = {n: {m: v.clone() for m, v in each.items()} for n, each in made.items()}
    updates = random_updates(generator, 2, 3, *SHAPE)
    kept = updates.clone()
    poe = ProductOfExperts.of(NAMES, Mixed(ModuleMoments("activations", made), 0.5, 0.5))
    fixed_point(poe.for_modules(MODULES).bind(updates))
    assert torch.equal(updates, kept)
    assert all(torch.equal(made[n][m], before[n][m]) for n in NAMES for m in MODULES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_statistics_and_updates(dtype: torch.dtype, generator: torch.Generator) -> None:
    made = {n: {m: v.to(dtype) for m, v in each.items()} for n, each in statistics(generator, "fisher").items()}
    updates = random_updates(generator, 2, 3, *SHAPE, dtype=dtype)
    poe = ProductOfExperts.of(NAMES, Fisher(ModuleMoments("fisher", made)), Gaussian(), anchor=anchor(1e-3))
    reference = ProductOfExperts.of(
        NAMES,
        Fisher(ModuleMoments("fisher", {n: {m: v.double() for m, v in e.items()} for n, e in made.items()})),
        Gaussian(),
        anchor=anchor(1e-3),
    )
    value = fixed_point(poe.for_modules(MODULES).bind(updates)).value
    expected = fixed_point(reference.for_modules(MODULES).bind(updates.double())).value
    assert value.dtype == torch.float32  # half precision is computed in it
    assert_close(value.double(), expected, 1e-5)


@pytest.mark.parametrize("index", range(4))
def test_awkward_points(index: int, generator: torch.Generator) -> None:
    """One expert, identical experts, a zero expert, more experts than a dimension, strided input, a zero residual."""
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    tiny = anchor(1e-13)

    def solved(names: tuple[str, ...], given: Tensor) -> Tensor:
        poe = ProductOfExperts.of(names, residual_map, Gaussian(), Absolute(1.0), anchor=tiny)
        return fixed_point(poe.for_modules(MODULES).bind(given)).value

    assert_close(solved(("a",), updates[:, :1]), updates[:, 0], 1e-8)
    assert_close(solved(NAMES, updates[:, :1].expand(-1, 3, -1, -1)), updates[:, 0], 1e-8)
    zero = updates.clone()
    zero[:, 1] = 0
    assert bool(solved(NAMES, zero).isfinite().all())
    strided = updates.mT.contiguous().mT
    assert not strided[:, 0].is_contiguous()
    assert_close(solved(NAMES, strided), solved(NAMES, updates))
    many = tuple(f"e{i}" for i in range(7))
    poe = ProductOfExperts(
        tuple(
            Expert(name, residual_map, Gaussian(), Absolute(1.0), update=NAMES[i % 3]) for i, name in enumerate(many)
        ),
        tiny,
    )
    weights = tuple(float(sum(i % 3 == j for i in range(7))) for j in range(3))
    weighted = ProductOfExperts.of(NAMES, residual_map, Gaussian(), Absolute(1.0), importance=weights, anchor=tiny)
    found = fixed_point(poe.for_modules(MODULES).bind(updates)).value
    assert_close(found, fixed_point(weighted.for_modules(MODULES).bind(updates)).value, 1e-8)
    posterior = weighted.for_modules(MODULES).bind(updates)
    z = updates[:, 0].clone().requires_grad_(True)  # the residual of the first expert is zero
    (gradient,) = torch.autograd.grad(posterior.energy(z).sum(), z)
    assert bool(gradient.isfinite().all())
    assert_close(posterior.residuals(z.detach())[:, 0], torch.zeros(2))
