"""The collapsed target of mixture weights, its climbs and proposals, by hand and by automatic differentiation."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from inference.evidence.mixture_weights import (
    Proposal,
    WeightTarget,
    _best_weights,
    _newton_step,
    _searched,
    climb,
    mixture_log_weights,
    per_module,
    starts,
    weight_target,
)
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Expert,
    Gaussian,
    Identity,
    Posterior,
    ProductOfExperts,
    StudentT,
)
from tests.helpers import assert_close, random_updates
from tests.levels import Z
from tests.seeds import seeded

MODULE = import_module("inference.evidence.mixture_weights")
ETA, T, SCALE = 0.4, 0.5, 1.5


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def posterior_of(generator: torch.Generator, modules: int = 2) -> Posterior:
    """Student-t with power 2 / T, Gaussian with power 1 / T, Cauchy with power 0.5 / T; zero centre."""
    energies = (StudentT(3.0, 2.5), Gaussian(), Cauchy(4.0))
    experts = tuple(
        Expert(name, Identity(), energy, Absolute(SCALE), importance)
        for name, energy, importance in zip("abc", energies, (2.0, 1.0, 0.5), strict=True)
    )
    poe = ProductOfExperts(experts, Anchor(None, AbsolutePrecision(ETA)), T)
    return poe.bind(random_updates(generator, modules, 3, 2, 3))


def by_hand(posterior: Posterior, u: Tensor) -> Tensor:
    """``log p(u)`` of the three experts above, ``(*S, M, 2)`` to ``(*S, M)``, in functions that torch differentiates.

    ``k log(1 + q / (nu s^2))`` to the power a / T has shape ``a k / T`` and unit ``nu s^2``; half of ``q / s^2`` has
    weight ``1 / (2 T s^2)``.
    """
    alpha = f64(2.0 * 2.5 / T, 0.5 * 4.0 / T)
    tau = u.exp()
    weights = [tau[..., 0] / (3.0 * SCALE**2), tau[..., 0] * 0 + 0.5 / T / SCALE**2, tau[..., 1] / SCALE**2]
    shift, size = ETA / T, math.prod(posterior.event_shape)
    total = shift + weights[0] + weights[1] + weights[2]
    updates = [expert.update for expert in posterior.experts]
    mean = sum(w[..., None, None] * update for w, update in zip(weights, updates, strict=True)) / total[..., None, None]
    least = shift * mean.square().sum((-2, -1))
    for w, update in zip(weights, updates, strict=True):
        least = least + w * (mean - update).square().sum((-2, -1))
    prior = (alpha * u - tau - torch.lgamma(alpha)).sum(-1)
    return prior - size / 2 * (total / shift).log() - least


def test_the_target_with_its_slopes_and_curvatures(generator: torch.Generator) -> None:
    posterior = posterior_of(generator)
    target = weight_target(posterior)
    assert target.free == (0, 2)
    u = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = by_hand(posterior, u)
    (slope,) = torch.autograd.grad(wanted.sum(), u, create_graph=True)
    rows = [torch.autograd.grad(slope[..., i].sum(), u, retain_graph=True)[0] for i in range(2)]
    at = u.detach()
    assert_close(target.log_density(at), wanted.detach())
    value, found = target.log_density_and_slope(at)
    assert_close(value, wanted.detach())
    assert_close(found, slope.detach(), 1e-9)
    assert_close(target.hessian(at), torch.stack(rows, -2), 1e-4)  # by differences of 1e-5
    assert torch.equal(target.hessian(at), target.hessian(at).mT)


def test_beyond_all_numbers_there_is_no_density(generator: torch.Generator) -> None:
    target = weight_target(posterior_of(generator))
    u = torch.zeros(3, 2, 2, dtype=torch.float64)
    u[1, 0, 1] = 800.0  # exp(800) is infinite
    found = target.log_density(u)
    assert found.isfinite().tolist() == [[True, True], [False, True], [True, True]]
    assert float(found[1, 0]) == -math.inf
    assert_close(found[0], found[2])
    assert_close(found[1, 1], found[0, 1])


def test_evaluations_hold_no_more_than_they_may(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    target = weight_target(posterior_of(generator))
    u = torch.randn(10, 2, 2, generator=generator, dtype=torch.float64)
    whole = target.log_density(u)
    monkeypatch.setattr(MODULE, "CHUNK", 4 * 2 * target.integral.size)  # two modules: four sets of weights
    sizes: list[int] = []
    value = type(target.integral).value

    def noted(self: Any, weights: Tensor) -> Tensor:
        sizes.append(len(weights))
        return value(self, weights)

    monkeypatch.setattr(type(target.integral), "value", noted)
    assert_close(target.log_density(u), whole)
    assert sizes == [4, 4, 2]


def test_the_best_weights_of_residuals(generator: torch.Generator) -> None:
    target = weight_target(posterior_of(generator))
    q = f64([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    wanted = f64(
        [[10 / (1 + 1 / 6.75), 4 / (1 + 3 / 2.25)], [10 / (1 + 4 / 6.75), 4 / (1 + 6 / 2.25)]],
    ).log()
    assert_close(_best_weights(target, q.squeeze(0).unsqueeze(0)), wanted)


def test_starts_that_have_met_are_one(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further apart than 0.1 in any weight of any module."""
    posterior = posterior_of(generator)
    target = weight_target(posterior)
    assert starts(target, posterior).shape[1:] == (2, 2)
    points = torch.zeros(6, 2, 2, dtype=torch.float64)
    points[1, 1, 0] = 0.0999
    points[2, 1, 1] = 0.1001
    points[3, 0, 0] = -0.0999
    points[4, 0, 0] = -0.1001
    points[5] = points[2] - 0.0999
    monkeypatch.setattr(MODULE, "_best_weights", lambda target, residuals: points)
    assert torch.equal(starts(target, posterior), points[[0, 2, 4]])


def test_climbs_start_at_the_centre_the_updates_and_the_twins_merge(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = posterior_of(generator)
    target = weight_target(posterior)
    seen: list[Tensor] = []

    def noted(target: WeightTarget, residuals: Tensor) -> Tensor:
        seen.append(residuals)
        return _best_weights(target, residuals)

    monkeypatch.setattr(MODULE, "_best_weights", noted)
    starts(target, posterior)
    assert [len(q) for q in seen] == [5] * 5  # first, and four steps of expectation maximisation
    zero = torch.zeros(2, 2, 3, dtype=torch.float64)
    for q, z in zip(seen[0][:4], (zero, *(e.update for e in posterior.experts)), strict=True):
        assert_close(q, posterior.residuals(z))
    # Twins have the weight at a zero residual, rho'(0) a / (T s^2): the shape over the unit.
    twins = f64([10 / 6.75, 1 / 2.25, 4 / 2.25], [10 / 6.75, 1 / 2.25, 4 / 2.25])
    assert_close(seen[0][4], -target.integral.value_and_slope(twins)[1])
    first = target.weights(_best_weights(target, seen[0]))
    assert_close(seen[1], -target.integral.value_and_slope(first)[1])


def quadratic(curvature: float, log: list[Tensor] | None = None) -> Any:
    """A target whose log density is ``-c |u|^2 / 2``."""

    def hessian(u: Tensor) -> Tensor:
        if log is not None:
            log.append(u)
        return -curvature * torch.eye(u.shape[-1], dtype=u.dtype).expand(*u.shape, -1)

    def log_density(u: Tensor) -> Tensor:
        return -curvature / 2 * u.square().sum(-1)

    return SimpleNamespace(
        log_density=log_density, log_density_and_slope=lambda u: (log_density(u), -curvature * u), hessian=hessian
    )


def test_a_climb_ends_where_a_step_promises_less_than_a_millionth_of_a_nat() -> None:
    for nats, moved in ((0.9e-6, False), (1.1e-6, True)):
        for sign in (1, -1):
            start = f64([[sign * math.sqrt(2 * nats / 3.0)]])
            assert (float(climb(quadratic(3.0), start).abs()) < 1e-12) is moved


def test_weights_of_one_module_promise_together_and_modules_apart() -> None:
    one = math.sqrt(2 * 0.6e-6 / 3.0)
    for start, moved in ((f64([[one], [one]]), False), (f64([[one, one]]), True)):
        found = climb(quadratic(3.0), start)
        assert bool((found.abs() < 1e-12).all()) is moved
        assert torch.equal(found, start) is not moved


def test_steps_are_cut_to_two() -> None:
    log: list[Tensor] = []
    found = climb(quadratic(0.5, log), f64([[3.0, 4.0]]))  # 5 from the maximum: at 3, 1 and there
    assert_close(torch.stack(log).norm(dim=-1).flatten(), f64(5.0, 3.0, 1.0, 0.0))
    assert float(found.norm()) < 1e-12


def test_a_climb_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Tensor] = []
    monkeypatch.setattr(MODULE, "MOST_STEPS", 4)
    found = climb(quadratic(0.5, log), f64([[100.0]]))
    assert len(log) == 4
    assert_close(found, f64([[92.0]]))


def test_newton_steps_go_up_whatever_the_curvature() -> None:
    """Along ``(1, 1)`` the curvature is -4, along ``(1, -1)`` it is +2: both steps follow the slope."""
    hessian = f64([-1.0, -3.0], [-3.0, -1.0])
    assert_close(_newton_step(f64(1.0, 1.0), hessian), f64(0.25, 0.25))
    assert_close(_newton_step(f64(1.0, -1.0), hessian), f64(0.5, -0.5))
    assert_close(_newton_step(f64(100.0, -100.0), hessian), f64(2**0.5, -(2**0.5)))


def test_newton_steps_solve_with_the_hessian(generator: torch.Generator) -> None:
    root = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    hessian = -(root @ root.mT) - 3 * torch.eye(3, dtype=torch.float64)
    slope = 0.1 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
    wanted = -torch.linalg.solve(hessian, slope.unsqueeze(-1)).squeeze(-1)
    assert_close(_newton_step(slope, hessian), wanted)


def test_the_first_shorter_step_that_does_not_lower_is_taken() -> None:
    """Two modules of one number at 1: ``-|u|`` is lower at -3 and as high at -1; the other needs no shortening."""
    target: Any = SimpleNamespace(log_density=lambda u: -u.abs().squeeze(-1))
    u, step = f64([[1.0], [1.0]]), f64([[-4.0], [-1.5]])
    assert_close(_searched(target, u, step, f64([-1.0, -1.0])), f64([[-1.0], [-0.5]]))
    peak: Any = SimpleNamespace(log_density=lambda u: -u.abs().sqrt().squeeze(-1))
    assert torch.equal(
        _searched(peak, f64([[0.0], [1.0]]), f64([[4.0], [-0.5]]), f64([0.0, -1.0])), f64([[0.0], [0.5]])
    )


def test_rounding_of_a_large_value_is_no_descent() -> None:
    """The margin is 1e-13 of the value: 1e-7 nats of a million."""
    for drop, taken in ((0.6e-7, True), (1.7e-7, False)):
        target: Any = SimpleNamespace(log_density=lambda u, drop=drop: -1e6 - drop * (u.squeeze(-1) != 0).double())
        found = _searched(target, f64([[0.0]]), f64([[1.0]]), f64([-1e6]))
        assert float(found) == (1.0 if taken else 0.0)


def proposal() -> Proposal:
    """Two components of two modules; curvatures 4 and 0.01 (cut to 0.1) around the first point, -9 at the second."""
    curvatures = f64([[4.0, 0.01], [1.0, 1.0]], [[-9.0, 25.0], [1.0, 16.0]])
    target: Any = SimpleNamespace(hessian=lambda points: -torch.diag_embed(curvatures))
    return Proposal.at(target, f64([[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [-1.0, -2.0]]))


SPREADS = f64([[0.5, 10**0.5], [1.0, 1.0]], [[1 / 3, 0.2], [1.0, 0.25]])


def test_proposals_have_the_densities_of_scipys_multivariate_t() -> None:
    found = proposal()
    assert found.df == 7.0  # five, and one for each weight
    assert_close(found.whitening @ found.coloring, torch.eye(2).double().expand(2, 2, 2, 2))
    u = torch.randn(6, 2, 2, generator=seeded(0), dtype=torch.float64)
    for m in range(2):
        parts = [
            scipy.stats.multivariate_t(found.location[k, m].numpy(), np.diag(SPREADS[k, m].numpy() ** 2), df=7)
            for k in range(2)
        ]
        wanted = np.log(np.mean([part.pdf(u[:, m].numpy()) for part in parts], 0))
        assert_close(found.log_density(u)[:, m], torch.from_numpy(wanted))


def test_a_proposal_counts_weights_and_not_modules() -> None:
    target: Any = SimpleNamespace(hessian=lambda points: -torch.eye(2).double().expand(*points.shape, 2))
    assert Proposal.at(target, torch.zeros(1, 3, 2, dtype=torch.float64)).df == 7.0


def test_gaussian_experts_alone_have_no_free_weights(generator: torch.Generator) -> None:
    anchor = Anchor(None, AbsolutePrecision(ETA))
    poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(2.0), Absolute(SCALE), anchor=anchor, temperature=T)
    posterior = poe.bind(random_updates(generator, 3, 2, 2, 3))
    target = weight_target(posterior)
    assert target.free == ()
    assert target.shape.shape == target.unit.shape == (3, 0)
    assert_close(target.fixed, torch.full((3, 2), 1 / T / SCALE**2, dtype=torch.float64))
    exact = target.integral.value(target.fixed)
    assert torch.equal(mixture_log_weights(posterior, 40, seeded(0)), exact.unsqueeze(0))


def test_draws_come_from_the_components_in_turns() -> None:
    found = proposal()
    draws = found.sample(4001, seeded(1))
    assert draws.shape == (4001, 2, 2)
    for k in range(2):
        scaled = (draws[k::2] - found.location[k]) / SPREADS[k]
        assert len(scaled) == (2001, 2000)[k]
        # A t(7) has variance 7/5 and kurtosis 5: the error of its variance is 7/5 sqrt((5 - 1) / n).
        assert float((scaled.mean(0)).abs().max()) < Z * math.sqrt(1.4 / 2000)
        assert float((scaled.square().mean(0) - 1.4).abs().max()) < Z * 1.4 * math.sqrt(4 / 2000)
        assert float((scaled[..., 0] * scaled[..., 1]).mean(0).abs().max()) < Z * 1.4 * math.sqrt(1.7 / 2000)


def test_samples_are_drawn_again_with_one_more_component_at_the_largest_weight(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = posterior_of(generator)
    found: list[Proposal] = []
    drawn: list[Tensor] = []
    sample = Proposal.sample

    def noted(self: Proposal, num_samples: int, generator: torch.Generator) -> Tensor:
        found.append(self)
        drawn.append(sample(self, num_samples, generator))
        return drawn[-1]

    monkeypatch.setattr(Proposal, "sample", noted)
    for good_at, rounds in ((1, 1), (3, 3), (99, 8)):
        found.clear()
        drawn.clear()
        flags = iter(range(1, 100))
        monkeypatch.setattr(
            MODULE, "importance_mean", lambda _, f=flags, at=good_at: SimpleNamespace(good=next(f) >= at)
        )
        log_weights = mixture_log_weights(posterior, 40, seeded(2))
        assert len(found) == rounds
        target = weight_target(posterior)
        assert_close(log_weights, target.log_density(drawn[-1]) - found[-1].log_density(drawn[-1]))
        for before, after, u in zip(found, found[1:], drawn, strict=False):
            best = (target.log_density(u) - before.log_density(u)).argmax(0)
            assert len(after.location) == len(before.location) + 1
            assert torch.equal(after.location[-1], torch.stack([u[int(best[m]), m] for m in range(2)]))


def test_settings_of_every_module(generator: torch.Generator) -> None:
    posterior = posterior_of(generator)
    assert per_module(3.0, posterior).tolist() == [3.0, 3.0]
    assert per_module(f64(1.0, 2.0), posterior).tolist() == [1.0, 2.0]
    assert per_module(2, posterior).dtype == torch.float64
