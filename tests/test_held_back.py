"""One expert that holds the merge, and centres of one length: verdicts that looked alike."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.verdicts import Level
from inference import Design, fixed_point, merge_checkpoint, sample_full
from inference.retention import SHORTER, ExpertRetention, concerns, totals
from poe_merge.beside import beside_verdict
from poe_merge.record import merge_of, read_record
from poe_models import (
    Anchor,
    Balanced,
    Cauchy,
    Energy,
    Gaussian,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    Scale,
    TaskVectors,
)
from poe_models.weights.loading import open_checkpoint
from tests.seeds import seeded

NAMES = ["a", "b", "c", "d"]
SIZES = (64, 12), (12, 96), (64, 96)


def said_of(lengths: list[float], scale: Scale, energy: Energy, scaling: float = 1.0) -> list[str]:
    """What is said of the merge of four updates of about rank 12."""
    g = seeded(0)
    updates = [
        torch.randn(48, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 64, generator=g, dtype=torch.float64)
        + 0.1 * torch.randn(48, 64, generator=g, dtype=torch.float64)
        for _ in lengths
    ]
    stacked = torch.stack([length * each for length, each in zip(lengths, updates, strict=True)])
    solution = fixed_point(ProductOfExperts.of(NAMES, InputGram(), energy, scale).bind(stacked))
    return concerns(totals([solution.info.retention.scaled(scaling).record(0)]))


@pytest.mark.parametrize("energy", [Gaussian(), Cauchy()], ids=repr)
@pytest.mark.parametrize("scaling", [1.0, 0.9])
def test_an_expert_a_tenth_as_long_that_holds_the_merge_is_named(energy: Energy, scaling: float) -> None:
    lengths = [1.0, 1.0, 1.0, 0.1]
    (said,) = said_of(lengths, Relative(1.0), energy, scaling)
    assert said.startswith("the expert 'd' holds the merge: ")
    assert all(f"{name!r} " in said for name in "abc")
    assert said.endswith(SHORTER)
    assert not any("holds the merge" in each for each in said_of(lengths, Balanced(1.0), energy, scaling))


@pytest.mark.parametrize("scale", [Relative(1.0), Balanced(1.0)], ids=repr)
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_equal_experts_hold_nothing(scale: Scale, scaling: float) -> None:
    assert said_of([1.0] * 4, scale, Cauchy(), scaling) == []
    assert said_of([1.0, 1.0, 1.0, 0.3], Balanced(1.0), Cauchy(), scaling) == []


@pytest.mark.parametrize(
    ("length", "eta", "energy", "residual_map"),
    [
        (0.1, 0.05, Gaussian(), InputGram()),
        (0.05, 0.01, Gaussian(), InputGram()),
        (0.1, 0.05, Gaussian(), OutputGram()),
        (0.05, 0.1, Cauchy(), OutputGram()),
    ],
)
def test_a_short_expert_that_halves_the_others_is_named(
    length: float, eta: float, energy: Energy, residual_map: ResidualMap
) -> None:
    """The updates of the report of this fault: others kept two fifths, and nothing was said."""
    g = seeded(0)
    left, right, rest = (torch.randn(4, *size, generator=g, dtype=torch.float64) for size in SIZES)
    updates = left @ right + 0.1 * rest
    updates[3] *= length
    anchor = Anchor(precision=RelativePrecision(eta))
    relative, balanced = (
        fixed_point(ProductOfExperts.of(NAMES, residual_map, energy, scale, anchor=anchor).bind(updates))
        for scale in (Relative(1.0), Balanced(1.0))
    )
    kept = {each.name: each.kept for each in relative.experts}
    assert all(kept[name] < 0.5 * kept["d"] for name in "abc")
    (said,) = relative.concerns
    assert "the expert 'd' holds the merge: " in said or "as long as 'd' is" in said
    assert said.endswith(SHORTER)
    assert said in repr(relative)
    assert not any("holds the merge" in text for text in balanced.concerns)


def of(kept: float, left: float, name: str = "a", length: float = 1.0) -> ExpertRetention:
    return ExpertRetention(name, kept, left, length)


def test_where_being_held_back_begins() -> None:
    """At a third of the share, two fifths of the residual and twenty times what is left; sooner by a shorter one."""
    equal = of(0.9, 0.02, "d", 1.5)
    for other, told in ((of(0.299, 0.4), True), (of(0.301, 0.4), False), (of(0.299, 0.399), False)):
        assert bool(concerns([equal, other])) is told
    assert not concerns([of(0.9, 0.03, "d"), of(0.299, 0.59)])
    assert concerns([of(0.9, 0.03, "d"), of(0.299, 0.61)])
    holder = of(0.9, 0.02, "d", 2.0)
    for other, told in (
        (of(0.449, 0.2), True),
        (of(0.451, 0.2), False),
        (of(0.449, 0.199), False),
        (of(0.449, 0.2, length=2.1), False),
    ):
        assert bool(concerns([holder, other])) is told
    assert not concerns([of(0.9, 0.03, "d", 2.0), of(0.299, 0.29)])
    assert concerns([of(0.9, 0.03, "d", 2.0), of(0.299, 0.31)])
    assert not concerns([of(0.9, math.nan, "d", 2.0), of(0.299, math.nan)])  # methods have no residuals
    # Passed by, it has a sentence of its own.
    assert len(concerns([holder, of(0.29, 0.95), of(0.5, 0.3, "b")])) == 1


POE = ProductOfExperts.of(
    NAMES[:3], InputGram(), Cauchy(), Relative(0.5), anchor=Anchor(precision=RelativePrecision(0.1)), temperature=1e-3
)


@pytest.mark.parametrize("kind", ["tensor", "checkpoint"])
@pytest.mark.parametrize("moved", [False, True])
def test_two_centres_of_one_length_are_told_apart(
    kind: str, moved: bool, generator: torch.Generator, tmp_path: Path
) -> None:
    """Both read "tensor (12, 10)" or "checkpoint" to draws; the merges around them are not as long."""
    experts = {name: {"m.weight": torch.randn(12, 10, generator=generator, dtype=torch.float64)} for name in NAMES[:3]}
    vectors = TaskVectors({"m.weight": torch.zeros(12, 10, dtype=torch.float64)}, experts, dtype=torch.float64)
    center = 3.0 * sum(each["m.weight"] for each in experts.values())

    def around(center: Tensor) -> Design:
        if kind == "checkpoint":
            return Design(POE, center=open_checkpoint({"m.weight": center}))
        return Design(replace(POE, anchor=replace(POE.anchor, center=center)))

    draws = sample_full(vectors, around(-center if moved else center), 50, generator=seeded(0), warmup=20)
    merge_checkpoint(vectors, around(center), tmp_path / "merged")
    record = read_record(tmp_path / "merged")
    designs = partial(merge_of, record)
    found = beside_verdict(draws, tmp_path / "merged", record, lambda: vectors, designs, as_written=True)
    assert ("are around another merge" in found.text) is moved
    assert found.level is (Level.CAUTION if moved else Level.GOOD) or not moved
