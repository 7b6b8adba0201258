"""The check of the solver by numbers worked by hand: relative gradients, what counts as vanished, thresholds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from inference import fixed_point
from inference.gradient_check import judged, modules_at_once, relative_gradient, settled
from inference.solution import FixedPointInfo, Solution, Status
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Energy,
    Expert,
    Gaussian,
    Identity,
    Posterior,
    ProductOfExperts,
)
from tests.helpers import assert_close, random_updates

GAMMA = 0.5


def posterior_of(updates: Tensor, eta: float, energy: Energy | None = None) -> Posterior:
    """Gaussian experts of importances 1, 2, ...; half of ``a_i |Z - U_i|^2 / s^2`` each."""
    experts = [
        Expert("abc"[i], Identity(), energy or Gaussian(), Absolute(GAMMA), float(i + 1))
        for i in range(updates.shape[1])
    ]
    return ProductOfExperts(tuple(experts), anchor=Anchor(None, AbsolutePrecision(eta))).bind(updates)


def lengths(values: Tensor) -> Tensor:
    return values.square().sum((-2, -1)).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_relative_to_its_parts(dtype: torch.dtype, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5, dtype=dtype)
    z = torch.randn(2, 4, 5, generator=generator, dtype=dtype)
    parts = [(i + 1) * (z.double() - updates[:, i].double()) / GAMMA**2 for i in range(3)] + [0.6 * z.double()]
    expected = lengths(torch.stack(parts).sum(0)) / torch.stack([lengths(part) for part in parts]).sum(0)
    found = relative_gradient(posterior_of(updates, 0.3), z)
    assert found.dtype == torch.float64
    assert_close(found, expected, 1e-7 if dtype == torch.float32 else 1e-12)  # the scale is of the updates' dtype


def test_parts_that_vanish_together_are_measured_by_those_at_the_start() -> None:
    """Both experts want U: beside it all parts point one way, and a thousandth of those at 0 counts as nothing."""
    away = torch.tensor([5e-3, 1e-4, 1e-5, 0.0], dtype=torch.float64)
    u = torch.zeros(4, 2, 3, dtype=torch.float64)
    u[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    z = u * (1 + away[:, None, None])
    found = relative_gradient(posterior_of(torch.stack([u, u], 1), 0.0), z)
    assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.0], dtype=torch.float64), 1e-9)
    alone = [relative_gradient(posterior_of(torch.stack([u, u], 1), 0.0).module(m), z[m : m + 1]) for m in range(4)]
    assert_close(torch.cat(alone), found, 1e-12)


def test_where_nothing_pulls_there_is_no_gradient() -> None:
    zero = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    assert relative_gradient(posterior_of(zero, 0.0), zero[:, 0]).tolist() == [0.0]


class Told(Energy):
    """An energy with a parameter of its own, on which alone its value depends."""

    concave = True

    def __init__(self) -> None:
        self.height = torch.ones((), dtype=torch.float64, requires_grad=True)

    @override
    def rho(self, q: Tensor) -> Tensor:
        return self.height.expand_as(q)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)


class Flat(Told):
    """An energy that carries no gradient at all."""

    @override
    def rho(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)


@pytest.mark.parametrize("energy", [Told(), Flat()], ids=lambda energy: type(energy).__name__)
def test_energies_that_do_not_pull_are_no_parts(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    found = relative_gradient(posterior_of(updates, 0.2, energy), updates[:, 0])
    assert_close(found, torch.ones(2, dtype=torch.float64), 1e-12)  # the anchor alone


@pytest.mark.parametrize(
    ("entries", "modules"), [(1, 65536), (2, 32768), (2**15 + 1, 1), (2**15, 2), (2**16, 1), (10**9, 1)]
)
def test_modules_are_checked_together_up_to_so_many_entries(entries: int, modules: int) -> None:
    assert modules_at_once(entries) == modules


def test_every_module_is_checked_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three entries each, two at a time."""
    monkeypatch.setattr("inference.gradient_check.CHUNK", 6)
    updates = random_updates(generator, 5, 2, 1, 3)
    posterior, z = posterior_of(updates, 0.3), torch.randn(5, 1, 3, generator=generator, dtype=torch.float64)
    expected = torch.cat([relative_gradient(posterior.module(m), z[m : m + 1]) for m in range(5)])
    assert_close(relative_gradient(posterior, z), expected, 1e-12)


# --- what the solver knows ---


def solved(generator: torch.Generator, *, inactive: bool = False) -> tuple[Posterior, FixedPointInfo]:
    """Gaussian experts have the weights ``a_i / 2 s^2`` = 2, 4, 6, whatever the residuals."""
    updates = random_updates(generator, 2, 3, 4, 5)
    if inactive:
        updates[:, 1] = 0.0
    posterior = posterior_of(updates, 0.3)
    info = fixed_point(posterior).info
    one = torch.ones(2, dtype=torch.float64)
    return posterior, replace(info, gradient_norm=0.0 * one, anchor_share=0.5 * one)


@pytest.mark.parametrize(("error", "right"), [(0.0, True), (0.9e-6, True), (1.1e-6, False), (1.4e-6, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_are_the_energys_slopes_to_one_in_a_million(
    error: float, sign: int, right: bool, generator: torch.Generator
) -> None:
    posterior, info = solved(generator)
    assert_close(info.weights, torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64).expand(2, -1), 1e-12)
    weights = info.weights.clone()
    weights[1, 2] *= 1 + sign * error
    assert settled(posterior, replace(info, weights=weights)).tolist() == [True, right]


@pytest.mark.parametrize("energy", [Told(), Flat()], ids=lambda energy: type(energy).__name__)
def test_slopes_that_are_not_there_settle_nothing(energy: Energy, generator: torch.Generator) -> None:
    posterior, info = solved(generator)
    other = posterior_of(random_updates(generator, 2, 3, 4, 5), 0.3, energy)
    if isinstance(energy, Flat):
        assert settled(other, info).tolist() == [False, False]
    assert settled(posterior, info).tolist() == [True, True]


@pytest.mark.parametrize("inactive", [False, True])
def test_a_gradient_is_small_beside_the_anchors_share(inactive: bool, generator: torch.Generator) -> None:
    """A thousandth of it; where both vanish there is nothing to settle."""
    posterior, info = solved(generator, inactive=inactive)
    for norm, share, small in ((4.9e-4, 0.5, True), (5.1e-4, 0.5, False), (7e-4, 0.5, False), (0.0, 0.0, True)):
        changed = {"gradient_norm": norm, "anchor_share": share}
        some = {name: torch.tensor([0.0, value], dtype=torch.float64) for name, value in changed.items()}
        assert settled(posterior, replace(info, **some)).tolist() == [True, small]


CONVERGED, MAX_STEPS, NO_MINIMUM = Status.CONVERGED, Status.MAX_STEPS, Status.NO_MINIMUM


def judged_by(
    monkeypatch: pytest.MonkeyPatch, sizes: list[float], known: list[bool], solution: Solution[Any]
) -> tuple[Status, ...]:
    def answer(values: list[Any]) -> Callable[..., Tensor]:
        return lambda *_: torch.tensor(values)

    monkeypatch.setattr("inference.gradient_check.settled", answer(known))
    monkeypatch.setattr("inference.gradient_check.relative_gradient", answer(sizes))
    return judged(posterior_of(torch.zeros(4, 1, 1, 1), 1.0), solution).status


def test_only_what_did_converge_is_contradicted(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """From a gradient of a thousandth on, or one that is not a number; and only if some module is not settled."""
    info = solved(generator)[1]
    status = (CONVERGED, CONVERGED, MAX_STEPS, CONVERGED)
    solution = Solution(torch.zeros(4, 1, 1), status, info)
    for size, said in ((0.999e-3, CONVERGED), (1.001e-3, NO_MINIMUM), (1.4e-3, NO_MINIMUM), (torch.nan, NO_MINIMUM)):
        found = judged_by(monkeypatch, [0.0, size, size, 1.0], [True, True, True, False], solution)
        assert found == (CONVERGED, said, MAX_STEPS, NO_MINIMUM)
    assert judged_by(monkeypatch, [1.0] * 4, [True] * 4, solution) == status
