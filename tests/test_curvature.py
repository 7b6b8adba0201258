"""Least curvature on quadratics whose Hessians are known, and where it begins to count as a saddle."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference import Status, minimize
from inference.curvature import LANCZOS, NEGATIVE, NUDGE, least_curvature
from poe_models import Absolute, AbsolutePrecision, Anchor, Cauchy, Identity, ProductOfExperts

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def of(*curvatures: float, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    """The gradient of a quadratic with these curvatures."""
    values = torch.tensor(curvatures, dtype=dtype)
    return lambda x: values * x


@pytest.mark.parametrize(
    ("dtype", "negative"), [(torch.float32, 1e-2), (torch.float64, 1e-5)], ids=["float32", "float64"]
)
@pytest.mark.parametrize(("share", "status"), [(1.3, Status.SADDLE), (0.7, Status.CONVERGED)])
def test_a_curvature_beyond_rounding_is_a_saddle(
    share: float, status: Status, dtype: torch.dtype, negative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cauchy at (1, 0) and (-1, 0): at zero 4 (s^2 - 1) / (s^2 + 1)^2 along, and 4 / (s^2 + 1) across."""
    monkeypatch.setattr(sys.modules["inference.minimize"], "STEPS_OFF", ())
    ratio = -share * negative
    scale = Absolute(math.sqrt((1 + ratio) / (1 - ratio)))
    anchor = Anchor(precision=AbsolutePrecision(1e-12))
    poe = ProductOfExperts.of(["a", "b"], Identity(), Cauchy(), scale, anchor=anchor)
    updates = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], dtype=dtype)
    assert NEGATIVE[dtype] == negative
    assert minimize(poe.bind(updates)).status == (status,)


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("share", "known"), [(0.5, True), (2.0, False)])
def test_less_curvature_than_noise_can_fake_is_none(share: float, known: bool, sign: int, dtype: torch.dtype) -> None:
    """Noise in the gradient makes a curvature of its length over the step of the differences."""
    gradient, zero = of(1.0, 0.5, sign * 1e-3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    ratio, _ = least_curvature(gradient, zero, torch.tensor([share * 1e-3 * NUDGE[dtype]], dtype=torch.float64))
    torch.testing.assert_close(ratio, torch.tensor([sign * 1e-3 * known], dtype=torch.float64), rtol=1e-3, atol=0.0)


@dtypes
def test_modules_have_their_own_noise_and_units(dtype: torch.dtype) -> None:
    sizes = torch.tensor([[1.0], [1e3], [1e-3]], dtype=dtype)
    noise = torch.tensor([0.0, 1e6, 0.0], dtype=torch.float64)
    ratio, _ = least_curvature(lambda x: sizes * of(-1.0, 2.0, dtype=dtype)(x), torch.zeros(3, 2, dtype=dtype), noise)
    torch.testing.assert_close(ratio, torch.tensor([-0.5, 0.0, -0.5], dtype=torch.float64), rtol=1e-4, atol=0.0)


def test_the_largest_curvature_counts_whatever_its_sign() -> None:
    ratio, direction = least_curvature(of(-4.0, 1.0, 2.0), torch.zeros(1, 3, dtype=torch.float64))
    assert float(ratio) == pytest.approx(-1.0, rel=1e-6)
    assert direction.abs()[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_a_cubic_term_does_not_count() -> None:
    """Differences are central: x^3 has no curvature at zero, wherever the step leads."""
    ratio, _ = least_curvature(lambda x: x + 1e5 * x.square(), torch.zeros(1, 1, dtype=torch.float64))
    assert float(ratio) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("size", [LANCZOS - 1, LANCZOS, 3 * LANCZOS])
def test_at_most_so_many_directions_are_measured(size: int) -> None:
    """As many gradients as directions, two each, and two along the one that is found."""
    calls: list[Tensor] = []
    curvatures = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        calls.append(x)
        return curvatures * x

    ratio, _ = least_curvature(gradient, torch.zeros(1, size, dtype=torch.float64))
    assert len(calls) == 2 * min(size, 16) + 2
    assert -1.0 - 1e-6 < float(ratio) < -0.9
    assert all(float(each.norm()) == pytest.approx(1e-6, rel=1e-6) for each in calls)


def test_one_product_that_is_not_finite_leaves_nothing_known() -> None:
    calls: list[Tensor] = []

    def gradient(x: Tensor) -> Tensor:
        calls.append(x)
        return x * (torch.nan if len(calls) in (3, 4) else -1.0)  # the second of two directions

    ratio, direction = least_curvature(gradient, torch.zeros(1, 2, dtype=torch.float64))
    assert len(calls) == 6
    assert float(ratio) == 0.0
    assert bool(direction.isfinite().all())
