"""Anderson's extrapolation on maps with known limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inference.reweighting import Anderson
from tests.helpers import assert_close


def linear_map(generator: torch.Generator, modules: int, size: int) -> tuple[Tensor, Tensor]:
    """Contractions ``v -> A v + b``, ``(M, E, E)`` and ``(M, E)``."""
    a = torch.randn(modules, size, size, generator=generator, dtype=torch.float64)
    a = 0.8 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    return a, 0.1 * torch.randn(modules, size, generator=generator, dtype=torch.float64)  # no step beyond the longest


@pytest.mark.parametrize("size", [1, 2, 4])
def test_extrapolation_solves_a_linear_map_in_as_many_steps_as_it_has_numbers(
    size: int, generator: torch.Generator
) -> None:
    """Type II of full depth is GMRES (Walker and Ni, 2011, theorem 2.2): exact after ``E + 1`` values and a step."""
    a, b = linear_map(generator, 3, size)
    fixed = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - a, b)
    anderson, v = Anderson(depth=size), torch.zeros(3, size, dtype=torch.float64)
    for step in range(size + 2):
        if step == size + 1:
            assert_close(v, fixed, 1e-6)
        elif step <= size // 2:
            assert float((v - fixed).abs().max()) > 1e-3
        v = anderson.propose(v, (a @ v.unsqueeze(-1)).squeeze(-1) + b)


def test_what_led_uphill_is_forgotten_module_by_module(generator: torch.Generator) -> None:
    a, b = linear_map(generator, 2, 3)
    forgetful, steady, late = (Anderson(depth=3) for _ in range(3))
    points = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    outputs = (a @ points.unsqueeze(-1)).squeeze(-1) + b
    assert_close(late.propose(points[2], outputs[2]), outputs[2])  # the first call: the plain step
    for i in range(3):
        forgetful.propose(points[i], outputs[i])
        steady.propose(points[i], outputs[i])
    forgetful.forget(torch.tensor([True, False]))
    found = forgetful.propose(points[3], outputs[3])
    assert_close(found[0], late.propose(points[3], outputs[3])[0], 1e-9)
    assert_close(found[1], steady.propose(points[3], outputs[3])[1])


def test_only_as_many_differences_count_as_the_depth_says(generator: torch.Generator) -> None:
    """With depth 1 the proposal depends on the last two values only."""
    a, b = linear_map(generator, 1, 3)
    long, short = Anderson(depth=1), Anderson(depth=1)
    points = torch.randn(4, 1, 3, generator=generator, dtype=torch.float64)
    outputs = (a @ points.unsqueeze(-1)).squeeze(-1) + b
    for i in range(3):
        long.propose(points[i], outputs[i])
    short.propose(points[2], outputs[2])
    assert_close(long.propose(points[3], outputs[3]), short.propose(points[3], outputs[3]), 1e-15)


def test_one_number_is_extrapolated_by_the_secant() -> None:
    """``g`` through (0, 1) and (1, 1.5) has its fixed point at 2."""
    anderson = Anderson(depth=5)
    anderson.propose(torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64))
    found = anderson.propose(torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[1.5]], dtype=torch.float64))
    assert float(found) == pytest.approx(2.0, rel=1e-9)


def test_an_extrapolation_that_is_no_number_gives_way_to_the_plain_step() -> None:
    anderson = Anderson(depth=2)
    anderson.propose(torch.zeros(2, 1), torch.tensor([[1.0], [1.0]]))
    output = torch.tensor([[1.5], [math.inf]])
    found = anderson.propose(torch.tensor([[1.0], [1.0]]), output)
    assert float(found[0]) == pytest.approx(2.0, rel=1e-5)
    assert float(found[1]) == math.inf
