"""Settings far from one: the answer of ordinary ones where it does not depend on them, and no more of them than fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from inference import fixed_point, gibbs, laplace, log_evidence, minimize, slice_sample
from poe_merge import merge
from poe_models import (
    Absolute,
    Balanced,
    Cauchy,
    Expert,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    NormScaled,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    RidgePrecision,
    Scale,
    StudentT,
    TaskVectors,
)
from poe_models.limits import LARGEST, SMALLEST
from poe_models.posterior import Posterior
from tests.helpers import random_updates
from tests.seeds import seeded

DTYPES = (torch.float32, torch.float64)
ends = pytest.mark.parametrize("end", [SMALLEST, LARGEST])
types = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bound(dtype: torch.dtype, generator: torch.Generator, **settings: object) -> Posterior:
    updates = random_updates(generator, 2, 2, 3, 4).to(dtype)
    return ProductOfExperts.of(["a", "b"], **settings).bind(updates)  # type: ignore[arg-type]


@types
@ends
@pytest.mark.parametrize("scale", [Balanced, Relative, Absolute, NormScaled])
def test_a_gaussian_merge_does_not_know_its_scale(
    scale: Callable[[float], Scale], end: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """With an anchor relative to it every number of the normal equations has it as a factor."""
    updates = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    experts = {name: {"fc.weight": update} for name, update in zip("ab", updates, strict=True)}
    vectors = TaskVectors({"fc.weight": torch.zeros(3, 4, dtype=dtype)}, experts, dtype=dtype)
    found = {}
    for gamma in (1.0, end):
        poe = ProductOfExperts.of(vectors.names, energy=Gaussian(), scale=scale(gamma))
        solution = fixed_point(poe.bind(next(iter(vectors))))
        assert solution.converged
        assert solution.value.dtype == dtype
        found[gamma] = merge(vectors, poe)["fc.weight"]
        torch.testing.assert_close(solution.value[0], found[gamma], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[end], found[1.0], rtol=1e-5, atol=1e-5)
    assert found[end].norm() > 0.1


@types
@ends
@pytest.mark.parametrize("energy", [Gaussian, Cauchy])
def test_importance_and_strength_alike(
    energy: Callable[[float], object], end: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """They are a factor of the whole energy, whose minimum stays where it is."""
    ordinary = bound(dtype, seeded(4), energy=energy(1.0))
    for settings in ({"energy": energy(end)}, {"energy": energy(1.0), "importance": end}):
        extreme = bound(dtype, seeded(4), **settings)
        for solver in (fixed_point, minimize) if energy is Gaussian and dtype == torch.float64 else (fixed_point,):
            torch.testing.assert_close(solver(extreme).value, solver(ordinary).value, rtol=1e-4, atol=1e-4)
    assert fixed_point(ordinary).value.norm() > 0.1


@types
@pytest.mark.parametrize("energy", [Cauchy(), StudentT(4.0), Huber(1.0), GeneralizedGaussian(1.5)], ids=repr)
def test_a_wide_scale_is_the_gaussian_limit_and_a_narrow_one_the_anchor(
    energy: object, dtype: torch.dtype, generator: torch.Generator
) -> None:
    wide = bound(dtype, seeded(5), energy=energy, scale=Relative(LARGEST))
    twin = bound(dtype, seeded(5), energy=Gaussian(), scale=Relative())
    if not isinstance(energy, GeneralizedGaussian):  # whose anchor is relative to its weight at one
        torch.testing.assert_close(fixed_point(wide).value, fixed_point(twin).value, rtol=1e-4, atol=1e-4)
    narrow = fixed_point(bound(dtype, seeded(5), energy=energy, scale=Relative(SMALLEST)))
    assert narrow.converged
    assert narrow.value.norm() < 1e-6


@types
@ends
def test_draws_have_the_scale_as_their_unit(end: float, dtype: torch.dtype) -> None:
    """About the MAP the precision of a Gaussian product is that of scale 1 over ``gamma^2``."""
    ordinary, extreme = (bound(dtype, seeded(6), energy=Gaussian(), scale=Relative(gamma)) for gamma in (1.0, end))
    mode = fixed_point(ordinary).value.double()
    one, other = laplace(ordinary), laplace(extreme)
    spreads = one.standard_deviations().double(), other.standard_deviations().double() / end
    torch.testing.assert_close(*spreads, rtol=1e-4, atol=0.0)
    entries = math.prod(ordinary.event_shape) * math.log(end)
    shift = other.log_integral() - one.log_integral() - entries
    assert shift.isfinite().all()
    if end == LARGEST:  # noise of the scale's size hides the MAP, and rounding hides noise that is small beside it
        for sampler in (lambda p: laplace(p).sample(3, seeded(1)), lambda p: gibbs(p, 3, generator=seeded(1))):
            drawn, wanted = sampler(extreme), sampler(ordinary)
            assert drawn.values.dtype == dtype
            noise = wanted.values.double() - mode
            torch.testing.assert_close(drawn.values.double() / end, noise, rtol=1e-3, atol=1e-3)
        assert slice_sample(extreme, 3, generator=seeded(2), chains=2, warmup=3).values.isfinite().all()
    else:
        drawn = gibbs(extreme, 3, generator=seeded(1)).values.double()
        torch.testing.assert_close(drawn, mode.expand_as(drawn), rtol=1e-4, atol=1e-4)


@ends
def test_evidence_in_single_precision_is_that_in_double(end: float) -> None:
    single, double = (
        log_evidence(bound(dtype, seeded(7), energy=Gaussian(), scale=Relative(end)), generator=seeded(1)).value
        for dtype in DTYPES
    )
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-3)


@ends
def test_a_small_scale_of_small_updates_is_taken_in_units_of_theirs(end: float, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    size = 1e-37 if end == SMALLEST else 1e37  # whose residuals' squares float64 still holds
    poe = ProductOfExperts.of(["a", "b"], scale=Relative(end), energy=Gaussian())
    wanted, found = (fixed_point(poe.bind(each)).value for each in (updates, updates * size))
    torch.testing.assert_close(found / size, wanted, rtol=1e-6, atol=1e-9)
    spreads = [laplace(poe.bind(each)).standard_deviations() for each in (updates, updates * size)]
    torch.testing.assert_close(spreads[1] / size, spreads[0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "build",
    [
        *(Balanced, Absolute, NormScaled, Relative, StudentT, Cauchy, Huber, Gaussian, GeneralizedGaussian),
        lambda value: StudentT(3.0, exponent=value),
        lambda value: GeneralizedGaussian(1.0, epsilon=value),
        lambda value: Expert("a", importance=value),
        lambda value: ProductOfExperts.of(["a"], temperature=value),
    ],
)
def test_what_products_of_settings_cannot_hold_is_refused(build: Callable[[float], object]) -> None:
    for value in (1e-31, 1e-170, 5e-324, 1e31, 1e300):
        told = re.escape(f"={value})`: must be a positive finite number, from 1e-30 to 1e+30.")
        with pytest.raises(ValueError, match=told):
            build(value)
    build(SMALLEST)
    build(LARGEST)


@pytest.mark.parametrize("build", [RelativePrecision, RidgePrecision])
def test_so_are_precisions_but_for_zero(build: Callable[[float], object]) -> None:
    for value in (1e-31, -1e-31, 1e31):
        told = re.escape(f"={value})`: must be a finite number, zero or above: 0, or from 1e-30 to 1e+30.")
        with pytest.raises(ValueError, match=told):
            build(value)
    for value in (0.0, SMALLEST, LARGEST):
        build(value)
