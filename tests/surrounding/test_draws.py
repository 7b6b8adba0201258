"""Draws surround the merge, at a size where the span of the updates alone is elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.chains import surround_verdict
from diagnostics.verdicts import Level
from inference import (
    Design,
    MergedEnsemble,
    SpanDraws,
    collect_statistics,
    distance_from_merge,
    fixed_point,
    gibbs,
    merge_checkpoint,
    sample_full,
    slice_sample,
)
from inference.merge_distance import FAR, span_distance
from inference.models.modules import read_modules
from inference.models.surrounding import distance_of_module
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
    StudentT,
    TaskVectors,
    average,
    span_statistics,
)
from tests.helpers import assert_close
from tests.seeds import seeded
from tests.surrounding.toys import LENGTHS, NAMES, SHAPES, around, low_rank, product

SIGMAS = 5.2
"""Two-sided level of about 2e-7."""


def plain(vectors: TaskVectors, poe: ProductOfExperts, count: int = 500) -> SpanDraws:
    """What used to be drawn beside a merge: the posterior on the span of the updates alone."""
    statistics = collect_statistics(vectors, Design(poe, coordinates="span"))
    posterior = poe.bind(statistics)
    draws = gibbs(posterior, count, generator=seeded(0))
    return SpanDraws.of(draws, posterior)


def merges(vectors: TaskVectors, poe: ProductOfExperts) -> dict[str, Tensor]:
    return {module.name: fixed_point(poe.bind(module)).value[0] for module in vectors}


@pytest.mark.parametrize(
    "residual_map", [InputGram(), OutputGram(), Directional(), (InputGram(), OutputGram())], ids=repr
)
@pytest.mark.parametrize("energy", [Gaussian(), Cauchy(), StudentT(4.0, "multivariate")], ids=repr)
@pytest.mark.parametrize("center", [None, average], ids=["zero", "average"])
def test_the_merge_is_a_stationary_point_of_the_same_energy(
    residual_map: Any, energy: Any, center: Any, generator: torch.Generator
) -> None:
    updates = torch.stack([low_rank(generator, (12, 16), length) for length in LENGTHS]).unsqueeze(0)
    poe = product(energy, residual_map, center)
    merge = fixed_point(poe.bind(updates), tolerance=1e-12).value
    statistics = span_statistics(poe, updates, through=merge)
    assert statistics.basis == (*NAMES, "center", "merge")
    posterior = poe.bind(statistics)
    span = posterior.span
    full = poe.bind(updates)
    basis = torch.cat([updates[0], updates.mean(1) if center else torch.zeros_like(merge), merge])
    c = torch.randn(3, 1, 6, generator=generator, dtype=torch.float64)
    combined = torch.einsum("smk,kab->smab", c, basis)
    assert_close(posterior.energy(span.latents(c)), full.energy(combined), 1e-8)
    latents = span.latents(torch.eye(6, dtype=torch.float64)[-1:]).requires_grad_()
    (gradient,) = torch.autograd.grad(posterior.energy(latents).sum(), latents)
    scale = torch.autograd.grad(posterior.energy(start := torch.zeros_like(latents).requires_grad_()).sum(), start)[0]
    assert float(gradient.norm() / scale.norm().clamp(min=1e-12)) < 1e-6 or center is not None
    assert float(gradient.norm()) < 1e-6 * max(1.0, float(full.energy(torch.zeros_like(merge)).sum()))


def test_a_span_through_a_merge_belongs_to_its_design(generator: torch.Generator) -> None:
    updates = torch.stack([low_rank(generator, (6, 8), length) for length in LENGTHS])
    poe = product(Cauchy())
    statistics = span_statistics(poe, updates, ["m"], through=fixed_point(poe.bind(updates)).value)
    replace(poe, temperature=0.1).bind(statistics)
    for other in (product(StudentT(3.0)), poe * Anchor(precision=AbsolutePrecision(1.0))):
        with pytest.raises(ValueError, match="'m' go through the merge of the design a Cauchy.*has another merge"):
            other.bind(statistics)
    with pytest.raises(ValueError, match=r"give one finite merged update for each module, \(1, 6, 8\)"):
        span_statistics(poe, updates, through=torch.zeros(8, 6, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 2.0])
def test_draws_through_the_merge_have_it_as_their_mean(temperature: float, vectors: TaskVectors) -> None:
    poe = product(Gaussian(), temperature=temperature)
    draws = around(vectors, poe, 250)
    expected = merges(vectors, poe)
    for tensor in SHAPES:
        (module,) = read_modules(vectors, tensor, Design(poe))
        chosen = draws.coefficients[:, :, draws.index(tensor)].flatten(0, 1)
        basis = torch.stack([*module.updates, torch.zeros_like(module.mode), module.mode])
        for direction in (expected[tensor], *module.updates):  # draws of a Gaussian are independent
            along = chosen @ (basis * direction).sum((-2, -1))
            error = (along.mean() - (expected[tensor] * direction).sum()) / (along.std() / math.sqrt(len(along)))
            assert abs(float(error)) < SIGMAS
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 0.3
    assert draws.far_from_merge is None
    assert surround_verdict(draws).level == Level.GOOD
    assert f"gibbs draws in Span coordinates through the merge at temperature {temperature:g}" in draws.about


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 2.0])
def test_full_draws_have_the_merge_as_their_mean(temperature: float, vectors: TaskVectors) -> None:
    poe = product(Gaussian(), temperature=temperature)
    draws = sample_full(vectors, poe, 50, generator=seeded(0), chains=2, warmup=1)
    assert draws.from_merge is not None
    assert draws.from_merge.worst == 0.0
    expected = merges(vectors, poe)
    (module,) = read_modules(vectors, "two.weight", Design(poe))
    made = torch.stack([draws.update(module, member) for member in range(len(draws))])
    for direction in (expected["two.weight"], *module.updates):
        along = (made * direction).sum((-2, -1))
        error = (along.mean() - (expected["two.weight"] * direction).sum()) / (along.std() / math.sqrt(len(along)))
        assert abs(float(error)) < SIGMAS


def test_the_span_of_the_updates_alone_is_elsewhere_and_that_is_said(vectors: TaskVectors) -> None:
    poe = product(StudentT(4.0), temperature=0.01)
    draws = plain(vectors, poe, 100)
    with pytest.raises(ValueError, match=r"around the MAP in Span coordinates, the design's merge is the MAP in Full"):
        MergedEnsemble(vectors, poe, draws)
    assert surround_verdict(draws).level == Level.UNKNOWN
    found = replace(draws, from_merge=distance_from_merge(draws, vectors, poe))
    assert found.from_merge is not None
    assert found.from_merge.beyond == tuple(SHAPES)
    assert found.from_merge.worst > 2 * FAR
    verdict = surround_verdict(found)
    assert verdict.level == Level.CAUTION
    assert "around the MAP of the span at temperature 0.01: their mean is" in verdict.text
    own = Design(poe, coordinates="span")  # a merge that is solved in the span is another matter
    MergedEnsemble(vectors, own, draws)
    assert distance_from_merge(draws, vectors, own).worst < 1.0
    with pytest.raises(ValueError, match="the MAP in Full coordinates, the design's merge is the MAP in Span"):
        MergedEnsemble(vectors, own, around(vectors, poe, 20))


@pytest.mark.parametrize("energy", [Gaussian(), Cauchy(), StudentT(4.0)], ids=repr)
@pytest.mark.parametrize("temperature", [1e-5, 0.02])
def test_statistics_and_weights_give_the_same_distance(energy: Any, temperature: float, vectors: TaskVectors) -> None:
    poe = product(energy, center=average, temperature=temperature)
    draws = around(vectors, poe, 60)
    draws = replace(draws, coefficients=draws.coefficients + 0.2)  # somewhere else
    statistics = collect_statistics(vectors, poe)
    small, large = span_distance(statistics, draws.coefficients), distance_from_merge(draws, vectors, poe)
    assert small is not None
    for name in ("displacement", "spread", "length"):
        assert_close(getattr(small, name), getattr(large, name), 1e-7)
    assert small.worst > 1.0


def test_full_draws_are_measured_by_what_they_are_made_of(vectors: TaskVectors) -> None:
    """Against the draws themselves, where the dimension is small enough for their mean to be known."""
    poe = product(StudentT(4.0), temperature=1e-3)
    generator = seeded(0)
    draws = sample_full(vectors, poe, 150, generator=generator, chains=2, pattern="two", warmup=20)
    (module,) = read_modules(vectors, "two.weight", Design(poe))
    direction = module.updates[0] / module.updates[0].norm()
    made = torch.stack([draws.update(module, member) for member in range(len(draws))])
    along = ((made - module.mode) * direction).sum((-2, -1))
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 0.3
    found = distance_of_module(draws, module, module.mode - 40 * along.std() * direction)
    error = SIGMAS / math.sqrt(2 * len(draws))  # of the standard deviation of so many draws
    assert abs(found.worst / 40 - 1) < error + draws.from_merge.worst / 4


def test_hmc_and_the_modes_of_both_spans_agree_on_where_the_merge_is(vectors: TaskVectors) -> None:
    """Another sampler, and the solver in the span, find the merge that was solved for in the whole space."""
    poe = product(StudentT(4.0), temperature=0.02)
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    span = posterior.span
    mode = span.coefficients(fixed_point(posterior).value)
    away = mode - torch.eye(6, dtype=torch.float64)[-1]
    lengths = torch.einsum("mj,mjk,mk->m", away, statistics.gram, away).clamp(min=0).sqrt()
    assert float((lengths / statistics.gram[:, -1, -1].sqrt()).max()) < 1e-6
    draws = slice_sample(posterior, 100, generator=seeded(0), chains=8, warmup=100)
    named = SpanDraws.of(draws, posterior)
    assert named.sampler == "slice"
    assert named.temperatures == (0.02,)
    assert named.from_merge is not None
    assert named.from_merge.worst < 1.0


def test_rounding_is_taken_off_as_it_is_and_not_as_it_could_be_at_worst(
    generator: torch.Generator, tmp_path: Path
) -> None:
    """Written in bfloat16 with updates of a hundredth of the weights; the draws lie at .75 of the merge, 30 times their
    own spread away. The largest possible rounding error has .3 of the merge's length, and would have hidden that."""
    base = {"m.weight": torch.randn(40, 40, generator=generator, dtype=torch.float64).bfloat16().double()}
    update = 0.012 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
    vectors = TaskVectors(base, {name: {"m.weight": base["m.weight"] + update} for name in "ab"}, dtype=torch.float64)

    def design(eta: float) -> Design:
        poe = ProductOfExperts.of(
            ["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(eta))
        )
        return Design(replace(poe, temperature=1e-7))

    full, shorter = design(0.0), design(1 / 3)  # Z = U, and 2 U / (2 + 2 / 3)
    merge_checkpoint(vectors, full, tmp_path / "merged", out_dtype=torch.bfloat16)
    draws = sample_full(vectors, shorter, 20, generator=seeded(0), sampler="laplace")
    found = distance_from_merge(draws, vectors, shorter, tmp_path / "merged")
    assert found.share == pytest.approx(0.25, abs=0.02)
    assert found.beyond == ("m.weight",)
    around = distance_from_merge(
        sample_full(vectors, design(1e-9), 20, generator=seeded(0), sampler="laplace"),
        vectors,
        design(1e-9),
        tmp_path / "merged",
    )
    assert around.share < 0.05


@pytest.mark.parametrize(("energy", "surrounds"), [(Cauchy(), False), (Cauchy("multivariate"), True)])
def test_full_draws_surround_the_merge_if_the_exponent_grows_with_the_dimension(
    energy: Cauchy, surrounds: bool, generator: torch.Generator
) -> None:
    """With k = 1 typical residuals exceed the mode's, weights fall, and the anchor pulls the mean away."""
    experts = {}
    for name in "abcd":
        low = torch.randn(96, 12, generator=generator) @ torch.randn(12, 128, generator=generator)
        experts[name] = {"m.weight": low + 0.1 * torch.randn(96, 128, generator=generator)}
    vectors = TaskVectors({"m.weight": torch.zeros(96, 128)}, experts)
    poe = ProductOfExperts.of(vectors.names, InputGram(), energy, Balanced(1.0), temperature=0.01)
    draws = sample_full(vectors, poe, 20, generator=generator, chains=4, warmup=20)
    assert draws.from_merge is not None
    assert (draws.from_merge.worst < 1) == surrounds
    assert (draws.from_merge.worst > 3) != surrounds
