"""The posterior on the latents of groups against sums over their modules: three modules of three shapes, two groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inference.functional.tied import Groups, tied_posterior
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Expert,
    FactorExpert,
    Gaussian,
    InputGram,
    ProductOfExperts,
    RelativePrecision,
    StudentT,
    TaskVectors,
)
from poe_models.operators import Gram
from poe_models.posterior import Posterior
from tests.helpers import assert_close
from tests.seeds import seeded

NAMES = ("a", "b", "c")
SHAPES = {"x.one": (2, 3), "y.two": (4, 3), "x.three": (3, 5)}
GROUPS = Groups(("x", "y"), (0, 1, 0))
TEMPERATURE = 0.6


def untied_of(through: bool = True, energy: Any = None, anchor: Anchor | None = None) -> Posterior:
    """Expert `b` did not change the first module."""
    g = seeded(11)

    def draw(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    base = {f"{name}.weight": draw(shape) for name, shape in SHAPES.items()}
    tuned = {name: {key: value + draw(tuple(value.shape)) for key, value in base.items()} for name in NAMES}
    tuned["b"]["x.one.weight"] = base["x.one.weight"]
    merges = [draw(shape) for shape in SHAPES.values()]
    experts = [
        Expert(name, InputGram(), energy or StudentT(3.0, exponent="multivariate"), Absolute(0.4 + i), 1.0 + i)
        for i, name in enumerate(NAMES)
    ]
    anchor = anchor or Anchor(precision=RelativePrecision(0.2))
    poe = ProductOfExperts(tuple(experts), anchor=anchor, temperature=TEMPERATURE)
    modules = list(TaskVectors(base, tuned, dtype=torch.float64))
    return poe.bind(modules, coordinates="span", through=merges if through else None)


def square(c: Tensor) -> Tensor:
    return c.square().sum(-1)


@pytest.mark.parametrize("through", [True, False])
def test_energies_are_sums_over_the_modules_of_a_group(through: bool) -> None:
    untied = untied_of(through)
    groups = Groups(("x", "y"), tuple(0 if name.startswith("x") else 1 for name in untied.modules))
    tied = tied_posterior(untied, groups, [FactorExpert("size", square, "span")])
    assert tied.span is not None
    assert untied.span is not None
    c = torch.randn(6, 2, len(tied.span.statistics.basis), generator=seeded(1), dtype=torch.float64)
    x = tied.span.latents(c)
    seen = tied.coefficients(x)  # a centre of zero has no coefficient
    each = untied.energy(untied.span.latents(c[:, list(groups.places)]))  # (6, 3)
    members = groups.members()
    alone = torch.stack([each[:, places].sum(-1) for places in members], -1)
    assert_close(tied.energy(x), alone + square(seen), 1e-10)
    assert (tied.modules, tied.temperature, tied.num_modules) == (("x", "y"), TEMPERATURE, 2)
    assert [each.name for each in tied.factors] == ["size"]


def test_the_anchors_of_a_group_are_one_gaussian() -> None:
    untied = untied_of()
    tied = tied_posterior(untied, GROUPS, [])
    assert untied.span is not None
    assert tied.span is not None
    eta, gram = untied.anchor_precision, untied.span.statistics.gram
    assert_close(tied.anchor_precision, torch.stack([eta[0] + eta[2], eta[1]]), 1e-12)
    weighted = (eta[0] * gram[0] + eta[2] * gram[2]) / (eta[0] + eta[2])
    assert_close(tied.span.statistics.gram, torch.stack([weighted, gram[1]]), 1e-12)
    assert float(eta.max() / eta.min()) > 1.01
    # Latents are orthonormal in the group's Gram matrix; the rest is of each module by itself, nan where there is none.
    t = tied.span.transform
    assert_close(t.mT @ tied.span.statistics.gram @ t, torch.diag_embed(tied.span.known.double()), 1e-9)
    for name in ("forms", "mean_curvature", "dimension"):
        own, of_groups = (getattr(p.span.statistics, name) for p in (untied, tied))  # type: ignore[union-attr]
        assert torch.equal(of_groups[0], torch.cat([own[0], own[2]]))
        assert torch.equal(of_groups[1, :3], own[1])
        assert bool(of_groups[1, 3:].isnan().all())


def test_every_module_of_a_group_has_experts_of_its_own() -> None:
    """The second slot is empty in the group of one module: its experts say nothing there."""
    untied = untied_of()
    tied = tied_posterior(untied, GROUPS, [])
    assert [expert.name for expert in tied.experts] == ["a", "b", "c", "a/1", "b/1", "c/1"]
    assert [expert.update_name for expert in tied.experts] == ["a", "b", "c"] * 2
    active = torch.stack([expert.active for expert in tied.experts], -1)
    assert active.tolist() == [[True, False, True, True, True, True], [True, True, True, False, False, False]]
    assert tied.span is not None
    for i, expert in enumerate(tied.experts):
        assert isinstance(expert.operator, Gram)
        assert expert.operator.shape == (5, 1) == tied.event_shape
        update = tied.span.latents(torch.eye(5, dtype=torch.float64)[i % 3].expand(2, -1))
        assert_close(expert.update, update, 1e-12)
        assert_close(expert.norm_squared, tied.span.statistics.gram[:, i % 3, i % 3], 1e-9)
        modules = [0, 1] if i < 3 else [2, 1]
        assert expert.scale_squared.tolist() == [untied.experts[i % 3].scale_squared[m] for m in modules]
    center = tied.span.latents(torch.eye(5, dtype=torch.float64)[3].expand(2, -1))
    assert_close(tied.center if tied.center is not None else torch.zeros_like(center), center, 1e-12)


@pytest.mark.parametrize("through", [True, False])
def test_the_merge_of_a_group_is_that_of_its_first_module(through: bool) -> None:
    untied = untied_of(through, Gaussian(), Anchor(precision=AbsolutePrecision(0.5)))
    tied = tied_posterior(untied, Groups(("x", "y"), (1, 0, 1)), [])
    assert untied.span is not None
    assert tied.span is not None
    own = untied.span.statistics.through
    assert tied.span.statistics.through == (None if own is None else (own[1], own[0]))
    assert tied.span.statistics.basis == (*NAMES, "center", *(("merge",) if through else ()))


def test_groups_by_hand() -> None:
    names = ("layers.0.q", "layers.1.q", "layers.0.k", "head", "tail")
    assert Groups.of(names, None).members() == [[0], [1], [2], [3], [4]]
    by_layer = Groups.of(names, r"layers\.(\d)\.")
    assert (by_layer.names, by_layer.places) == (("0", "1", "head", "tail"), (0, 1, 0, 2, 3))
    assert by_layer.members() == [[0, 2], [1], [3], [4]]
    assert Groups.of(names, r"layers\.(\d)\.(q|k)").names == ("0/q", "1/q", "0/k", "head", "tail")
    with pytest.raises(ValueError, match=r"none of 5 modules \(layers.0.q, layers.1.q, layers.0.k, ...\)"):
        Groups.of(names, "conv")
    with pytest.raises(ValueError, match=r"none of 3 modules \(layers.0.q, layers.1.q, layers.0.k\)"):
        Groups.of(names[:3], "conv")
