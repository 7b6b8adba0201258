"""The distance of draws from their merge: honest draws are near, displaced ones are found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inference import (
    Design,
    MergedEnsemble,
    MergeDistance,
    SpanDraws,
    collect_statistics,
    distance_from_merge,
    load_draws,
    merge_checkpoint,
    noise_control,
    sample_full,
    save_draws,
)
from inference.merge_distance import FAR, span_distance
from inference.models.model_draws import PosteriorDraws
from inference.models.modules import read_modules
from poe_models import Cauchy, Gaussian, InputGram, ProductOfExperts, Relative, StudentT, TaskVectors, span_statistics
from poe_models.span import span_coordinates
from tests.helpers import assert_close, merged
from tests.seeds import seeded
from tests.surrounding.toys import SHAPES, around, product

SIGMAS = 5.2
"""Two-sided level of about 2e-7."""


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
