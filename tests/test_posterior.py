from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine

from inference import fixed_point
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
    Cauchy,
    Energy,
    Expert,
    FactorExpert,
    Gaussian,
    Identity,
    InputGram,
    NormScaled,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    Scale,
    StudentT,
    TaskArithmetic,
    average,
    log_density,
    program,
    span_statistics,
)
from poe_models.program import log_constant
from poe_models.span import concatenate, span_basis
from poe_models.span_labels import stored_center
from poe_models.weights.task_vectors import ModuleUpdates
from tests.helpers import ENERGIES, MAPS, assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]
SCALES: list[Scale] = [Absolute(1.3), NormScaled(0.5), Relative(0.8), Balanced(0.9)]


@pytest.mark.parametrize("scale", SCALES, ids=name_of)
@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_program_is_the_summed_energies_in_both_coordinates(
    residual_map: object, energy: Energy, scale: Scale, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, residual_map, energy, scale, [1.0, 0.5, 2.0], Anchor(average), temperature=0.7)  # type: ignore[arg-type]
    posterior = poe.bind(updates)
    coefficients = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    z = torch.einsum("smj,mjab->smab", coefficients, span_basis(poe, updates))
    assert_close(log_density(posterior)(z), -posterior.energy(z) / 0.7 + log_constant(posterior), 1e-12)
    # The same point in Span coordinates costs the same: one energy, two parametrisations.
    small = poe.bind(span_statistics(poe, updates))
    coordinates = small.span
    x = coordinates.latents(coefficients)
    assert_close(small.energy(x), posterior.energy(z), 1e-9)
    assert_close(log_density(small)(x), -small.energy(x) / 0.7 + log_constant(small), 1e-12)
    # The centre is an average here, so coefficients are not unique; the update they make is.
    back = torch.einsum("smj,mjab->smab", coordinates.coefficients(x), span_basis(poe, updates))
    assert_close(back, z, 1e-9)


def test_energy_is_the_formula_written_out(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    z = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    first, second = updates[0]
    poe = Expert("a", OutputGram(), Cauchy(), Absolute(2.0), importance=3.0) * Expert(
        "b", InputGram(), StudentT(5.0), NormScaled(0.1)
    )
    poe = poe * Anchor(center=second, precision=RelativePrecision(0.2))
    q_a = (first.mT @ (z[0] - first)).square().sum() / 4.0
    q_b = ((z[0] - second) @ second.mT).square().sum() / (0.1 * second.square().sum())
    curvature_a = 2 * 3.0 * 1.0 * first.square().sum() / 3 / 4.0  # 2 a rho'(0) tr(P) / (d s^2)
    curvature_b = 2 * ((5.0 + 1) / 2 / 5.0) * second.square().sum() / 4 / (0.1 * second.square().sum())
    eta = 0.2 * (curvature_a + curvature_b)
    expected = 3 * torch.log1p(q_a) + 3 * torch.log1p(q_b / 5) + eta * (z[0] - second).square().sum()
    assert_close(poe.bind(updates).energy(z), expected.unsqueeze(0), 1e-12)


@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_the_programs_gradient_vanishes_at_the_map(coordinates: str, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    for residual_map in MAPS:
        poe = ProductOfExperts.of(NAMES, residual_map, Cauchy(), Relative(0.5), anchor=Anchor(average), temperature=0.3)  # type: ignore[arg-type]
        solution = fixed_point(poe.bind(updates, coordinates=coordinates))  # type: ignore[arg-type]
        assert solution.converged
        # In Span the MAP of the updates is that of their statistics alone.
        posterior = poe.bind(updates) if coordinates == "full" else poe.bind(span_statistics(poe, updates))
        point = solution.value
        away = torch.zeros_like(point)
        norms = []
        for place in (point, away):
            leaf = place.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(log_density(posterior, joint=True)(leaf), leaf)
            norms.append(float(gradient.norm()))
        assert norms[0] < 1e-8 * norms[1], residual_map


def test_site_names_are_part_of_the_interface(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["mnist", "emoji"], (OutputGram(), InputGram()))
    posterior = poe.bind(random_updates(generator, 2, 2, 3, 4))
    trace = poutine.trace(program(posterior)).get_trace()
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == {
        "module", "update",
        "expert/mnist/OutputGram", "expert/emoji/OutputGram", "expert/mnist/InputGram", "expert/emoji/InputGram",
    }  # fmt: skip
    assert trace.nodes["update"]["value"].shape == (2, 3, 4)


def test_sampling_the_program_draws_from_the_anchor(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 30, 40)
    poe = ProductOfExperts.of(["a", "b"], anchor=Anchor(average, AbsolutePrecision(3.0)), temperature=0.5)
    pyro.set_rng_seed(1)
    draw = program(poe.bind(updates))()
    spread = (draw - average(updates)).std()
    # The standard error of a standard deviation from n normal draws is sd / sqrt(2 n).
    truth = math.sqrt(0.5 / 6.0)
    assert abs(float(spread) - truth) < 5 * truth / math.sqrt(2 * 1200)


def test_an_improper_anchor_scores_but_does_not_normalise(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 2)
    poe = ProductOfExperts.of(NAMES, Identity(), Gaussian(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    posterior = poe.bind(updates)
    z = torch.randn(4, 2, 2, 2, generator=generator, dtype=torch.float64)
    assert_close(log_density(posterior)(z), -posterior.energy(z))


def test_log_density_composes_with_function_transforms(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(3.0))
    posterior = poe.bind(span_statistics(poe, random_updates(generator, 2, 3, 4, 5)))
    density = log_density(posterior, joint=True)
    x = torch.randn(5, 2, 4, 1, generator=generator, dtype=torch.float64)
    hessian = torch.func.vmap(torch.func.hessian(density))(x)
    step = 1e-5 * torch.randn(2, 4, 1, generator=generator, dtype=torch.float64)
    gradient = torch.func.grad(density)
    difference = (gradient(x[0] + step) - gradient(x[0] - step)) / 2
    assert_close(torch.tensordot(hessian[0], step, dims=3), difference, 1e-6)


def test_factor_experts_in_their_three_forms(generator: torch.Generator) -> None:
    updates = {"wide": random_updates(generator, 1, 2, 3, 6), "tall": random_updates(generator, 1, 2, 5, 2)}
    on_update = FactorExpert("l1", lambda z: z.abs().sum((-2, -1)))
    on_span = FactorExpert("ridge", lambda c: c.square().sum(-1), coordinates="span")
    on_model = FactorExpert("sum", lambda zs: sum(z.sum((-2, -1)) for z in zs.values()).square(), scope="model")
    poe = ProductOfExperts.of(["a", "b"]) * on_update * on_span * on_model
    parts = [span_statistics(poe, u, [name]) for name, u in updates.items()]
    bases = [span_basis(poe, u)[0] for u in updates.values()]
    modules = [ModuleUpdates(n, n, ("a", "b"), torch.zeros_like(u[0, 0]), u[0]) for n, u in updates.items()]
    posterior = poe.bind(modules, coordinates="span")
    assert posterior.modules == ("wide", "tall")
    span = posterior.span
    c = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    c[..., 2] = 0  # the zero centre has no direction
    z = [torch.einsum("sj,jab->sab", c[:, m], bases[m]) for m in range(2)]
    plain = ProductOfExperts.of(["a", "b"]).bind(concatenate(parts))
    per_module = plain.energy(span.latents(c)) + torch.stack([each.abs().sum((-2, -1)) for each in z], -1)
    per_module = per_module + c.square().sum(-1)
    joint = per_module.sum(-1) + (z[0].sum((-2, -1)) + z[1].sum((-2, -1))).square()
    x = span.latents(c)
    assert_close(posterior.joint_energy(x), joint, 1e-9)
    assert_close(log_density(posterior, joint=True)(x), -joint + log_constant(posterior).sum(), 1e-9)
    with pytest.raises(ValueError, match="joint=True"):
        log_density(posterior)
    with pytest.raises(ValueError, match="'l1' sees the merged updates, which statistics alone cannot give"):
        poe.bind(concatenate(parts))
    with pytest.raises(ValueError, match="Use coordinates='span'"):
        poe.bind(updates["wide"])


def test_spans_of_modules_of_different_shapes_go_through_their_merges(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy())
    modules = [
        ModuleUpdates(name, name, ("a", "b"), torch.zeros(shape), random_updates(generator, 1, 2, *shape)[0])
        for name, shape in (("wide", (3, 6)), ("tall", (5, 2)))
    ]
    merges = [fixed_point(poe.bind(module)).value[0] for module in modules]
    posterior = poe.bind(modules, coordinates="span", through=merges)
    found = fixed_point(posterior).value
    for place, merge in enumerate(merges):
        assert_close(posterior.span.update(found, place), merge, 1e-6)
    with pytest.raises(ValueError, match="1 merged updates for 2 modules. Give one for each"):
        poe.bind(modules, coordinates="span", through=merges[:1])


def test_every_module_has_one_name(generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(["a", "b"]).bind(random_updates(generator, 2, 2, 3, 4))
    assert posterior.modules == ("0", "1")
    assert posterior.module(1).modules == ("1",)
    with pytest.raises(ValueError, match="3 names for 2 modules. Give one for each"):
        replace(posterior, modules=("a", "b", "c"))


def test_multivariate_exponent_uses_the_rank_of_each_module(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 1, 4, 6)
    updates[1, 0] = updates[1, 0, :, :1] @ updates[1, 0, :1, :]  # rank one
    poe = ProductOfExperts.of(["a"], InputGram(), StudentT(3.0, "multivariate"))
    dims = torch.tensor([4 * 4, 1 * 4], dtype=torch.float64)  # rank(U) * d_out
    posterior = poe.bind(updates)
    z = torch.zeros(2, 4, 6, dtype=torch.float64)
    experts_only = posterior.experts[0].energy(z)
    assert_close(experts_only, (3 + dims) / 2 * math.log1p(1 / 3), 1e-12)
    small = poe.bind(span_statistics(poe, updates))
    assert_close(small.experts[0].energy(torch.zeros(2, 2, 1, dtype=torch.float64)), experts_only, 1e-9)


def test_scales_and_relative_precision_are_the_documented_numbers(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    norm = updates[0].square().sum((-2, -1))
    at_zero = (updates[0] @ updates[0].mT).square().sum((-2, -1))
    balanced = 0.81 * norm * (at_zero / norm).sort().values[1]
    truth = {
        Absolute: torch.full((3,), 1.69),
        NormScaled: 0.5 * norm,
        Relative: 0.64 * at_zero,
        Balanced: balanced,
    }
    for scale in SCALES:
        poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), scale, anchor=Anchor(precision=RelativePrecision(0.3)))
        posterior = poe.bind(updates)
        squared = torch.stack([expert.scale_squared[0] for expert in posterior.experts])
        assert_close(squared, truth[type(scale)].double(), 1e-6)
        assert_close(posterior.anchor_precision, (0.3 * 2 * norm / 5 / squared).sum().unsqueeze(0), 1e-12)


def test_a_zero_update_under_identity_takes_the_modules_median_scale(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 4, 2, 3)
    updates[:, 1] = 0
    posterior = ProductOfExperts.of(list("abcd"), Identity(), Cauchy(), Relative(1.0)).bind(updates)
    squared = [float(expert.scale_squared) for expert in posterior.experts]
    assert squared[1] == sorted([squared[0], squared[2], squared[3]])[1]


def test_products_compose_and_refuse_what_is_ambiguous() -> None:
    a, b, c = (Expert(name) for name in "abc")
    anchor = Anchor(precision=AbsolutePrecision(2.0))
    assert (a * b * c * anchor).update_names == ("a", "b", "c")
    assert ((a * b) * (b.__class__("d") * c)).update_names == ("a", "b", "d", "c")
    with pytest.raises(ValueError, match="occurs more than once"):
        a * a
    for product in ((a * anchor) * ProductOfExperts((b,)), a * (b * anchor), anchor * (a * b)):
        assert product.anchor is anchor
        assert set(product.update_names) == {"a", "b"}
    with pytest.raises(ValueError, match="an anchor or a temperature of their own"):
        (a * anchor) * (b * Anchor(precision=AbsolutePrecision(1.0)))
    with pytest.raises(TypeError, match=r"instance of ResidualMap, not the class: `InputGram\(...\)`"):
        ProductOfExperts.of(["a"], InputGram)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an instance of AnchorPrecision"):
        Anchor(precision=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coordinates are 'update' or 'span'"):
        FactorExpert("f", lambda c: c, coordinates="Span")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no experts"):
        ProductOfExperts(())
    with pytest.raises(ValueError, match="temperature=0"):
        ProductOfExperts((a,), temperature=0)
    with pytest.raises(ValueError, match="must be a positive finite number"):
        Expert("a", importance=-1.0)
    with pytest.raises(ValueError, match="Relative\\(gamma=-1"):
        Relative(-1.0)
    with pytest.raises(ValueError, match="zero or above"):
        RelativePrecision(-0.1)


def test_bad_updates_are_one_clear_error(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES)
    updates = random_updates(generator, 2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 2, 2, 2\).*3 task vectors \(a, b, c\)"):
        poe.bind(updates[:, :2])
    updates[1, 2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="'c' \\(module 1 of the batch\\) has NaN"):
        poe.bind(updates)
    with pytest.raises(ValueError, match=r"center=...\)` has shape \(1, 3, 3\)"):
        (poe * Anchor(torch.zeros(3, 3))).bind(random_updates(generator, 1, 3, 2, 2))


def test_statistics_of_another_design_are_refused(generator: torch.Generator) -> None:
    statistics = span_statistics(ProductOfExperts.of(NAMES, InputGram()), random_updates(generator, 1, 3, 2, 2))
    with pytest.raises(ValueError, match="Make the statistics again"):
        ProductOfExperts.of(NAMES, OutputGram()).bind(statistics)


def test_a_factor_that_sums_over_draws_is_refused(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["a", "b"]) * FactorExpert("all", lambda c: c.square().sum(), coordinates="span")
    posterior = poe.bind(span_statistics(poe, random_updates(generator, 2, 2, 3, 4)))
    with pytest.raises(ValueError, match="'all' returned shape"):
        posterior.energy(torch.zeros(5, 2, 3, 1, dtype=torch.float64))


def test_a_centre_of_other_statistics_is_refused(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"])
    averaged = span_statistics(poe * Anchor(average), updates)
    with pytest.raises(ValueError, match="has the centre zero, the statistics were made with the centre Average"):
        poe.bind(averaged)
    with pytest.raises(ValueError, match=r"has the centre TaskArithmetic\(scale=0.3\), the .* centre Average"):
        (poe * Anchor(TaskArithmetic())).bind(averaged)
    with pytest.raises(ValueError, match=r"has the centre Average\(\), the statistics were made with the centre zero"):
        (poe * Anchor(average)).bind(span_statistics(poe, updates))
    with pytest.raises(ValueError, match="one part is about .* the centre zero, another about .* the centre Average"):
        concatenate([averaged, span_statistics(poe, updates)])
    with pytest.raises(ValueError, match="the design is about a, c, the statistics about a, b"):
        ProductOfExperts.of(["a", "c"]).bind(span_statistics(poe, updates))


def test_a_stored_centre_is_that_of_the_statistics(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    center = random_updates(generator, 2, 1, 3, 4)[:, 0]
    poe = ProductOfExperts.of(["a", "b"])
    statistics = span_statistics(poe * Anchor(center), updates)
    known = (poe * Anchor(center)).bind(statistics)
    stored = (poe * Anchor(stored_center)).bind(statistics)
    x = torch.randn(5, 2, 3, 1, generator=generator, dtype=torch.float64)
    assert torch.equal(known.energy(x), stored.energy(x))
    with pytest.raises(ValueError, match="do not tell its values"):
        (poe * Anchor(stored_center)).bind(updates)


def test_modules_are_selected_from_statistics(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(["a", "b"], energy=StudentT(3.0, "multivariate"))
    statistics = span_statistics(poe, random_updates(generator, 3, 2, 3, 4), ["one", "two", "three"])
    some = statistics.select([2, 0])
    assert some.modules == ("three", "one")
    x = torch.randn(3, 3, 1, generator=generator, dtype=torch.float64)
    whole, part = poe.bind(statistics), poe.bind(some)
    assert_close(part.energy(x[[2, 0]]), whole.energy(x)[[2, 0]], 1e-12)


def test_ranks_are_found_only_where_they_are_asked_for(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    plain = ProductOfExperts.of(["a", "b"])
    with_ranks, without = span_statistics(plain, updates), span_statistics(plain, updates, ranks=False)
    x = torch.randn(2, 3, 1, generator=generator, dtype=torch.float64)
    assert torch.equal(plain.bind(with_ranks).energy(x), plain.bind(without).energy(x))
    multivariate = ProductOfExperts.of(["a", "b"], energy=StudentT(3.0, "multivariate"))
    with pytest.raises(ValueError, match="statistics were made without"):
        multivariate.bind(without)


def test_the_twin_of_a_multivariate_energy_waits_for_the_dimension(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], InputGram(), StudentT(3.0, "multivariate"))
    heavy, gaussian = poe.bind(updates), poe.twin().bind(updates)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert_close(gaussian.weights(zero), heavy.weights(zero), 1e-12)
    assert_close(gaussian.weights(zero + 9.0), heavy.weights(zero), 1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float, generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(["a", "b"]).bind(random_updates(generator, 1, 2, 2, 2))
    with pytest.raises(ValueError, match=f"temperature={temperature}.*positive finite"):
        replace(posterior, temperature=temperature)
