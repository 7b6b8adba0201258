"""Bound experts and posteriors part by part: chains before modules, experts that dropped out, scales that fall back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Expert,
    FactorExpert,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    StudentT,
    TaskArithmetic,
    average,
    span_statistics,
)
from poe_models.posterior import BoundFactor, Posterior
from poe_models.span import span_basis
from poe_models.updates import center_of, check_updates
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]


def posterior_of(updates: Tensor, center: object = average) -> Posterior:
    anchor = Anchor(center, AbsolutePrecision(0.3))  # type: ignore[arg-type]
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(3.0), Absolute(2.0), [1.0, 2.0, 0.5], anchor, 0.7)
    return poe.bind(updates)


def test_everything_takes_chains_before_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    posterior = posterior_of(updates)
    z = torch.randn(4, 2, 4, 5, generator=generator, dtype=torch.float64)
    q = posterior.residuals(z)
    assert q.shape == (4, 2, 3)
    leaf = q.clone().requires_grad_(True)
    energy = posterior.energy_of(leaf)
    (weights,) = torch.autograd.grad(energy.sum(), leaf, create_graph=True)
    (curvatures,) = torch.autograd.grad(weights.sum(), leaf)
    assert_close(posterior.weights(q), weights.detach())
    assert_close(posterior.curvatures(q), curvatures)
    anchor = 0.3 * (z - average(updates)).square().sum((-2, -1))
    assert_close(posterior.anchor_energy(z), anchor)
    assert_close(posterior.energy(z), energy.detach() + anchor)
    assert_close(posterior.joint_energy(z), (energy.detach() + anchor).sum(-1))
    by_hand = torch.stack([((z - u) @ u.mT).square().sum((-2, -1)) for u in updates.unbind(1)], -1)
    assert_close(q, by_hand)
    importance = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert_close(energy.detach(), (importance * 2 * torch.log1p(by_hand / 4 / 3)).sum(-1))


def test_a_module_alone_is_itself(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 4, 5)
    for center in (None, average):
        posterior, z = posterior_of(updates, center), torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
        for m in range(3):
            alone = posterior.module(m)
            assert alone.num_modules == 1
            assert_close(alone.energy(z[m : m + 1]), posterior.energy(z)[m : m + 1])
            assert torch.equal(alone.active, posterior.active[m : m + 1])
            for expert, whole in zip(alone.experts, posterior.experts, strict=True):
                assert_close(expert.norm_squared, whole.norm_squared[m : m + 1])
                assert_close(expert.residual_at_zero, whole.residual_at_zero[m : m + 1])
    coupled = replace(posterior, factors=(BoundFactor("tie", lambda z: z.sum(), True),))
    with pytest.raises(ValueError, match="'tie' sees the whole batch"):
        coupled.module(0)


def test_joint_factors_count_once_and_others_per_module(generator: torch.Generator) -> None:
    posterior, z = posterior_of(random_updates(generator, 2, 3, 4, 5)), torch.ones(2, 4, 5, dtype=torch.float64)
    own = BoundFactor("own", lambda z: z.sum((-2, -1)), False)
    tie = BoundFactor("tie", lambda z: z.sum((-3, -2, -1)), True)
    both = replace(posterior, factors=(own, tie))
    assert_close(both.energy(z), posterior.energy(z) + 20.0)
    assert_close(both.joint_energy(z), posterior.energy(z).sum() + 80.0)


def test_an_expert_that_dropped_out_costs_and_weighs_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    updates[1, 2] = 0.0
    posterior = posterior_of(updates)
    assert posterior.active.tolist() == [[True] * 3, [True, True, False]]
    expert, q = posterior.experts[2], torch.ones(2, dtype=torch.float64)
    for value in (expert.energy_of(q), expert.weight(q), expert.curvature(q)):
        assert float(value[1]) == 0.0
        assert float(value[0]) != 0.0


@pytest.mark.parametrize("residual_map", [OutputGram(), InputGram(), Directional()], ids=name_of)
def test_what_is_rounding_beside_the_others_of_its_map_drops_out(
    residual_map: object, generator: torch.Generator
) -> None:
    eps = torch.finfo(torch.float64).eps
    for size, active in ((2 * eps, True), (0.5 * eps, False)):
        updates = torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64).repeat(1, 2, 1, 1)
        updates[:, 1] *= size
        poe = ProductOfExperts.of(["a", "b"], residual_map, Cauchy(), Relative(1.0))  # type: ignore[arg-type]
        assert poe.bind(updates).active.tolist() == [[True, active]]
    # Another map has other units: nothing to compare with.
    mixed = Expert("a", Identity(), Cauchy(), Relative(1.0)) * Expert("b", InputGram(), Cauchy(), Relative(1.0))
    assert (mixed * Anchor()).bind(1e-12 * updates[:, [0, 0]]).active.tolist() == [[True, True]]


def test_scales_that_are_zero_fall_back_to_the_median_of_their_map(generator: torch.Generator) -> None:
    """Identity experts of zero update: their residual at zero is none, and they still hold the merge there."""
    updates = torch.zeros(2, 4, 1, 2, dtype=torch.float64)
    for i, length in enumerate((0.0, 3.0, 1.0, 2.0)):
        updates[0, i, 0, 0] = length
    names = [*NAMES, "d"]
    posterior = ProductOfExperts.of(names, Identity(), Cauchy(), Relative(1.0)).bind(updates)
    scales = torch.stack([e.scale_squared for e in posterior.experts], -1)
    assert_close(scales, torch.tensor([[4.0, 9.0, 1.0, 4.0], [1.0] * 4]).double())
    tiny = ProductOfExperts.of(names, Identity(), Cauchy(), Relative(0.1)).bind(0.1 * updates)
    assert_close(torch.stack([e.scale_squared for e in tiny.experts], -1)[0], 1e-4 * scales[0])
    # Of a map made from the update a zero one drops out: its scale is 1 and does not matter.
    dropped = ProductOfExperts.of(names, InputGram(), Cauchy(), Relative(1.0)).bind(updates)
    assert float(dropped.experts[0].scale_squared[0]) == 1.0
    assert dropped.active[0].tolist() == [False, True, True, True]


def test_the_relative_anchor_is_the_twins_summed_curvature_of_active_experts(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 4, 5)
    updates[1, 1] = 0.0
    first = Expert("a", OutputGram(), Cauchy(2.0), Absolute(2.0), importance=3.0)
    second = Expert("b", InputGram(), StudentT(5.0), Absolute(0.5))
    posterior = (first * second * Anchor(precision=RelativePrecision(0.2))).bind(updates)
    norms = updates.square().sum((-2, -1))
    # 2 a rho'(0) tr(P) / (d s^2): rho'(0) is 2 for the Cauchy, 6 / (2 * 5) for the Student-t.
    of_first = 2 * 3 * 2 * norms[:, 0] / 4 / 4
    of_second = 2 * 0.6 * norms[:, 1] / 5 / 0.25
    assert_close(posterior.anchor_precision, 0.2 * (of_first + of_second))


def test_adapters_are_bound_with_their_own_factors(generator: torch.Generator) -> None:
    left = torch.randn(2, 2, 6, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 2, 2, 5, generator=generator, dtype=torch.float64)
    for residual_map in (OutputGram(), InputGram(), Directional(), Identity()):
        poe = ProductOfExperts.of(["a", "b"], residual_map, Cauchy(), Relative(1.0), anchor=Anchor(TaskArithmetic(0.3)))
        plain, bound = poe.bind(left @ right), poe.bind(left @ right, low_rank=(left, right))
        z = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
        assert_close(bound.energy(z), plain.energy(z))
        assert bound.center is not None
        assert_close(bound.center, 0.3 * (left @ right).sum(1))
        for i, expert in enumerate(bound.experts):
            assert expert.low_rank is not None
            assert torch.equal(expert.low_rank[0], left[:, i])
            assert torch.equal(expert.low_rank[1], right[:, i])
            one = expert.module(slice(1, 2)).low_rank
            assert one is not None
            assert torch.equal(one[0], left[1:, i])
            assert torch.equal(one[1], right[1:, i])
        assert_close(
            fixed_point(poe.bind(left @ right, low_rank=(left, right))).value,
            fixed_point(poe.bind(left @ right)).value,
            1e-8,
        )
    single = poe.bind((left @ right)[0], low_rank=(left[0], right[0]))
    assert single.num_modules == 1
    for bad in ((left[..., :1], right), (left, right[..., :4]), (left[:1], right), (left, right[:, :1])):
        with pytest.raises(ValueError, match="`low_rank` has shapes"):
            poe.bind(left @ right, low_rank=bad)


def test_updates_are_checked(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    assert check_updates(updates, NAMES) is updates
    assert check_updates(updates[0], NAMES).shape == (1, 3, 4, 5)
    assert check_updates(updates.bfloat16(), NAMES).dtype == torch.float32
    assert check_updates(updates.float(), NAMES).dtype == torch.float32
    for bad in (updates[0, 0], updates[:, :2], updates.unsqueeze(0)):
        with pytest.raises(ValueError, match="3 task vectors"):
            check_updates(bad, NAMES)
    with pytest.raises(ValueError, match="floating-point"):
        check_updates(updates.long(), NAMES)
    for value in (math.nan, math.inf):
        broken = updates.clone()
        broken[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match=r"of 'c' \(module 1 of the batch\)"):
            check_updates(broken, NAMES)


def test_centres_have_the_updates_shape(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    assert center_of(Anchor(), updates) is None
    flat = torch.ones(4, 5)
    one = center_of(Anchor(flat), updates[:1])
    assert one is not None
    assert (one.shape, one.dtype) == ((1, 4, 5), torch.float64)
    with pytest.raises(ValueError, match="has shape"):
        center_of(Anchor(flat), updates)
    with pytest.raises(ValueError, match="NaN or infinite"):
        center_of(Anchor(math.nan * torch.ones(2, 4, 5)), updates)
    for rule in (average, lambda updates: updates.mean(1)):
        found = center_of(Anchor(rule), updates)
        assert found is not None
        assert_close(found, updates.mean(1))


def test_a_posterior_without_experts_has_the_anchors_dtype() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    assert Posterior((), None, like, 1.0, (3, 4)).like is like
    center = torch.zeros(2, 3, 4, dtype=torch.float32)
    assert Posterior((), center, like, 1.0, (3, 4)).dtype == torch.float32
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite"):
            Posterior((), None, like, temperature, (3, 4))


def test_a_span_through_the_merge_has_it_as_a_coordinate_in_every_module(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    anchor = Anchor(precision=AbsolutePrecision(0.3))
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.7), anchor=anchor)
    merged = fixed_point(poe.bind(updates)).value
    basis = span_basis(poe, updates, merged)
    assert basis.shape == (2, 5, 4, 5)
    assert_close(basis[:, :3], updates)
    assert float(basis[:, 3].abs().max()) == 0.0
    assert_close(basis[:, 4], merged)
    assert_close(span_basis(poe, updates[:1], merged[0]), basis[:1])
    with pytest.raises(ValueError, match="through"):
        span_basis(poe, updates, merged[:1])
    statistics = span_statistics(poe, updates, through=merged)
    posterior = poe.bind(statistics)
    coordinates = posterior.span
    solution = fixed_point(posterior)
    back = torch.einsum("mj,mjab->mab", coordinates.coefficients(solution.value), basis)
    assert_close(back, merged, 1e-7)


def test_a_centre_of_zeros_is_no_centre(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(
        NAMES, InputGram(), Cauchy(), Relative(0.7), anchor=Anchor(precision=AbsolutePrecision(0.3))
    )
    statistics = span_statistics(poe, updates)
    zeros = poe * Anchor(torch.zeros(2, 4, 5), AbsolutePrecision(0.3))
    assert_close(zeros.bind(statistics).anchor_precision, poe.bind(statistics).anchor_precision)
    for elsewhere in (torch.ones(2, 4, 5), torch.eye(4, 5).expand(2, -1, -1)):
        with pytest.raises(ValueError, match="the statistics were made with the centre zero"):
            (poe * Anchor(elsewhere, AbsolutePrecision(0.3))).bind(statistics)


def test_factor_experts_are_refused_in_full_coordinates(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Absolute(1.0))
    poe = poe * FactorExpert("own", lambda c: c.square().sum(-1), coordinates="span")
    with pytest.raises(ValueError, match="'own' is a FactorExpert"):
        poe.bind(random_updates(generator, 1, 3, 4, 5))
