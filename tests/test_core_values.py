"""Small parts of operators, updates, bindings and samplers against their formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from inference.evidence.gaussian_integrals import OneSided
from inference.gibbs import GibbsKernel
from inference.slice import DEGREES, Reference
from inference.tempering import _dimension
from poe_models import (
    Cauchy,
    Directional,
    FactorExpert,
    Gaussian,
    Gram,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    ResidualMap,
    StudentT,
    Welsch,
    span_statistics,
)
from poe_models.operators import span_rank
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seeded

NAMES = ["a", "b"]


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Module:
    """One module's updates with names."""

    name: str
    names: tuple[str, ...]
    updates: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None


@pytest.mark.parametrize("leading", [(), (3,)])
def test_a_gram_operators_matrix_and_determinant(leading: tuple[int, ...], generator: torch.Generator) -> None:
    """Of rank 2 in five directions: its two eigenvalues, as often as the other side is long."""
    factor = torch.randn(*leading, 5, 2, generator=generator, dtype=torch.float64)
    for side, shape, other in (("left", (5, 4), 4), ("right", (4, 5), 4)):
        operator = Gram(factor, side, shape)  # type: ignore[arg-type]
        assert_close(operator.gram, factor @ factor.mT)
        largest = torch.linalg.eigvalsh(factor @ factor.mT)[..., -2:].log().sum(-1)
        assert_close(operator.log_pseudo_determinant(), other * largest)
        assert_close(operator.dimension(), torch.full(leading, 2.0 * other))


def test_the_rank_of_a_span_does_not_depend_on_lengths() -> None:
    """Two modules of three vectors: independent ones of very unequal lengths, and a multiple among them."""
    apart = torch.tensor([[1.0, 0.0, 0.0], [0.6e-9, 0.8e-9, 0.0], [0.0, 1e6, 1e6]], dtype=torch.float64)
    multiple = torch.tensor([[2.0, 1.0, 0.0], [-4e-7, -2e-7, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    vectors = torch.stack([apart, multiple])
    assert span_rank(vectors @ vectors.mT).tolist() == [3.0, 1.0]
    assert span_rank((vectors @ vectors.mT)[:1]).tolist() == [3.0]


def test_which_energies_are_mixtures() -> None:
    told = {energy: energy.is_mixture for energy in (Gaussian(), Cauchy(), StudentT(3.0), Huber(1.0), Welsch())}
    assert list(told.values()) == [True, True, True, False, False]
    assert Cauchy("multivariate").is_mixture


def test_modules_bring_their_own_factors_and_order(generator: torch.Generator) -> None:
    left = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    module = Module("fc", ("b", "a"), left @ right, (left, right))
    posterior = ProductOfExperts.of(NAMES, InputGram(), Cauchy()).bind(module)
    assert posterior.modules == ("fc",)
    for expert, place in zip(posterior.experts, (1, 0), strict=True):
        assert expert.low_rank is not None
        assert torch.equal(expert.low_rank[0][0], left[place])
        assert torch.equal(expert.low_rank[1][0], right[place])
        assert_close(expert.update[0], left[place] @ right[place])
    with pytest.raises(ValueError, match=r"module 'fc': the product is about 'c', but the task vectors are b, a"):
        ProductOfExperts.of(["a", "c"], InputGram(), Cauchy()).bind(module)


def test_merges_are_one_for_each_module(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    modules = [Module(name, ("a", "b"), each) for name, each in zip("xy", updates, strict=True)]
    merges = [each.mean(0, keepdim=True) for each in updates]
    bound = poe.bind(modules, coordinates="span", through=merges)
    assert bound.modules == ("x", "y")
    assert bound.event_shape == (4, 1)  # two updates, the centre and the merge
    assert poe.bind(modules, coordinates="span").event_shape == (3, 1)
    with pytest.raises(ValueError, match="1 merged updates for 2 modules"):
        poe.bind(modules, coordinates="span", through=merges[:1])


def test_factor_experts_over_examples_are_sums(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    targets = f64(1.0, 2.0, 5.0)

    def loss(c: Tensor, rows: Tensor) -> Tensor:
        return (c[..., 0, :1] - targets[rows]).square()

    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    one = (poe * FactorExpert("loss", loss, "span", "examples", examples=3, batch_size=2)).bind(
        updates, coordinates="span"
    )
    assert one.span is not None
    at = one.span.latents(f64([[0.5, 0.0, 0.0]], [[2.0, 0.0, 0.0]]))
    (factor,) = one.factors
    assert factor.joint
    assert_close(factor.energy(at), f64(0.25 + 2.25 + 20.25, 1 + 0 + 9))
    assert factor.per_example is not None
    assert_close(factor.per_example(at, torch.tensor([2, 0])), f64([20.25, 0.25], [9, 1]))
    whole = (poe * FactorExpert("sum", lambda c: c.sum((-2, -1)), "span", "model")).bind(updates, coordinates="span")
    assert whole.factors[0].per_example is None
    assert_close(whole.factors[0].energy(at), f64(0.5, 2.0))


def test_gibbs_weights_have_the_power_of_the_temperature(generator: torch.Generator) -> None:
    """Of a Cauchy of k = 3 and importance 2 at T = 1/2: Gamma(12) over 1 + q / s^2, whose mean is known."""
    poe = ProductOfExperts.of(NAMES, Identity(), Cauchy(3.0), importance=2.0, temperature=0.5)
    kernel = GibbsKernel(poe.bind(random_updates(generator, 3, 2, 2, 2)))
    assert kernel.power.tolist() == [2.0, 2.0, 2.0]
    assert_close(kernel.ridge, kernel.posterior.anchor_precision / 0.5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_scale_of_a_slice_reference_is_an_inverse_gamma(size: int) -> None:
    reference = Reference(torch.zeros(1, size).double(), torch.eye(size).double().unsqueeze(0))
    y = torch.ones(2, 1, size, dtype=torch.float64)
    found = reference.scale(y, seeded(0))
    half = torch.full((2, 1), (DEGREES + size) / 2, dtype=torch.float64)
    gamma = torch._standard_gamma(half, generator=seeded(0))
    assert_close(found, (DEGREES + size) / 2 / gamma)
    assert_close(reference.log_density(y), -half * math.log1p(size / DEGREES))


@pytest.mark.parametrize(
    ("residual_map", "wanted"),
    [(InputGram(), 20 * 3), (OutputGram(), 6 * 3), (Directional(), 2), (Identity(), 60)],
    ids=name_of,
)
def test_directions_that_the_experts_act_on(residual_map: ResidualMap, wanted: int, generator: torch.Generator) -> None:
    """Two updates of 20 x 3: on the input side every row is acted on, on the output side six directions of 20."""
    updates = random_updates(generator, 2, 2, 20, 3)
    assert _dimension(ProductOfExperts.of(NAMES, residual_map, Cauchy()).bind(updates)).tolist() == [wanted] * 2
    span = ProductOfExperts.of(NAMES, residual_map, Cauchy()).bind(updates, coordinates="span")
    assert _dimension(span).tolist() == [2.0, 2.0]


def test_what_cannot_be_factored_has_no_integral() -> None:
    """The first minor is negative with weight -2, the second with weights that leave the first positive."""
    grams = f64([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    targets = torch.ones(1, 2, 3, 2, dtype=torch.float64)
    integral = OneSided(grams, targets, 3, f64(0.5))
    weights = f64([[1.0, 1.0]], [[-2.0, 0.0]], [[0.0, -2.0]])
    value, _ = integral.value_and_slope(weights)
    assert value.isfinite().tolist() == [[True], [False], [False]]
    assert integral.value(weights).isneginf().tolist() == [[False], [True], [True]]


def test_energies_say_their_own_settings() -> None:
    assert repr(Cauchy()) == "Cauchy(exponent=1.0)"
    assert repr(StudentT(3.0)) == "StudentT(df=3.0, exponent=None)"


def test_a_span_names_its_members(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    assert span_statistics(poe, updates).basis == ("a", "b", "center")
    assert span_statistics(poe, updates, through=updates.mean(1)).basis == ("a", "b", "center", "merge")


def test_modules_that_nobody_changed_are_left_out_of_a_model(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    updates[1] = 0.0
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    with pytest.warns(UserWarning, match="nothing changes y:"):
        some = poe.bind(span_statistics(poe, updates, ["x", "y", "z"]))
    assert some.modules == ("x", "z")
    assert poe.bind(span_statistics(poe, updates[1:2], ["y"])).modules == ("y",)
    assert poe.bind(span_statistics(poe, updates[::2], ["x", "z"])).modules == ("x", "z")


def test_factor_experts_of_merged_updates_are_asked_module_by_module(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy()) * FactorExpert("sum", lambda z: z.sum((-2, -1)))
    posterior = poe.bind(updates, coordinates="span")
    assert posterior.span is not None
    c = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    found = posterior.factors[0].energy(posterior.span.latents(c))
    assert_close(found, torch.einsum("smj,mjab->sm", c[..., :2], updates))
    bad = poe.experts[0] * poe.experts[1] * FactorExpert("whole", lambda z: z.sum())
    with pytest.raises(ValueError, match=r"'whole' returned shape \(\), but .* expected \(5,\)"):
        bad.bind(updates, coordinates="span").factors[0].energy(posterior.span.latents(c))
