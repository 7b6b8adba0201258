"""Every algorithm on updates of extreme size: the answer at size 1, in those units, or a refusal by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference import fixed_point, gibbs, laplace, log_evidence, minimize, nuts, slice_sample
from inference.evidence.estimate import leave_one_expert_out
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
    Cauchy,
    Directional,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    StudentT,
)
from poe_models.posterior import Posterior
from tests.helpers import random_updates
from tests.seeds import seeded

SIZES = [(torch.float32, 2.0**-50), (torch.float32, 2.0**50), (torch.float64, 2.0**-500), (torch.float64, 2.0**500)]
"""Powers of two, about 1e-15, 1e15, 1e-150 and 1e150: what is computed in own units has the same digits."""
extreme = pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
MAPS = (Directional(), InputGram(), OutputGram(), Identity())


def product(residual_map: object = None, **settings: object) -> ProductOfExperts:
    return ProductOfExperts.of(["a", "b"], residual_map, **settings)  # type: ignore[arg-type]


def both(
    poe: ProductOfExperts, dtype: torch.dtype, size: float, generator: torch.Generator, coordinates: str = "full"
) -> tuple[Posterior, Posterior]:
    """The posterior of two modules, and of the first of them times a size beside the second as it is."""
    updates = random_updates(generator, 2, 2, 3, 4).to(dtype)
    sizes = torch.tensor([size, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    return tuple(poe.bind(each, coordinates) for each in (updates, (updates * sizes).to(dtype)))  # type: ignore[arg-type, return-value]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def over(latents: Tensor, size: float) -> Tensor:
    """Latents ``(*S, 2, a, b)`` with the first module's over its size."""
    return latents.double() / torch.tensor([size, 1.0], dtype=torch.float64).view(2, 1, 1)


@extreme
@pytest.mark.parametrize("residual_map", MAPS, ids=repr)
@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("solver", [fixed_point, minimize])
def test_solvers(
    solver: Callable[[Posterior], object],
    coordinates: str,
    residual_map: object,
    dtype: torch.dtype,
    size: float,
    generator: torch.Generator,
) -> None:
    if solver is minimize and coordinates == "full" and dtype == torch.float32:
        return  # its tolerance is below the rounding of float32, at any size
    ordinary, extreme = both(product(residual_map, energy=StudentT(4.0)), dtype, size, generator, coordinates)
    wanted, found = (solver(each) for each in (ordinary, extreme))
    close(over(found.value, size), wanted.value, torch.float32)  # type: ignore[attr-defined]
    assert found.status == wanted.status  # type: ignore[attr-defined]
    close(over(extreme.update(found.value), size), ordinary.update(wanted.value), torch.float32)  # type: ignore[attr-defined]
    kept = found.info.retention, wanted.info.retention  # type: ignore[attr-defined]
    close(kept[0].norm / torch.tensor([size, 1.0], dtype=torch.float64), kept[1].norm, torch.float32)
    close(kept[0].kept, kept[1].kept, torch.float32)


def test_a_part_of_a_batch_has_other_units_too(generator: torch.Generator) -> None:
    ordinary, extreme = both(product(), torch.float64, 2.0**500, generator)
    wanted, found = (fixed_point(each.module(0)).value for each in (ordinary, extreme))
    close(found / 2.0**500, wanted, torch.float64)


@extreme
@pytest.mark.parametrize("scale", [Balanced(1.0), Relative(0.7)], ids=repr)
def test_a_solution_says_what_it_was_solved_with(
    scale: object, dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    ordinary, extreme = both(product(Identity(), scale=scale), dtype, size, generator)
    wanted, found = fixed_point(ordinary).info, fixed_point(extreme).info
    squares = torch.tensor([size**2, 1.0], dtype=torch.float64)
    close(found.weights * squares.unsqueeze(-1), wanted.weights, dtype)  # 1 / s^2, of two powers
    close(found.anchor_precision * squares, wanted.anchor_precision, dtype)
    close(found.energy, wanted.energy, dtype)


@extreme
@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("residual_map", MAPS, ids=repr)
def test_laplace(
    residual_map: object, coordinates: str, dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    poe = product(residual_map, energy=Gaussian())
    ordinary, extreme = both(poe, dtype, size, generator, coordinates)
    one, other = laplace(ordinary), laplace(extreme)
    close(over(other.standard_deviations(), size), one.standard_deviations(), torch.float32)
    drawn = [each.sample(3, seeded(1)) for each in (one, other)]
    close(over(drawn[1].values, size), drawn[0].values, torch.float32)
    seen = math.prod(ordinary.event_shape) * math.log(size)  # a density of so many numbers
    shift = torch.tensor([seen, 0.0], dtype=torch.float64)
    densities = [each.log_density(d.values) for each, d in zip((one, other), drawn, strict=True)]
    torch.testing.assert_close(densities[1] + shift, densities[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(other.log_integral() - shift, one.log_integral(), rtol=1e-5, atol=1e-2)


@extreme
@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("sampler", [gibbs, slice_sample, nuts])
def test_samplers(
    sampler: Callable[..., object], coordinates: str, dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    ordinary, extreme = both(product(InputGram(), energy=Cauchy()), dtype, size, generator, coordinates)
    wanted, found = (sampler(each, 3, generator=seeded(2), chains=3, warmup=4) for each in (ordinary, extreme))
    assert found.values.isfinite().all()  # type: ignore[attr-defined]
    if sampler is gibbs:  # no step depends on a rounded comparison
        close(over(found.values, size), wanted.values, torch.float32)  # type: ignore[attr-defined]
        close(found.stats["lp"], wanted.stats["lp"], torch.float32)  # type: ignore[attr-defined]
    spread = [over(found.values, size).std(), wanted.values.double().std()]  # type: ignore[attr-defined]
    assert 1 / 3 < spread[0] / spread[1] < 3


@extreme
@pytest.mark.parametrize("energy", [Gaussian(), StudentT(4.0, exponent="multivariate")], ids=repr)
def test_evidence_is_a_density_of_what_is_seen(
    energy: object, dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    ordinary, extreme = both(product(InputGram(), energy=energy), dtype, size, generator)
    wanted, found = (log_evidence(each, generator=seeded(3)) for each in (ordinary, extreme))
    shift = wanted.dimension[0].sum() * math.log(size)
    torch.testing.assert_close(found.value + torch.stack([shift, 0 * shift]), wanted.value, rtol=1e-5, atol=1e-2)
    left = [leave_one_expert_out(each, generator=seeded(3)).value for each in (ordinary, extreme)]
    each = wanted.dimension * torch.tensor([[math.log(size)], [0.0]]).double()
    torch.testing.assert_close(left[1] + each, left[0], rtol=1e-5, atol=1e-2)


@extreme
@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize(
    "settings",
    [
        {"scale": Absolute(1.0)},
        {"anchor": Anchor(precision=AbsolutePrecision(0.5))},
        {"anchor": Anchor(center=lambda updates: torch.ones_like(updates[:, 0]))},
    ],
    ids=["scale", "precision", "centre"],
)
def test_absolute_designs_are_refused(
    settings: dict[str, object], coordinates: str, dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    if coordinates == "span" and dtype == torch.float32:
        return  # statistics are float64, which holds these sizes
    _, extreme = both(product(**settings), dtype, size, generator, coordinates)
    runs: list[Callable[[], object]] = [
        lambda: fixed_point(extreme),
        lambda: minimize(extreme),
        lambda: laplace(extreme),
        lambda: gibbs(extreme, 2, generator=generator),
        lambda: slice_sample(extreme, 2, generator=generator),
        lambda: nuts(extreme, 2, generator=generator),
    ]
    for run in [*runs, lambda: log_evidence(extreme, generator=generator)][: 7 if coordinates == "full" else 6]:
        with pytest.raises(
            ValueError, match=r"expert 'a' in module 0.* fourth power.* absolute sizes.* divide all updates"
        ):
            run()


def test_a_step_tolerance_is_absolute(generator: torch.Generator) -> None:
    _, extreme = both(product(), torch.float64, 2.0**500, generator)
    with pytest.raises(ValueError, match="a setting is about absolute sizes"):
        fixed_point(extreme, step_tolerance=1e-5)


def test_points_that_are_given_are_in_the_units_of_the_updates(generator: torch.Generator) -> None:
    ordinary, extreme = both(product(), torch.float64, 2.0**500, generator)
    start = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([2.0**500, 1.0], dtype=torch.float64).view(2, 1, 1)
    wanted, found = fixed_point(ordinary, starts=(start,)), fixed_point(extreme, starts=(start * sizes,))
    close(over(found.value, 2.0**500), wanted.value, torch.float64)
    assert torch.equal(found.info.steps, wanted.info.steps)
    centred = both(product(anchor=Anchor(start)), torch.float64, 1.0, generator)[0]
    big = product(anchor=Anchor(start * sizes)).bind(
        torch.stack([e.update for e in centred.experts], 1) * sizes[..., None]
    )
    close(over(fixed_point(big).value, 2.0**500), fixed_point(centred).value, torch.float64)


@pytest.mark.parametrize("size", [2.0**-400, 2.0**-50, 1.0])
def test_a_zero_update_beside_a_centre_has_no_size(size: float, generator: torch.Generator) -> None:
    """Its latents in the span are zero, so that the others' size is the module's."""
    updates = random_updates(generator, 2, 2, 3, 4) * size
    updates[0, 1] = 0.0
    posterior = product(InputGram(), anchor=Anchor(0.3 * updates[:, 0])).bind(updates, "span")
    assert float(posterior.experts[1].update[0].abs().max()) == 0.0
    over_one = product(InputGram(), anchor=Anchor(0.3 * updates[:, 0] / size)).bind(updates / size, "span")
    found, wanted = (each.update(fixed_point(each).value) for each in (posterior, over_one))
    close(found / size, wanted, torch.float64)


def test_laplace_tells_the_mode_that_it_was_given(generator: torch.Generator) -> None:
    _, posterior = both(product(InputGram()), torch.float64, 2.0**-300, generator)
    mode = fixed_point(posterior).value
    found = laplace(posterior)
    assert found.posterior is posterior
    torch.testing.assert_close(found.mode, mode)
