"""The mathematics on a GPU against the CPU: solvers, evidence, hierarchical models.

Samplers are in `test_gpu_samplers.py`, whole models in `gpu`.

Everything is computed twice, on the device (`cuda`; `POE_TEST_DEVICE` names another, see conftest.py) and on the CPU.
What is not random agrees to the tolerance of its dtype; draws agree in their means within Monte Carlo error, for the
same seed gives other numbers on another device.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics import fixed_point_convergence, solution_records
from inference import (
    DenseLaplace,
    HierarchicalModel,
    compare_designs,
    fixed_point,
    hierarchical,
    leave_one_expert_out,
    log_evidence,
    minimize,
    plain_iterates,
    require_proper,
    temperature_range,
)
from inference.evidence.estimate import log_normalizers
from inference.gradient_check import judged, relative_gradient
from poe_models import (
    PRECISIONS,
    SCALES,
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
    Cauchy,
    Energy,
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
    log_density,
)
from tests.devices import both, on, small
from tests.helpers import ENERGIES, MAPS, assert_close, merged, name_of
from tests.levels import Z
from tests.seeds import seed_of, seeded

pytestmark = pytest.mark.gpu
NAMES = ("a", "b", "c")
EXACT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative agreement of a MAP; solvers stop at 1e-5 and 1e-10 of the gradient."""


# --- the MAP ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_every_energy_has_the_same_map(
    energy: Energy, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    updates = small(generator, dtype=dtype)
    for residual_map in (Identity(), InputGram(), (OutputGram(), InputGram())):
        poe = ProductOfExperts.of(NAMES, residual_map, energy, Relative(0.7), anchor=Anchor(average))
        for coordinates in ("full", "span"):
            here, there = both(poe, updates, device, coordinates=coordinates)
            one, other = merged(here), merged(there)
            assert (other.device.type, other.dtype) == (device.type, one.dtype)
            # Where a minimum is flat, rounding moves it along, and the energy says whether it is as good.
            exact = poe.bind(updates.double())
            assert_close(exact.energy(other.cpu().double()), exact.energy(one.double()), EXACT[dtype])
            if dtype == torch.float64:
                assert_close(other.cpu(), one, EXACT[dtype])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_scale_and_anchor_has_the_same_map(
    scale: str, precision: str, device: torch.device, generator: torch.Generator
) -> None:
    anchor = Anchor(average, PRECISIONS[precision](0.3))
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0), SCALES[scale](0.8), [1.0, 2.0, 0.5], anchor)
    updates = small(generator)
    updates[0, 1] = 0  # an expert without an update takes a fallback
    here, there = both(poe, updates, device)
    for one, other in zip(here.experts, there.experts, strict=True):
        assert_close(other.scale_squared.cpu(), one.scale_squared, 1e-10)
        assert torch.equal(other.active.cpu(), one.active)
    assert_close(merged(there).cpu(), merged(here), 1e-6)


@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_adapters_are_merged_alike(residual_map: Any, device: torch.device, generator: torch.Generator) -> None:
    left = torch.randn(2, 3, 24, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, 2, 30, generator=generator, dtype=torch.float64)
    poe = ProductOfExperts.of(NAMES, residual_map, Cauchy(), Balanced(0.5))
    here = fixed_point(poe.bind(left @ right, low_rank=(left, right)))
    there = fixed_point(poe.bind((left @ right).to(device), low_rank=(left.to(device), right.to(device))))
    assert_close(there.value.cpu(), here.value, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    updates = small(generator, dtype=dtype)
    here, there = both(ProductOfExperts.of(NAMES), updates, device)
    assert there.dtype == torch.float32
    assert_close(merged(there).cpu(), merged(here), 1e-3)


def test_a_single_step_and_every_start_agree(device: torch.device, generator: torch.Generator) -> None:
    here, there = both(ProductOfExperts.of(NAMES, anchor=Anchor(average)), small(generator), device)
    starts = ("ones", "twin", "experts", "center", torch.zeros(2, 12, 9, dtype=torch.float64))
    for start in starts:
        given = start.to(device) if isinstance(start, Tensor) else start
        one, other = fixed_point(here, starts=(start,)), fixed_point(there, starts=(given,))
        assert_close(other.value.cpu(), one.value, 1e-6)
    ones = torch.ones(2, 3, dtype=torch.float64)
    one, other = next(plain_iterates(here, ones)), next(plain_iterates(there, ones.to(device)))
    assert_close(other.cpu(), one, 1e-10)


def test_what_a_solution_says_agrees(device: torch.device, generator: torch.Generator) -> None:
    here, there = both(ProductOfExperts.of(NAMES, InputGram(), Cauchy()), small(generator), device)
    one, other = fixed_point(here), fixed_point(there)
    assert other.status == one.status
    for index in range(2):
        first, second = one.info.record(index), other.info.record(index)
        assert second["energy"] == pytest.approx(first["energy"], rel=1e-9)
        kept = [each.info.retention.record(index)["kept"] for each in (one, other)]
        assert kept[1] == pytest.approx(kept[0], abs=1e-6)
    tables = [fixed_point_convergence(solution_records(each, ["m", "n"])) for each in (one, other)]
    assert tables[1].rate == pytest.approx(tables[0].rate, rel=1e-5)
    assert tables[1].relative_weights == pytest.approx(tables[0].relative_weights, rel=1e-6)
    assert_close(relative_gradient(there, other.value).cpu() + 1, relative_gradient(here, one.value) + 1, 1e-6)
    assert judged(there, other).status == judged(here, one).status


def test_lbfgs_with_a_factor_expert_agrees(device: torch.device, generator: torch.Generator) -> None:
    small_coefficients = FactorExpert("small", lambda c: 0.3 * c.square().sum(-1), coordinates="span")
    pull = FactorExpert("sum", lambda u: 1e-3 * u.square().sum((-2, -1)), coordinates="update")
    poe = ProductOfExperts.of(NAMES) * small_coefficients * pull
    here, there = both(poe, small(generator), device, coordinates="span")
    one, other = minimize(here), minimize(there)
    assert one.converged
    assert other.converged
    assert_close(there.update(other.value).cpu(), here.update(one.value), 1e-4)
    first, second = DenseLaplace(here, one.value), DenseLaplace(there, other.value)
    assert_close(second.standard_deviations().cpu(), first.standard_deviations(), 1e-4)
    assert_close(second.log_integral().cpu(), first.log_integral(), 1e-6)
    drawn = second.sample(4000, on(device, 1)).values[0]
    assert torch.equal(drawn, second.sample(4000, on(device, 1)).values[0])
    error = (drawn.mean(0) - other.value) / (second.standard_deviations() / 4000**0.5)
    known = second.standard_deviations() > 1e-9
    assert float(error[known].abs().max()) < Z + 1


def test_the_program_has_the_same_density_and_gradient(device: torch.device, generator: torch.Generator) -> None:
    here, there = both(ProductOfExperts.of(NAMES, InputGram(), StudentT(3.0)), small(generator), device)
    z = small(generator, 2, 1, 12, 9)[:, 0]
    found = []
    for posterior, point in ((here, z), (there, z.to(device))):
        x = point.clone().requires_grad_(True)
        value = log_density(posterior)(x)
        found.append((value.detach().cpu(), torch.autograd.grad(value.sum(), x)[0].cpu()))
    assert_close(found[1][0], found[0][0], 1e-10)
    assert_close(found[1][1], found[0][1], 1e-10)


def test_improper_posteriors_are_refused_alike(device: torch.device, generator: torch.Generator) -> None:
    bare = Anchor(precision=AbsolutePrecision(0.0))
    for residual_map in MAPS:
        for energy in (Cauchy(), Gaussian(), Huber(1.0)):
            poe = ProductOfExperts.of(NAMES, residual_map, energy, anchor=bare)
            said = []
            for posterior in both(poe, small(generator, 1, 3, 4, 5), device):
                try:
                    require_proper(posterior)
                    said.append("proper")
                except ValueError as error:
                    said.append(str(error))
            assert said[0] == said[1]


# --- evidence, hierarchical models, temperatures ---


def normalised(energy: Energy, residual_map: Any = None, gamma: float = 1.0) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    return ProductOfExperts.of(NAMES, residual_map or Identity(), energy, Absolute(gamma), anchor=anchor)


@pytest.mark.parametrize("residual_map", [Identity(), InputGram(), OutputGram()], ids=name_of)
def test_exact_evidence_agrees(residual_map: Any, device: torch.device, generator: torch.Generator) -> None:
    here, there = both(normalised(Gaussian(), residual_map), small(generator, 3, 3, 4, 5), device)
    one, other = log_evidence(here, generator=seeded(0)), log_evidence(there, generator=on(device, 0))
    assert_close(other.value.cpu(), one.value, 1e-9)
    assert_close(log_normalizers(there).cpu(), log_normalizers(here), 1e-9)
    left = [leave_one_expert_out(p, generator=g).value.cpu() for p, g in ((here, seeded(0)), (there, on(device, 0)))]
    assert_close(left[1], left[0], 1e-8)


@pytest.mark.parametrize(
    "energy",
    [StudentT(4.0, "multivariate"), Cauchy("multivariate"), Huber(1.0), GeneralizedGaussian(1.0)],
    ids=name_of,
)
def test_sampled_evidence_agrees_within_its_error(
    energy: Energy, device: torch.device, generator: torch.Generator
) -> None:
    here, there = both(normalised(energy), small(generator, 2, 3, 1, 3), device)
    assert_close(log_normalizers(there).cpu(), log_normalizers(here), 1e-9)
    one = log_evidence(here, generator=seeded(0))
    other, same = (log_evidence(there, generator=on(device, 1)) for _ in range(2))
    assert other.value.device.type == device.type
    assert torch.equal(other.value, same.value)
    error = (one.standard_error.square() + other.standard_error.cpu().square()).sqrt()
    assert float(((other.value.cpu() - one.value) / error).abs().max()) < Z
    left = leave_one_expert_out(there, generator=on(device, 2))
    assert left.value.shape == (2, 3)
    assert bool(left.standard_error.isfinite().all())


def test_designs_are_ranked_alike(device: torch.device, generator: torch.Generator) -> None:
    updates = small(generator, 2, 3, 2, 4)
    designs = {
        "narrow": normalised(StudentT(4.0, "multivariate"), None, 0.3),
        "wide": normalised(StudentT(4.0, "multivariate"), None, 3.0),
        "normal": normalised(Gaussian()),
    }
    tables = [
        compare_designs(designs, each, generator=source)
        for each, source in ((updates, seeded(0)), (updates.to(device), on(device, 0)))
    ]
    for name in designs:
        (one,), (other,) = ([row.evidence for row in table.rows if row.name == name] for table in tables)
        assert abs(one.total - other.total) < Z * math.hypot(one.total_error, other.total_error) + 1e-6
    assert "log evidence" in str(tables[1])


@pytest.mark.parametrize("shared", ["model", "expert", "module"])
def test_the_hierarchical_model_is_the_same_density(
    shared: Any, device: torch.device, generator: torch.Generator
) -> None:
    poe = normalised(StudentT(4.0, "multivariate"), InputGram())
    updates = small(generator, 4, 3, 3, 5)
    here, there = (HierarchicalModel(poe, each, shared) for each in (updates, updates.to(device)))
    size = {"model": (), "expert": (3,), "module": (4,)}[shared]
    given = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in (size, size, (4, 3))]
    found = []
    for model in (here, there):
        gamma, nu, white = (each.to(model.eta.device).requires_grad_(True) for each in given)
        value, weights = model.log_density(gamma, nu, white)
        slopes = torch.autograd.grad(value, (gamma, nu, white))
        found.append([each.detach().cpu() for each in (value, weights, *slopes)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-8)


@pytest.mark.parametrize("energy", [Gaussian(), StudentT(4.0, "multivariate")], ids=name_of)
def test_the_hierarchical_sampler_finds_the_same_scale(
    energy: Energy, device: torch.device, generator: torch.Generator
) -> None:
    updates = small(generator, 12, 3, 1, 8)
    how = {"seed": seed_of(0), "chains": 1, "warmup": 30}
    one, other, same = (
        hierarchical(normalised(energy), each, 40, **how) for each in (updates, updates.to(device), updates.to(device))
    )
    assert torch.equal(other.gamma, same.gamma)
    # A dozen effective draws of each at least: means are known to a third of the spread.
    assert float((other.gamma.log().mean().cpu() - one.gamma.log().mean()).abs() / one.gamma.log().std()) < 2
    update = other.update("3", 0, 39)
    assert (update.device.type, tuple(update.shape)) == (device.type, (1, 8))


@pytest.mark.parametrize("energy", [StudentT(4.0), Cauchy("multivariate"), Huber(0.7), Gaussian()], ids=name_of)
def test_temperature_ranges_agree(energy: Energy, device: torch.device, generator: torch.Generator) -> None:
    updates = small(generator)
    for how in ({}, {"coordinates": "span"}):
        here, there = both(ProductOfExperts.of(NAMES, InputGram(), energy), updates, device, **how)
        assert temperature_range(there) == pytest.approx(temperature_range(here), rel=1e-8)


def test_posteriors_of_one_module_and_other_temperatures_stay_on_the_device(
    device: torch.device, generator: torch.Generator
) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0, "multivariate"))
    here, there = both(poe, small(generator), device)
    for change in (lambda p: p.module(1), partial(replace, temperature=0.5)):
        one, other = change(here), change(there)
        z = small(generator, one.num_modules, 1, 12, 9)[:, 0]
        assert_close(other.energy(z.to(device)).cpu(), one.energy(z), 1e-10)
        assert other.residuals(z.to(device)).device.type == device.type
        single = other.experts[0].operator.to(torch.float32)
        assert single.quadratic(z.float().to(device)).device.type == device.type
