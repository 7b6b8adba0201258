"""Draws surround the merge: at a size where the span of the updates and the whole space are far apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diagnostics.chains import surround_verdict
from diagnostics.verdicts import Level
from inference import (
    Design,
    MergedEnsemble,
    MergeDistance,
    SpanDraws,
    collect_statistics,
    distance_from_merge,
    fixed_point,
    gibbs,
    load_draws,
    merge_checkpoint,
    noise_control,
    sample_full,
    save_draws,
    slice_sample,
)
from inference.merge_distance import FAR, span_distance
from inference.models.model_draws import PosteriorDraws
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
    Relative,
    RelativePrecision,
    StudentT,
    TaskVectors,
    average,
    span_statistics,
)
from poe_models.span import span_coordinates
from tests.helpers import assert_close, merged
from tests.seeds import seeded

NAMES = ("a", "b", "c", "d")
LENGTHS = (0.3, 1.0, 1.0, 2.0)
SHAPES = {"one.weight": (48, 64), "two.weight": (24, 40)}
SIGMAS = 5.2
"""Two-sided level of about 2e-7."""


def low_rank(generator: torch.Generator, shape: tuple[int, int], length: float, rank: int = 5) -> Tensor:
    """An update of low rank with a little noise and rows of unequal size."""
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
    update = rows * (left @ right + 0.3 * noise)
    return length * update / update.norm()


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    experts = {
        name: {key: value + low_rank(generator, SHAPES[key], length) for key, value in base.items()}
        for name, length in zip(NAMES, LENGTHS, strict=True)
    }
    return TaskVectors(base, experts, dtype=torch.float64)


def product(energy: Any, residual_map: Any = None, center: Any = None, temperature: float = 1.0) -> ProductOfExperts:
    anchor = Anchor(center, RelativePrecision(0.05))
    maps = InputGram() if residual_map is None else residual_map
    return ProductOfExperts.of(NAMES, maps, energy, Relative(1.0), anchor=anchor, temperature=temperature)


def around(vectors: TaskVectors, poe: ProductOfExperts, count: int = 500, seed: int = 0) -> SpanDraws:
    """Gibbs draws through the merge."""
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    return SpanDraws.of(gibbs(posterior, count, generator=generator), posterior)


def plain(vectors: TaskVectors, poe: ProductOfExperts, count: int = 500) -> SpanDraws:
    """What used to be drawn beside a merge: the posterior on the span of the updates alone."""
    statistics = collect_statistics(vectors, Design(poe, coordinates="span"))
    posterior = poe.bind(statistics)
    draws = gibbs(posterior, count, generator=seeded(0))
    return SpanDraws.of(draws, posterior)


def merges(vectors: TaskVectors, poe: ProductOfExperts) -> dict[str, Tensor]:
    return {module.name: fixed_point(poe.bind(module)).value[0] for module in vectors}


# --- the span through a merge ---


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


# --- where draws are ---


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


# --- the measure ---


def statistics_of(dimension: int, size: int, generator: torch.Generator) -> Any:
    """Statistics of one module whose merge is the last of `size` vectors."""
    vectors = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
    updates = vectors[: size - 2].reshape(1, size - 2, 1, dimension)
    poe = ProductOfExperts.of([str(i) for i in range(size - 2)], InputGram(), Gaussian(), Relative(1.0))
    return span_statistics(poe, updates, through=vectors[-1].reshape(1, 1, dimension), ranks=False)


@pytest.mark.parametrize("size", [4, 12])
def test_honest_draws_are_never_far(size: int, generator: torch.Generator) -> None:
    """Of few independent draws: the warning would come by chance, if the mean's own error were not taken off."""
    statistics = statistics_of(200, size, generator)
    root = torch.linalg.cholesky(torch.cov(torch.randn(size, 40, generator=generator, dtype=torch.float64)))
    merge = torch.eye(size, dtype=torch.float64)[-1]
    far = 0
    for _ in range(500):
        noise = torch.randn(1, 10, 1, size, generator=generator, dtype=torch.float64)
        found = span_distance(statistics, merge + noise @ root.mT)
        assert found is not None
        far += found.worst > FAR
    assert far == 0


@pytest.mark.parametrize("dimension", [8, 2000])
@pytest.mark.parametrize("away", [0.0, 2.0, 8.0])
def test_a_displacement_is_found_in_standard_deviations(
    away: float, dimension: int, generator: torch.Generator
) -> None:
    size, count = 6, 4000
    statistics = statistics_of(dimension, size, generator)
    transform = span_coordinates(statistics).transform[0]  # a zero centre is no direction
    direction = torch.randn(size, generator=generator, dtype=torch.float64) * (transform != 0).any(0)
    direction = direction / direction.norm()
    noise = torch.randn(4, count // 4, 1, size, generator=generator, dtype=torch.float64)
    coefficients = torch.eye(size, dtype=torch.float64)[-1] + 0.2 * (noise + away * direction) @ transform.mT
    found = span_distance(statistics, coefficients)
    assert found is not None
    # d = away + N(0, (1 + away^2 / 2) / count), and for away = 0 the length of the mean's error
    error = SIGMAS * math.sqrt((1 + away**2 / 2) / count) + (0.0 if away else math.sqrt(size / count))
    floor = float(found.length) * 1e-3 / 0.2
    assert abs(found.worst - away) < error + floor**2 / max(away, 1.0)


def test_few_draws_and_none_beyond() -> None:
    length = torch.ones(2, dtype=torch.float64)
    unknown = MergeDistance(("m", "n"), length, torch.full_like(length, torch.nan), length)
    assert math.isnan(unknown.worst)
    assert unknown.beyond == ()
    assert "too few" in str(unknown)
    halved = replace(unknown, displacement=torch.tensor([0.0, 1.0], dtype=torch.float64))  # one within rounding
    assert "too few" in str(halved)
    stuck = MergeDistance(("m", "n"), length, torch.zeros_like(length), length)
    assert (stuck.worst, stuck.beyond) == (math.inf, ("m", "n"))
    assert MergeDistance.joined([stuck.select([1]), unknown.select([0])]).modules == ("n", "m")


def test_modules_that_are_not_known_are_named_and_hide_nothing() -> None:
    values = torch.tensor([[4.0, math.nan, 1.0, 0.0], [1.0, 1.0, math.nan, math.nan], [2.0] * 4], dtype=torch.float64)
    mixed = MergeDistance(("far", "broken", "few", "there"), *values)
    assert (mixed.worst, mixed.where, mixed.beyond) == (4.0, "far", ("far",))
    assert mixed.unknown == ("broken", "few")  # a displacement that is not a number is no displacement of 0
    assert "their mean is 4 standard deviations" in str(mixed)
    assert "too few to tell in broken, few" in str(mixed)
    lost = mixed.select([1, 3])
    assert (lost.worst, lost.unknown, lost.beyond) == (0.0, ("broken",), ())


# --- whole models ---


@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_noise_around_the_map_is_measured_against_the_merge(coordinates: Any, vectors: TaskVectors) -> None:
    """The MAP in Full coordinates, which noise is around, is not the merge of a design in Span coordinates."""
    poe = product(StudentT(4.0), temperature=1e-4)
    draws = sample_full(vectors, poe, 20, generator=seeded(0), chains=2, warmup=10)
    noise = noise_control(draws, vectors, Design(poe, coordinates=coordinates), generator=seeded(1))
    assert noise.from_merge is not None
    modules = {name: read_modules(vectors, name, Design(poe))[0] for name in noise.modules}
    modes = {name: module.mode for name, module in modules.items()}
    solved = {
        name: merged(poe.bind(read_modules(vectors, name, Design(poe))[0].updates, coordinates))[0] for name in modes
    }
    away = torch.stack([(modes[name] - solved[name]).norm() for name in modes])
    if coordinates == "full":
        assert noise.from_merge.worst == 0.0
    else:
        assert_close(noise.from_merge.displacement, away, 1e-2)
        assert noise.from_merge.beyond == noise.modules
    sizes = torch.tensor([float(mode.numel()) for mode in modes.values()], dtype=torch.float64)
    expected = noise.weights.square().mean((0, 1)).squeeze(-1).sqrt() / sizes.sqrt()  # of white noise, in any direction
    ratio = noise.from_merge.spread / expected
    assert bool(((ratio > 0.4) & (ratio < 2.0)).all())  # of 32 draws


def test_what_is_left_is_the_merge(vectors: TaskVectors, tmp_path: Path) -> None:
    poe = product(StudentT(4.0), temperature=0.05)
    merge_checkpoint(vectors, Design(poe, 0.8), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for kind in (around, lambda v, p: sample_full(v, p, 2, generator=seeded(0), warmup=3)):
        draws: PosteriorDraws = kind(vectors, poe).restrict("two").thinned(2)
        assert draws.from_merge is not None
        assert draws.from_merge.modules == ("two.weight",)
        for member in MergedEnsemble(vectors, Design(poe, 0.8), draws).members():
            assert_close(member["one.weight"], merged["one.weight"], 1e-12)
            assert float((member["two.weight"] - merged["two.weight"]).abs().max()) > 1e-3


def test_rounding_of_the_merged_weights_is_no_displacement(vectors: TaskVectors, tmp_path: Path) -> None:
    poe = product(StudentT(4.0), temperature=1e-3)
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        merge_checkpoint(vectors, Design(poe, 0.8), folder, out_dtype=dtype)
        generator = seeded(0)
        for draws in (around(vectors, poe, 50), sample_full(vectors, poe, 8, generator=generator, warmup=10)):
            assert distance_from_merge(draws, vectors, Design(poe, 0.8), folder).beyond == ()
            other = distance_from_merge(draws, vectors, Design(poe, 3.0), folder)  # as if lambda had been 3
            assert dtype == torch.bfloat16 or other.beyond == tuple(SHAPES)


def test_an_ensemble_far_from_its_merge_warns(vectors: TaskVectors) -> None:
    poe = product(Gaussian(), temperature=1e-3)
    draws = around(vectors, poe, 50)
    moved = draws.coefficients + 0.5 * torch.eye(6, dtype=torch.float64)[-1]
    statistics = collect_statistics(vectors, poe)
    far = replace(draws, coefficients=moved, from_merge=span_distance(statistics, moved))
    with pytest.warns(
        UserWarning, match="2 of 2 modules are beyond 3, and the displacement has 50% of the merge's len"
    ):
        MergedEnsemble(vectors, poe, far.thinned(3))


def test_draws_keep_what_they_are_in_files(vectors: TaskVectors, tmp_path: Path) -> None:
    poe = product(StudentT(4.0), temperature=0.05)
    for name, draws in (
        ("span", around(vectors, poe, 20)),
        ("full", sample_full(vectors, poe, 5, generator=seeded(0), chains=2, warmup=2)),
    ):
        again = load_draws(save_draws(draws, tmp_path / name))
        assert isinstance(again, PosteriorDraws)
        assert again.about == draws.about
        assert "gibbs draws in" in again.about
        assert str(again.from_merge) == str(draws.from_merge)
        assert again.digest() == draws.digest()
    unsaid = replace(around(vectors, poe, 20), from_merge=None, sampler=None, temperature=None)
    again = load_draws(save_draws(unsaid, tmp_path / "unsaid"))
    assert isinstance(again, SpanDraws)
    assert (again.from_merge, again.sampler, again.temperatures) == (None, None, ())


def test_draws_through_another_merge_are_refused(vectors: TaskVectors) -> None:
    poe = product(StudentT(4.0))
    draws = around(vectors, poe, 20)
    with pytest.raises(ValueError, match="'one.weight' go through the merge of another design"):
        MergedEnsemble(vectors, product(Cauchy()), draws)
    wrong = replace(draws, squared_norms=draws.squared_norms * torch.tensor([1.0, 1, 1, 1, 1, 2]))
    with pytest.raises(ValueError, match="go through a merge of norm .* Give the settings of the solver"):
        next(MergedEnsemble(vectors, poe, wrong).members())


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
