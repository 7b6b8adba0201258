"""Draws beside a merge that is not theirs: what a report says of their centre."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.verdicts import Level, Verdict
from inference import Design, SpanDraws, fixed_point, gibbs, merge_checkpoint, sample_full
from inference.merge_distance import span_distance
from inference.models.model_draws import PosteriorDraws
from poe_merge.beside import beside_verdict
from poe_merge.record import merge_of, read_record
from poe_models import (
    Absolute,
    Anchor,
    Cauchy,
    Directional,
    Gaussian,
    InputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    TaskVectors,
    span_statistics,
)
from poe_models.weights.loading import open_checkpoint
from tests.seeds import seeded

NAMES = ("a", "b", "c")
FAR_AWAY = torch.full((12, 10), 30.0, dtype=torch.float64)
POE = ProductOfExperts.of(
    NAMES, InputGram(), Cauchy(), Relative(0.5), anchor=Anchor(precision=RelativePrecision(0.1)), temperature=1e-3
)


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    base = {"m.weight": torch.zeros(12, 10, dtype=torch.float64)}
    experts = {name: {"m.weight": torch.randn(12, 10, generator=generator, dtype=torch.float64)} for name in NAMES}
    return TaskVectors(base, experts, dtype=torch.float64)


def judged(draws: PosteriorDraws, design: Design, vectors: TaskVectors, out: Path) -> Verdict:
    merge_checkpoint(vectors, design, out)
    record = read_record(out)
    return beside_verdict(draws, out, record, lambda: vectors, partial(merge_of, record), as_written=True)


def span_draws(poe: ProductOfExperts, vectors: TaskVectors, through: bool) -> SpanDraws:
    (module,) = vectors
    merge = fixed_point(poe.bind(module.updates)).value if through else None
    statistics = span_statistics(poe, module.updates, [module.name], through=merge)
    posterior = poe.bind(statistics)
    draws = SpanDraws.of(gibbs(posterior, 100, generator=seeded(0), warmup=50), posterior)
    if through:
        return draws
    merged = posterior.coefficients(fixed_point(posterior).value)  # the merge in the span of the updates
    return replace(draws, from_merge=span_distance(statistics, draws.coefficients, merged))


@pytest.mark.parametrize(("residual_map", "level"), [(InputGram(), Level.GOOD), (Directional(), Level.CAUTION)])
def test_draws_through_the_merge_of_another_residual_map_are_found_out(
    residual_map: ResidualMap, level: Level, vectors: TaskVectors, tmp_path: Path
) -> None:
    experts = tuple(replace(each, residual_map=residual_map) for each in POE.experts)
    draws = span_draws(replace(POE, experts=experts), vectors, through=True)
    assert judged(draws, Design(POE), vectors, tmp_path / "merged").level is level


def test_draws_through_the_merge_around_another_centre_are_found_out(vectors: TaskVectors, tmp_path: Path) -> None:
    elsewhere = replace(POE, anchor=replace(POE.anchor, center=FAR_AWAY))
    draws = span_draws(elsewhere, vectors, through=True)
    assert judged(draws, Design(POE), vectors, tmp_path / "merged").level is Level.CAUTION


@pytest.mark.parametrize(("moved", "level"), [(False, Level.GOOD), (True, Level.CAUTION)])
def test_full_draws_around_another_centre_are_found_out(
    moved: bool, level: Level, vectors: TaskVectors, tmp_path: Path
) -> None:
    design = Design(replace(POE, anchor=replace(POE.anchor, center=FAR_AWAY if moved else None)))
    draws = sample_full(vectors, design, 50, generator=seeded(0), warmup=20)
    assert judged(draws, Design(POE), vectors, tmp_path / "merged").level is level


@pytest.mark.parametrize(("moved", "level"), [(False, Level.GOOD), (True, Level.CAUTION)])
@pytest.mark.parametrize("kind", ["tensor", "checkpoint"])
def test_two_centres_that_read_alike_are_told_apart(
    moved: bool, level: Level, kind: str, vectors: TaskVectors, tmp_path: Path
) -> None:
    """Both are "tensor (12, 10)" or "checkpoint" to draws; their lengths differ."""

    def around(center: Tensor) -> Design:
        if kind == "checkpoint":
            return Design(POE, center=open_checkpoint({"m.weight": center}))
        return Design(replace(POE, anchor=replace(POE.anchor, center=center)))

    draws = sample_full(vectors, around(FAR_AWAY / (2 if moved else 1)), 50, generator=seeded(0), warmup=20)
    found = judged(draws, around(FAR_AWAY), vectors, tmp_path / "merged")
    assert found.level is level
    assert ("drawn under other experts, scales or anchor than this merge" in found.text) is moved


@pytest.mark.parametrize("kind", ["full", "span"])
def test_draws_of_other_experts_of_the_same_names_are_found_out(
    kind: str, vectors: TaskVectors, generator: torch.Generator, tmp_path: Path
) -> None:
    others = {name: {"m.weight": torch.randn(12, 10, generator=generator, dtype=torch.float64)} for name in NAMES}
    other = TaskVectors({"m.weight": torch.zeros(12, 10, dtype=torch.float64)}, others, dtype=torch.float64)
    draws: PosteriorDraws = span_draws(POE, other, through=True)
    if kind == "full":
        draws = sample_full(other, POE, 50, generator=seeded(0), warmup=20)
    assert judged(draws, Design(POE), other, tmp_path / "own").level is Level.GOOD
    found = judged(draws, Design(POE), vectors, tmp_path / "merged")
    assert found.level is Level.CAUTION
    assert "or from other updates, and are around another merge" in found.text


@pytest.mark.parametrize(("energy", "level"), [(Cauchy(), Level.GOOD), (Gaussian(), Level.CAUTION)])
def test_span_draws_of_another_design_are_measured_against_a_merge_in_span_coordinates(
    energy: Cauchy | Gaussian, level: Level, vectors: TaskVectors, tmp_path: Path
) -> None:
    """They do not say of which design they are; the Gaussian's MAP is many of their standard deviations away."""
    scale = Relative(0.5) if level is Level.GOOD else Absolute(100.0)
    experts = tuple(replace(each, energy=energy, scale=scale) for each in POE.experts)
    draws = span_draws(replace(POE, experts=experts), vectors, through=False)
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 1.0  # around their own
    found = judged(draws, Design(POE, coordinates="span"), vectors, tmp_path / "merged")
    assert found.level is level
    assert "standard deviations of the draws from the merge" in found.text
