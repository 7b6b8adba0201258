from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference.evidence.designs import compare_designs
from inference.evidence.estimate import UntrustedEvidence, dimensions, log_evidence
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Directional,
    Energy,
    Expert,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    ResidualMap,
    StudentT,
    TaskVectors,
    Welsch,
)
from poe_models.operators import Diagonal, Operator
from tests.evidences import plain, simulate
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b", "c"]


def gaussian(residual_map: object, gamma: float = 1.0) -> ProductOfExperts:
    return ProductOfExperts.of(NAMES, residual_map, Gaussian(), Relative(gamma))  # type: ignore[arg-type]


def test_the_table_finds_the_tails_that_made_the_data(generator: torch.Generator) -> None:
    energies: dict[str, tuple[Energy, float]] = {
        "t(2)": (StudentT(2.0, "multivariate"), 1.0),
        "t(30)": (StudentT(30.0, "multivariate"), 1.6),
        "normal": (Gaussian(), 2.2),
    }
    designs = {name: plain(NAMES, energy, gamma) for name, (energy, gamma) in energies.items()}
    table = compare_designs(designs, simulate(40, 3, 8, 2.0, generator), generator=generator)
    assert [row.name for row in table.rows] == ["t(2)", "t(30)", "normal"]
    best, second, last = (row.evidence for row in table.rows)
    assert best.total - second.total > 5 * (best.total_error**2 + second.total_error**2) ** 0.5 + 5
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines] == ["design", "t(2)", "t(30)", "normal"]
    assert f"{best.total - last.total:.2f}" in lines[3]
    assert "exact" in lines[3]
    assert "exact" not in lines[1]
    light = compare_designs(
        {name: plain(NAMES, energy) for name, (energy, _) in energies.items()},
        simulate(40, 3, 8, float("inf"), generator),
        generator=generator,
    )
    assert light.rows[-1].name == "t(2)"


def test_a_model_is_the_sum_of_its_modules_whatever_their_shapes(generator: torch.Generator) -> None:
    shapes = {"one.weight": (3, 4), "two.weight": (2, 6), "three.weight": (3, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    experts = {name: {key: torch.randn(s, generator=generator) for key, s in shapes.items()} for name in NAMES}
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    designs = {"wide": gaussian(InputGram()), "narrow": gaussian(InputGram(), 0.5)}
    told: list[str] = []
    table = compare_designs(designs, vectors, generator=generator, progress=told.append)
    assert sorted(table.modules) == sorted(shapes) == sorted(told)
    updates = {module.name: module.updates for module in vectors}
    for row in table.rows:
        for name, value in zip(table.modules, row.evidence.value, strict=True):
            alone = log_evidence(designs[row.name].bind(updates[name]), generator=generator)
            assert_close(value, alone.value[0], 1e-10)


def test_sides_and_directions_are_densities_of_different_numbers(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 3)
    updates[:, :, 2:] = updates[:, :, :2] @ torch.ones(3, 3, dtype=torch.float64)  # rank below 4 on the left
    designs = {name_of(map_): gaussian(map_) for map_ in (InputGram(), OutputGram())}
    with pytest.raises(ValueError, match="densities of different numbers.*numbers of an update"):
        compare_designs(designs, updates, generator=generator)
    with pytest.raises(ValueError, match=r"12 numbers of an update, 'a' 1"):
        compare_designs({"all": gaussian(Identity()), "one": gaussian(Directional())}, updates, generator=generator)
    left = torch.randn(1, 3, 3, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, 3, 1, 3, generator=generator, dtype=torch.float64)
    posteriors = [each.bind(left @ right) for each in designs.values()]
    assert torch.equal(*(dimensions(posterior) for posterior in posteriors))
    with pytest.raises(ValueError, match="different directions"):
        compare_designs(designs, left @ right, generator=generator)
    square = random_updates(generator, 2, 3, 3, 3)
    full = compare_designs({**designs, "I": gaussian(Identity())}, square, generator=generator)
    assert len(full.rows) == 3


class _Turned(ResidualMap):
    """A map of one's own: what `inner` makes of the update with its columns in another order."""

    def __init__(self, inner: ResidualMap) -> None:
        self.inner = inner

    def operator(self, update: Tensor) -> Operator:
        return self.inner.operator(update.roll(1, -1))


class _Weighted(ResidualMap):
    """A diagonal map that sees some entries, with weights."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def operator(self, update: Tensor) -> Operator:
        return Diagonal(torch.tensor(self.values, dtype=update.dtype).expand(update.shape))


@pytest.mark.parametrize("inner", [InputGram(), Directional()], ids=name_of)
def test_the_same_ranks_in_other_directions_are_other_numbers(inner: ResidualMap, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 5, 2) @ random_updates(generator, 2, 3, 2, 6)
    designs = {"map": gaussian(inner), "turned": gaussian(_Turned(inner))}
    with pytest.raises(ValueError, match="different directions of 'a'"):
        compare_designs(designs, updates, generator=generator)


def test_the_same_directions_in_other_proportions_are_the_same_numbers(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    designs = {"one": gaussian(_Weighted(1.0, 2.0, 0.0)), "other": gaussian(_Weighted(3.0, 1.0, 0.0))}
    assert len(compare_designs(designs, updates, generator=generator).rows) == 2
    with pytest.raises(ValueError, match="different directions"):
        compare_designs(designs | {"last": gaussian(_Weighted(0.0, 2.0, 1.0))}, updates, generator=generator)
    orders = (InputGram(), OutputGram()), (OutputGram(), InputGram())
    both = {str(i): ProductOfExperts.of(NAMES, maps, Gaussian(), Relative(1.0)) for i, maps in enumerate(orders)}
    one, other = (row.evidence.value for row in compare_designs(both, updates, generator=generator).rows)
    assert_close(one, other, 1e-10)


def test_the_same_names_in_another_order_are_other_updates(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 3)
    turned = ProductOfExperts.of(["c", "b", "a"], InputGram(), Gaussian(), Relative(1.0))
    with pytest.raises(ValueError, match="differ in length"):
        compare_designs({"one": gaussian(InputGram()), "turned": turned}, updates, generator=generator)
    two = Expert("a", InputGram(), Gaussian()) * Expert("b", InputGram(), Gaussian(), update="a")
    one = Expert("a", InputGram(), Gaussian())
    single = ProductOfExperts((one,))
    with pytest.raises(ValueError, match="not about the same updates"):
        compare_designs({"one": single, "two": two}, updates[:, :1], generator=generator)


def test_errors_name_design_and_module(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="no designs"):
        compare_designs({}, torch.zeros(1, 1, 1), generator=generator)
    with pytest.raises(ValueError, match="there are no modules"):
        compare_designs({"one": gaussian(InputGram())}, [], generator=generator)
    updates = random_updates(generator, 1, 3, 3, 3)
    bounded = ProductOfExperts.of(NAMES, InputGram(), Welsch(), Relative(1.0))
    with pytest.raises(ValueError, match=r"design 'bounded': expert 'a' is not a density.*Welsch"):
        compare_designs({"bounded": bounded}, updates, generator=generator)

    heavy = StudentT(2.0, "multivariate")

    class Bare(Energy):
        rho = heavy.for_dimension(torch.tensor(1024.0, dtype=torch.float64)).rho

        def log_normalizer(self, scale, dim, importance=1.0):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            return heavy.log_normalizer(scale, dim, importance)

    vectors = TaskVectors(
        {"fc.weight": torch.zeros(32, 32)},
        {name: {"fc.weight": 10.0**i * torch.randn(32, 32, generator=generator)} for i, name in enumerate(NAMES)},
    )
    poe = ProductOfExperts.of(
        NAMES, Identity(), Bare(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.001))
    )
    with pytest.raises(UntrustedEvidence, match=r"design 'bare': 'fc.weight': .*effective") as caught:
        compare_designs({"bare": poe}, vectors, generator=generator)
    assert bool(caught.value.evidence.value.isfinite().all())
