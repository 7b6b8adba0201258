"""Public objects that hold tensors print in a few lines."""

from __future__ import annotations

import torch

from inference.evidence.estimate import log_evidence
from inference.laplace import DenseLaplace
from inference.map import fixed_point
from inference.models.design import Design
from inference.search.space import DesignSpace, Range, Searched
from poe_models import Cauchy, ProductOfExperts
from poe_models.least_squares import quadratic_of
from poe_models.span import span_statistics
from tests.seeds import seeded


def test_objects_of_a_batch_print_without_its_numbers() -> None:
    updates = torch.randn(40, 3, 20, 10, generator=seeded(0), dtype=torch.float64)
    posterior = ProductOfExperts.of(("a", "b", "c")).bind(updates)
    normalised = ProductOfExperts.of(("a", "b", "c"), energy=Cauchy("multivariate")).bind(updates[:1])
    solution = fixed_point(posterior)
    shown = [
        posterior, posterior.experts[0], posterior.experts[0].operator, quadratic_of(posterior), solution,
        solution.info, solution.info.retention, log_evidence(normalised, generator=seeded(1), samples=200),
    ]  # fmt: skip
    for each in shown:
        text = str(each)
        assert text.startswith(type(each).__name__)
        assert len(text.splitlines()) <= 7
        assert "tensor(" not in text


def test_a_product_has_one_line_for_experts_that_are_alike() -> None:
    text = str(ProductOfExperts.of(("a", "b", "c"), importance=(1.0, 1.0, 2.0)))
    assert text.splitlines()[1:] == [
        "  a, b: InputGram(), Cauchy(exponent=1.0), Balanced(gamma=1.0), importance 1",
        "  c: InputGram(), Cauchy(exponent=1.0), Balanced(gamma=1.0), importance 2)",
    ]


def test_a_design_space_prints_without_the_names_of_all_tensors() -> None:
    groups = {f"group {number}": (f"tensor {number}",) for number in range(50)}
    poe = ProductOfExperts.of(("a", "b"))
    space = DesignSpace(lambda scaling: Design(poe, scaling), {"scaling": Searched(Range(0.1, 2.0), groups)})
    assert "tensor 1" not in str(space)
    assert len(str(space).splitlines()) <= 3
    assert "50 in all" in str(space.searched["scaling"])


def test_an_approximation_prints_what_it_approximates() -> None:
    updates = torch.randn(1, 2, 3, 2, generator=seeded(0), dtype=torch.float64)
    posterior = ProductOfExperts.of(("a", "b")).bind(updates, coordinates="span")
    assert str(DenseLaplace(posterior, fixed_point(posterior).value)) == f"DenseLaplace({posterior})"


def test_statistics_of_a_whole_model_say_once_what_all_modules_have() -> None:
    updates = torch.randn(40, 3, 4, 5, generator=seeded(0), dtype=torch.float64)
    poe = ProductOfExperts.of(("a", "b", "c"))
    text = str(span_statistics(poe, updates, through=fixed_point(poe.bind(updates)).value))
    assert "through=(40 x 'a Cauchy(exponent=1.0)" in text
    assert "residual_maps=(3 x 'InputGram()')" in text
    assert len(text.splitlines()) <= 6
