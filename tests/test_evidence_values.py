"""Evidence's records and its importance sampling at values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.evidence.estimate import (
    Evidence,
    LeaveOneExpertOut,
    UntrustedEvidence,
    _homogeneous,
    _require_trusted,
    leave_one_expert_out,
    log_evidence,
)
from inference.evidence.importance import (
    FEWEST_EFFECTIVE,
    GOOD_K,
    GOOD_SHARE,
    LARGEST_PARETO_K,
    importance_mean,
    pareto_k,
    trusted,
)
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    Gaussian,
    Huber,
    InputGram,
    Posterior,
    ProductOfExperts,
    StudentT,
)
from tests.helpers import assert_close, random_updates
from tests.seeds import seeded


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evidence(value: Tensor, error: Tensor, effective: float = math.inf, tail: float = -math.inf) -> Evidence:
    like = torch.ones_like(value)
    return Evidence(value, error, torch.ones(len(value), 2), effective * like, tail * like)


def posterior_of(updates: Tensor, *energies: Energy) -> Posterior:
    anchor = Anchor(precision=AbsolutePrecision(0.5))
    poe = ProductOfExperts.of(
        [str(i) for i in range(updates.shape[1])], InputGram(), energies[0], Absolute(2.0), anchor=anchor
    )
    experts = tuple(replace(e, energy=energies[i % len(energies)]) for i, e in enumerate(poe.experts))
    return replace(poe, experts=experts).bind(updates)


def test_modules_are_independent_their_errors_add_as_squares() -> None:
    found = evidence(f64(-3.0, 5.0), f64(3.0, 4.0))
    assert (found.total, found.total_error) == (2.0, 5.0)
    assert found.trusted.tolist() == [True, True]


def test_leaving_out_is_a_difference_of_two_estimates() -> None:
    whole, first, second = evidence(f64(-5.0), f64(3.0)), evidence(f64(-2.0), f64(4.0)), evidence(f64(-9.0), f64(0.0))
    found = LeaveOneExpertOut(("a", "b"), whole, (first, second))
    assert found.value.tolist() == [[-3.0, 4.0]]
    assert found.standard_error.tolist() == [[5.0, 3.0]]


def test_a_single_expert_left_out_leaves_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 1, 2, 3)
    posterior = posterior_of(updates, Gaussian())
    found = leave_one_expert_out(posterior, generator=generator)
    assert_close(found.value[:, 0], log_evidence(posterior, generator=generator).value)
    assert found.standard_error.tolist() == [[0.0], [0.0]]


def test_runs_of_modules_hold_all_their_experts(generator: torch.Generator) -> None:
    updates = random_updates(generator, 6, 2, 2, 3)
    updates[2, 1] = 0.0
    updates[4] = 0.0
    parts = list(_homogeneous(posterior_of(updates, Gaussian()), 100))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 2), (2, 3), (3, 4), (5, 6)]
    assert [len(p.experts) for _, p in parts] == [2, 1, 2, 2]
    for modules, part in parts:
        assert part.num_modules == modules.stop - modules.start
        assert_close(part.experts[0].update, updates[modules, 0])
        assert part.event_shape == (2, 3)


def test_what_cannot_be_trusted_says_how_bad_it_is_and_what_helps(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    bad = Evidence(f64(0.0, 0.0), f64(0.0, 0.0), torch.ones(2, 2), f64(500.0, 30.0), f64(0.1, 0.2))
    for energies, helped in (((Cauchy(9.0), StudentT(3.0, 9.0)), False), ((Cauchy(9.0), Huber(1.0)), True)):
        with pytest.raises(UntrustedEvidence, match=r"module 1 of the batch: 30 of 700 .* Pareto k of 0\.20") as caught:
            _require_trusted(bad, posterior_of(updates, *energies), 700)
        assert ("use an energy that is a Gaussian scale mixture, which '1' has not" in str(caught.value)) is helped
        assert caught.value.evidence is bad
    _require_trusted(evidence(f64(0.0), f64(0.0)), posterior_of(updates, Cauchy(9.0)), 700)


def test_mixtures_are_known_by_name(generator: torch.Generator) -> None:
    experts = posterior_of(random_updates(generator, 1, 3, 2, 3), Gaussian(), Cauchy(9.0), Huber(1.0)).experts
    assert [expert.rho.is_mixture for expert in experts] == [True, True, False]


def test_means_of_importance_weights_by_hand() -> None:
    """Weights 1, 1, 2, 4 and equal ones: mean 2, squares 22, standard deviation sqrt 2."""
    weights = f64([1.0, 3.0], [1.0, 3.0], [2.0, 3.0], [4.0, 3.0])
    found = importance_mean(weights.log())
    assert_close(found.value, f64(2.0, 3.0).log())
    assert_close(found.standard_error, f64(math.sqrt(2) / 2 / 2, 0.0))
    assert_close(found.effective_samples, f64(64 / 22, 4.0))
    assert found.count == 4
    shifted = importance_mean(weights.log() - 900.0)
    assert_close(shifted.value, f64(2.0, 3.0).log() - 900.0)
    assert_close(shifted.effective_samples, found.effective_samples)


def test_trust_ends_where_it_says() -> None:
    k, n = LARGEST_PARETO_K, FEWEST_EFFECTIVE
    found = trusted(f64(k, k + 1e-9, k), f64(n, n, n - 1e-6))
    assert found.tolist() == [True, False, False]
    mean = importance_mean(torch.zeros(400, 1, dtype=torch.float64))
    cases = [(GOOD_K - 0.01, GOOD_SHARE * 400 + 1, True), (GOOD_K, GOOD_SHARE * 400 + 1, False)]
    cases += [(GOOD_K - 0.01, GOOD_SHARE * 400, False)]
    for shape, effective, good in cases:
        assert replace(mean, pareto_k=f64(shape), effective_samples=f64(effective)).good is good
    both = replace(mean, pareto_k=f64(0.0, 9.0), effective_samples=f64(400.0, 400.0))
    assert not both.good


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.0])
def test_pareto_shapes_of_exact_quantiles(shape: float) -> None:
    """Weights at the quantiles of a generalised Pareto: the fit is within the weak prior's pull of the truth."""
    uniform = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    weights = 1 + ((1 - uniform) ** -shape - 1) / shape
    order = torch.randperm(40_000, generator=seeded(0))
    found = pareto_k(weights.log()[order].unsqueeze(-1) + 300.0)
    # The prior is ten observations of 1/2 among 600; the standard error of the fit is (1 + k) / sqrt(600).
    assert float(found) == pytest.approx((600 * shape + 5) / 610, abs=0.05)


def test_tails_that_are_none() -> None:
    assert float(pareto_k(torch.zeros(100, 1, dtype=torch.float64))) == -math.inf
    assert float(pareto_k(torch.randn(10, 1, dtype=torch.float64))) == math.inf  # too few to say


def test_weights_may_lie_thousands_of_nats_apart() -> None:
    spread = torch.linspace(-3000.0, 0.0, 1000, dtype=torch.float64).unsqueeze(-1)
    assert bool(pareto_k(spread).isfinite())
    assert bool(importance_mean(spread).effective_samples.isfinite())
