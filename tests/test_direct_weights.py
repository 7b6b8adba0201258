"""Importance sampling of merged updates part by part: proposals, targets and typical weights against dense matrices."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from inference.evidence.direct_weights import (
    _Component,
    _component_at,
    _components,
    _log_target,
    _sampled,
    direct_log_weights,
    typical_weights,
)
from inference.evidence.gaussian_integrals import gaussian_integral
from inference.evidence.importance import importance_mean
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Energy,
    Gaussian,
    Huber,
    Identity,
    InputGram,
    Posterior,
    ProductOfExperts,
    ResidualMap,
    StudentT,
)
from poe_models.least_squares import quadratic_of
from poe_models.methods import TaskArithmetic
from tests.helpers import assert_close, random_updates
from tests.levels import Z
from tests.seeds import seeded

ETA, T = 0.4, 0.5


def posterior_of(updates: Tensor, energy: Energy, residual_map: ResidualMap | None = None) -> Posterior:
    anchor = Anchor(TaskArithmetic(0.2), AbsolutePrecision(ETA))
    names = [str(i) for i in range(updates.shape[1])]
    return ProductOfExperts.of(
        names, residual_map or Identity(), energy, Absolute(1.5), anchor=anchor, temperature=T
    ).bind(updates)


def components_of(posterior: Posterior) -> list[_Component]:
    return _components(posterior, gaussian_integral(posterior))


def expected_residuals(posterior: Posterior, weights: Tensor) -> Tensor:
    """``E[q_i]`` under ``prod_i exp(-w_i q_i)`` times the anchor, of Identity experts: by hand."""
    assert posterior.center is not None
    total = weights.sum(-1)[:, None, None] + ETA / T
    mean = ETA / T * posterior.center + sum(
        weights[:, i, None, None] * e.update for i, e in enumerate(posterior.experts)
    )
    mean = mean / total
    size = math.prod(posterior.event_shape)
    squares = [(mean - e.update).square().sum((-2, -1)) + size / 2 / total[:, 0, 0] for e in posterior.experts]
    return torch.stack(squares, -1)


def test_typical_weights_are_those_of_mean_residuals_under_themselves(generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 2, 3, 3, 4), Huber(0.8))
    assert posterior.center is not None
    start = torch.stack([posterior.residuals(posterior.center), posterior.residuals(posterior.experts[1].update)])
    found = typical_weights(posterior, gaussian_integral(posterior), start)
    assert found.shape == (2, 2, 3)
    for one in found:
        q = expected_residuals(posterior, one)
        # Huber: rho'(x) is 1/2 up to delta^2, then delta / (2 sqrt x).
        x = q / 1.5**2
        wanted = torch.where(x <= 0.64, 0.5, 0.4 / x.sqrt()) / 1.5**2 / T
        assert_close(one, wanted, 1e-9)
    # The damped step, by hand, from one start: a geometric mean of the old and the new weight.
    module = import_module("inference.evidence.direct_weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 1)
        once = typical_weights(posterior, gaussian_integral(posterior), start)[0]
    first = posterior.weights(start[0]) / T
    assert_close(once, (first * posterior.weights(expected_residuals(posterior, first)) / T).sqrt())


def test_proposals_are_normal_about_the_minimum(generator: torch.Generator) -> None:
    """Every proposal minimises its own weighted squares, and its density is that of a dense covariance."""
    posterior = posterior_of(random_updates(generator, 2, 2, 3, 3), Huber(0.8), InputGram())
    assert posterior.center is not None
    found = components_of(posterior)
    assert len(found) == 3 + 3  # from the centre and two updates; and three wider ones
    typical = typical_weights(posterior, gaussian_integral(posterior), posterior.residuals(posterior.center))
    x = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    for component, share in ((found[0], 1.0), (found[3], 0.5), (found[4], 0.25), (found[5], 0.0)):
        for m in range(2):
            side = ETA / T * torch.eye(3, dtype=torch.float64)
            pull = torch.zeros(3, 3, dtype=torch.float64)
            for i, expert in enumerate(posterior.experts):
                gram = expert.update[m].mT @ expert.update[m]
                side = side + share * typical[m, i] * gram
                pull = pull + share * typical[m, i] * (expert.update[m] - posterior.center[m]) @ gram
            mean = pull @ torch.linalg.inv(side)
            assert_close(component.mean[m], mean, 1e-9)
            dense = MultivariateNormal(mean.flatten(), precision_matrix=2 * torch.kron(torch.eye(3).double(), side))
            assert_close(component.log_density(x)[:, m], dense.log_prob(x[:, m].flatten(1)), 1e-9)
    assert_close(found[5].mean, torch.zeros_like(found[5].mean))


def test_draws_of_a_proposal_have_its_density(generator: torch.Generator) -> None:
    """Squared Mahalanobis distances are chi-square of four degrees: mean 4, variance 8."""
    component = components_of(posterior_of(random_updates(generator, 1, 2, 2, 2), Huber(0.8), InputGram()))[0]
    x = component.sample(4000, seeded(3))
    assert x.shape == (4000, 1, 2, 2)
    peak = component.log_density(component.mean.unsqueeze(0))
    distance = 2 * (peak - component.log_density(x))
    assert abs(float(distance.mean()) - 4) < Z * math.sqrt(8 / 4000)
    scaled = (x - component.mean).mean(0) / x.std(0)
    assert float(scaled.abs().max()) < Z / math.sqrt(4000)


def test_the_target_is_the_anchors_density_less_the_energy(generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 2, 2, 3, 4), StudentT(3.0, 2.0))
    assert posterior.center is not None
    x = torch.randn(5, 2, 3, 4, generator=generator, dtype=torch.float64)
    anchor = Normal(torch.zeros_like(x), math.sqrt(T / (2 * ETA))).log_prob(x).sum((-2, -1))
    energies = posterior.energy(x + posterior.center) - ETA * x.square().sum((-2, -1))
    assert_close(_log_target(posterior, quadratic_of(posterior, for_draws=True), x), anchor - energies / T)


def test_samples_come_from_all_proposals_in_equal_shares(generator: torch.Generator) -> None:
    """Weights are over the mixture's density, each proposal has its share of them, and the best place is reported."""
    posterior = posterior_of(random_updates(generator, 2, 2, 2, 3), Huber(0.8))
    first, *_, last = components_of(posterior)
    drawn: list[Tensor] = []

    class Noted(_Component):
        def sample(self, count: int, generator: torch.Generator) -> Tensor:
            drawn.append(super().sample(count, generator))
            return drawn[-1]

    parts = [Noted(each.quadratic, each.precision, each.mean) for each in (first, last)]
    log_weights, best = _sampled(posterior, list(parts), 101, seeded(1))
    assert [len(x) for x in drawn] == [51, 50]
    x = torch.cat(drawn)
    mixture = torch.stack([each.log_density(x) for each in parts]).exp().mean(0).log()
    wanted = _log_target(posterior, parts[0].quadratic, x) - mixture
    assert_close(log_weights, wanted)
    for m in range(2):
        assert torch.equal(best[m], x[int(wanted[:, m].argmax()), m])


@pytest.mark.parametrize("held", [1, 10**9])
def test_what_is_held_at_a_time_changes_nothing(held: int, generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 2, 2, 2, 3), Huber(0.8))
    counts: list[int] = []
    parts = components_of(posterior)[:1]

    class Noted(_Component):
        def sample(self, count: int, generator: torch.Generator) -> Tensor:
            counts.append(count)
            return super().sample(count, generator)

    noted = [Noted(each.quadratic, each.precision, each.mean) for each in parts]
    module = import_module("inference.evidence.direct_weights")
    with pytest.MonkeyPatch.context() as patch:
        # Two modules of 2 x 3 entries, with the residuals of two experts and three more: 60 numbers a sample.
        patch.setattr(module, "CHUNK", 60 * 7 if held == 1 else held)
        log_weights, _ = _sampled(posterior, list(noted), 20, seeded(2))
    assert counts == ([7, 7, 6] if held == 1 else [20])
    assert log_weights.shape == (20, 2)


def test_a_proposal_at_a_point_has_the_weights_of_residuals_there(generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 1, 2, 2, 2), Huber(0.8))
    first = components_of(posterior)[0]
    point = torch.randn(1, 2, 2, generator=generator, dtype=torch.float64)
    found = _component_at(posterior, first, point)
    assert found.mean is point
    quadratic = first.quadratic
    q = quadratic.residuals(point) + quadratic.residuals(first.mean)
    total = float((posterior.weights(q) / T).sum()) + ETA / T  # Identity: one precision for every entry
    assert_close(found.precision.logdet(), torch.tensor([4 * math.log(total)], dtype=torch.float64))


def test_samples_are_drawn_again_only_where_they_are_bad(generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 1, 2, 2, 2), Huber(0.8))
    module = import_module("inference.evidence.direct_weights")
    rounds: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = _sampled

        def noted(posterior: Posterior, components: list[_Component], *rest: object) -> tuple[Tensor, Tensor]:
            rounds.append(len(components))
            return real(posterior, components, *rest)  # type: ignore[arg-type]

        patch.setattr(module, "_sampled", noted)
        for good_at, wanted in ((1, [6]), (3, [6, 7, 8]), (99, [6, 7, 8, 9, 10, 11, 12, 13])):  # eight times at most
            rounds.clear()
            patch.setattr(module, "importance_mean", lambda _, at=good_at: SimpleNamespace(good=len(rounds) >= at))
            direct_log_weights(posterior, 24, seeded(4))
            assert rounds == wanted


def test_gaussian_energies_have_their_exact_integral(generator: torch.Generator) -> None:
    posterior = posterior_of(random_updates(generator, 2, 2, 2, 3), Gaussian(2.0), InputGram())
    weights = torch.full((2, 2), 1 / 1.5**2 / T, dtype=torch.float64)  # rho' is 1
    found = importance_mean(direct_log_weights(posterior, 4000, seeded(5)))
    exact = gaussian_integral(posterior).value(weights)
    assert bool(((found.value - exact).abs() < Z * found.standard_error).all())
