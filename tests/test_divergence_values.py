"""Divergences and residuals of outputs against sums written out, for examples and for tokens of which some count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inference.functional import KullbackLeibler, Residual, Targets
from poe_models import Cauchy, StudentT
from tests.helpers import assert_close
from tests.seeds import seeded

COUNTED = torch.tensor([[True, True, False], [True, False, False]])


def outputs_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def kullback_leibler(f: Tensor, target: Tensor) -> float:
    """Of one row of logits."""
    p, q = (each.exp() / each.exp().sum() for each in (target, f))
    return float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))


@pytest.mark.parametrize("counted", [None, COUNTED])
@pytest.mark.parametrize("classes", [3, 4])
def test_tokens_that_count_are_summed(classes: int, counted: Tensor | None) -> None:
    f, target = outputs_of(2, 3, classes), outputs_of(2, 3, classes, seed=1)
    targets = Targets(target, counted)
    mask = torch.ones(2, 3).bool() if counted is None else counted
    divergence, residual = [0.0, 0.0], [0.0, 0.0]
    for n in range(2):
        for t in range(3):
            if mask[n, t]:
                divergence[n] += kullback_leibler(f[n, t], target[n, t])
                residual[n] += math.log1p(float((f[n, t] - target[n, t]).square().sum()) / 0.5**2)
    assert_close(KullbackLeibler()(f, targets), torch.tensor(divergence, dtype=torch.float64), 1e-10)
    assert_close(Residual(Cauchy(), 0.5)(f, targets), torch.tensor(residual, dtype=torch.float64), 1e-10)


def test_one_row_for_each_example() -> None:
    f, target = outputs_of(5, 3), outputs_of(5, 3, seed=1)
    expected = torch.tensor([kullback_leibler(a, b) for a, b in zip(f, target, strict=True)], dtype=torch.float64)
    assert_close(KullbackLeibler()(f, Targets(target)), expected, 1e-10)
    far = Residual(Cauchy(), 3.0)(f, Targets(target))
    assert_close(far, torch.log1p((f - target).square().sum(1) / 9), 1e-12)


def test_nothing_is_said_where_nothing_counts() -> None:
    """Zeros take the place of what may be no number there, so that no gradient is lost."""
    f = outputs_of(2, 3, 4).requires_grad_()
    target = torch.where(COUNTED.unsqueeze(-1), outputs_of(2, 3, 4, seed=1), torch.nan)
    targets = Targets(target, COUNTED)
    for left in targets.masked(f):
        assert bool((left[~COUNTED] == 0).all())
    assert torch.equal(targets.masked(f)[0][COUNTED], f[COUNTED])
    assert torch.equal(targets.masked(f)[1][COUNTED], target[COUNTED])
    for divergence in (KullbackLeibler(), Residual(Cauchy(), 0.5)):
        (gradient,) = torch.autograd.grad(divergence(f, targets).sum(), f)
        assert bool((gradient[~COUNTED] == 0).all())
        assert bool((gradient[COUNTED] != 0).any(-1).all())
        assert bool(gradient.isfinite().all())
    assert Targets(target).masked(f)[1] is target


def test_classes_without_probability_cost_nothing() -> None:
    target = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    f = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(KullbackLeibler()(f, Targets(target)), torch.tensor([math.log(1.5)], dtype=torch.float64), 1e-12)


def test_what_is_refused() -> None:
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"must be a positive finite number"):
            Residual(scale=scale)
    Residual(scale=1e-9)
    with pytest.raises(ValueError, match="depends on the dimension"):
        Residual(StudentT(3.0, exponent="multivariate"))
    for shape in ((2,), (2, 4), (3, 3)):
        with pytest.raises(ValueError, match="a mask"):
            Targets(torch.zeros(2, 3, 4), torch.ones(shape).bool())
