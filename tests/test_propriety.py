"""Which posteriors without an anchor have a finite integral: DESIGN's fact 9 on cases worked by hand."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from inference.propriety import MOST_EXPERTS, _null_dimension, require_proper
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Diagonal,
    Directional,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Gram,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RankOne,
    ResidualMap,
    ScaledIdentity,
    StudentT,
    Welsch,
)
from poe_models.posterior import Posterior
from tests.helpers import name_of


def bare(
    design: ResidualMap | tuple[ResidualMap, ...],
    energy: Energy,
    updates: Tensor,
    temperature: float = 1.0,
    importance: float | list[float] = 1.0,
    eta: float = 0.0,
) -> Posterior:
    names = [str(i) for i in range(updates.shape[1])]
    anchor = Anchor(precision=AbsolutePrecision(eta))
    poe = ProductOfExperts.of(names, design, energy, Absolute(1.0), importance, anchor, temperature)
    return poe.bind(updates)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("energy", "kappa"),
    [(Cauchy(), 1.0), (Cauchy(2.5), 2.5), (StudentT(4.0), 2.5), (StudentT(3.0, 1.5), 1.5)],
    ids=name_of,
)
def test_power_laws_hold_a_space_of_less_than_twice_their_powers(
    energy: Energy, kappa: float, generator: torch.Generator
) -> None:
    """Two experts of importance 1 and 2 on three entries: ``6 kappa / T > 3``, and not where they are equal."""
    updates = normal(generator, 1, 2, 1, 3)
    edge = 2 * kappa
    require_proper(bare(Identity(), energy, updates, 0.999 * edge, [1.0, 2.0]))
    for temperature in (edge, 1.001 * edge):
        with pytest.raises(ValueError, match="3 of its directions"):
            require_proper(bare(Identity(), energy, updates, temperature, [1.0, 2.0]))
        require_proper(bare(Identity(), energy, updates, temperature, [1.0, 2.0], eta=1e-9))


@pytest.mark.parametrize("energy", [Gaussian(), Huber(1.0), GeneralizedGaussian(1.0)], ids=name_of)
def test_energies_that_grow_hold_what_they_see_at_any_temperature(energy: Energy, generator: torch.Generator) -> None:
    updates = normal(generator, 1, 2, 3, 4)
    require_proper(bare(Identity(), energy, updates, 1e6))
    with pytest.raises(ValueError, match="10 of its directions are seen only"):
        require_proper(bare(Directional(), energy, updates))
    require_proper(bare(OutputGram(), energy, updates))  # two updates of rank 3 see all three rows
    require_proper(bare(InputGram(), energy, updates))
    with pytest.raises(ValueError, match="3 of its directions"):  # one alone leaves one of four columns
        require_proper(bare(InputGram(), energy, updates[:, :1]))
    with pytest.raises(ValueError, match="2 of its directions"):
        require_proper(bare((OutputGram(), InputGram()), energy, _low_rank(generator)))


def _low_rank(generator: torch.Generator) -> Tensor:
    """One update that leaves one of three rows and two of four columns unseen."""
    return normal(generator, 1, 1, 3, 2) @ normal(generator, 1, 1, 2, 4)


@pytest.mark.parametrize("energy", [Welsch(), Custom(torch.log1p)], ids=["Welsch", "Custom"])
def test_bounded_and_unknown_tails_hold_nothing(energy: Energy, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="'0' is bounded, or its tail is not known"):
        require_proper(bare(Identity(), energy, normal(generator, 1, 2, 1, 1)))


def test_heavy_tails_are_needed_only_where_nothing_else_holds(generator: torch.Generator) -> None:
    """A Gaussian on one direction of four: three are left, two Cauchys of all entries hold them if 4 / T > 3."""
    updates = normal(generator, 1, 2, 1, 4)
    gaussian = bare(Directional(), Gaussian(), updates[:, :1]).experts
    cauchy = bare(Identity(), Cauchy(), updates)
    both = replace(cauchy, experts=(*gaussian, *cauchy.experts))
    require_proper(replace(both, temperature=1.3))
    with pytest.raises(ValueError, match=r"3 of its directions .* sum kappa / T = 2\.66667 where more than 3"):
        require_proper(replace(both, temperature=1.5))


def test_every_subspace_counts_and_not_only_the_whole(generator: torch.Generator) -> None:
    """One strong expert on its own direction does not hold the other: a weak Cauchy has that alone."""
    updates = normal(generator, 1, 2, 1, 2)
    strong = [10.0, 0.4]
    with pytest.raises(ValueError, match=r"1 of its directions .* sum kappa / T = 0\.8"):
        require_proper(bare(Directional(), Cauchy(), updates, 1.0, strong))
    require_proper(bare(Directional(), Cauchy(), updates, 0.79, strong))
    require_proper(bare(Identity(), Cauchy(), updates, 1.0, strong))


def test_experts_that_dropped_out_do_not_count(generator: torch.Generator) -> None:
    updates = normal(generator, 2, 2, 1, 3)
    updates[1, 1] = 0.0
    proper = bare(OutputGram(), Cauchy(), updates, 1.0, 1.0)  # 4 > 3 with both, 2 < 3 with one
    require_proper(proper.module(0))
    with pytest.raises(ValueError, match="the posterior of module 1 of the batch"):
        require_proper(proper)


def test_a_module_without_updates_is_another_reason(generator: torch.Generator) -> None:
    updates = normal(generator, 2, 2, 1, 1)
    updates[1] = 0.0
    posterior = bare(OutputGram(), Gaussian(), updates)
    assert posterior.undetermined.tolist() == [False, True]
    with pytest.raises(ValueError, match="module 1 of the batch has updates that are all zero"):
        require_proper(posterior)
    assert bare(OutputGram(), Gaussian(), updates, eta=1.0).undetermined.tolist() == [False, False]
    require_proper(bare(OutputGram(), Gaussian(), updates, eta=1.0))


def test_exponents_may_differ_between_modules(generator: torch.Generator) -> None:
    updates = normal(generator, 2, 1, 1, 3)
    energy = Cauchy(torch.tensor([2.0, 1.0], dtype=torch.float64))
    posterior = bare(Identity(), energy, updates)
    with pytest.raises(ValueError, match="module 1 of the batch"):
        require_proper(posterior)
    require_proper(replace(posterior, anchor_precision=torch.tensor([0.0, 1.0], dtype=torch.float64)))


def test_so_many_subsets_are_not_looked_at(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on experts whose tails are powers; anything that grows may come on top."""
    updates = normal(generator, 1, MOST_EXPERTS + 1, 1, 2)
    with pytest.raises(ValueError, match=f"{MOST_EXPERTS + 1} power-law experts are too many"):
        require_proper(bare(Identity(), Cauchy(), updates))
    module = import_module("inference.propriety")
    monkeypatch.setattr(module, "MOST_EXPERTS", 3)
    require_proper(bare(Identity(), Cauchy(), updates[:, :3]))
    with pytest.raises(ValueError, match="4 power-law experts are too many"):
        require_proper(bare(Identity(), Cauchy(), updates[:, :4]))
    require_proper(bare(Identity(), Gaussian(), updates[:, :4]))


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        ([], 12),
        (["identity"], 0),
        (["left"], 4),
        (["right"], 6),
        (["left", "right"], 2),
        (["vector"], 11),
        (["vector", "vector"], 10),
        (["left", "vector"], 4),
        (["half"], 7),
        (["half", "other"], 4),
        (["half", "left"], 4),
        (["third", "identity"], 0),
    ],
)
def test_null_spaces_by_counting(operators: list[str], expected: int, generator: torch.Generator) -> None:
    """On 3 x 4: a left factor sees 2 of 3 rows, a right one 2 of 4 columns, masks 5 entries and 3 others."""
    mask = torch.zeros(1, 12, dtype=torch.float64)
    half, other = mask.clone(), mask.clone()
    half[:, :5], other[:, 5:8] = 1.0, 2.0
    kinds = {
        "identity": lambda: ScaledIdentity((3, 4), mask.view(1, 3, 4)),
        "left": lambda: Gram(normal(generator, 1, 3, 2), "left", (3, 4)),
        "right": lambda: Gram(normal(generator, 1, 4, 2), "right", (3, 4)),
        "vector": lambda: RankOne(normal(generator, 1, 3, 4)),
        "half": lambda: Diagonal(half.view(1, 3, 4)),
        "other": lambda: Diagonal(other.view(1, 3, 4)),
        "third": lambda: Diagonal(other.view(1, 3, 4)),
    }
    assert _null_dimension([kinds[name]() for name in operators], 0, (3, 4)) == expected
