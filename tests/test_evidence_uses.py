"""What the evidence is for: scales, families, experts left out, estimates that cannot be trusted; bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from inference.evidence.estimate import (
    UntrustedEvidence,
    dimensions,
    leave_one_expert_out,
    log_evidence,
    log_normalizers,
)
from inference.evidence.importance import pareto_k
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Directional,
    Energy,
    Expert,
    FactorExpert,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    Welsch,
    span_statistics,
)
from poe_models.posterior import Posterior
from tests.evidences import NAMES, SKEWED, Z, closed_form, design, grid_evidence, plain, simulate
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seeded


@pytest.mark.parametrize("size", [4, 64, 1024])
def test_the_best_scale_is_the_true_one(size: int) -> None:
    # Where Span evidence prefers sqrt(3 D) / 4, 28 at D = 1024. The maximum has a standard error of about
    # gamma / sqrt(2 M (N - 1) D); the grid's step is added.
    for seed in range(3):
        generator = seeded(seed)
        updates = simulate(20, 4, size, math.inf, generator)
        scales = np.exp(np.linspace(-0.5, 0.5, 41))
        totals = [
            log_evidence(plain(list("abcd"), Gaussian(), s).bind(updates), generator=generator).total for s in scales
        ]
        best = math.log(scales[int(np.argmax(totals))])
        assert abs(best) < Z / math.sqrt(2 * 20 * 3 * size) + 0.025


@pytest.mark.parametrize("nu", [3.0, 10.0, math.inf])
def test_the_true_family_wins_in_many_dimensions(nu: float) -> None:
    families: dict[float, Energy] = {
        3.0: StudentT(3.0, "multivariate"),
        10.0: StudentT(10.0, "multivariate"),
        math.inf: Gaussian(),
    }
    for seed in range(3):
        generator = seeded(seed)
        updates = simulate(40, 4, 1024, nu, generator)
        best = {}
        for name, energy in families.items():
            totals = [
                log_evidence(plain(list("abcd"), energy, s).bind(updates), generator=generator, samples=200)
                for s in ((0.8, 0.9, 1.0, 1.1, 1.25) if math.isfinite(name) else (0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8))
            ]
            best[name] = max(totals, key=lambda each: each.total)
        won = max(best, key=lambda name: best[name].total)
        others = [best[nu].total - each.total for name, each in best.items() if name != nu]
        assert won == nu
        assert min(others) > 5, others


def test_normalised_scales_have_a_best_and_bare_ones_do_not(generator: torch.Generator) -> None:
    updates = simulate(30, 3, 4, math.inf, generator)
    normalised, bare = [], []
    scales = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    for scale in scales:
        posterior = plain(NAMES, Gaussian(), scale).bind(updates)
        value = log_evidence(posterior, generator=generator)
        normalised.append(value.total)
        bare.append(value.total + float(log_normalizers(posterior).sum()))
    assert scales[int(np.argmax(normalised))] == 1.0
    assert bool((np.diff(bare) > 0).all())


def test_a_gaussian_expert_is_predicted_as_a_conditional_normal(generator: torch.Generator) -> None:
    updates = simulate(2, 3, 3, math.inf, generator)
    posterior = plain(NAMES, Gaussian(), 0.7).bind(updates)
    found = leave_one_expert_out(posterior, generator=generator)
    # U_i given the others: mean V sum_j U_j / s^2, variance V + s^2, V = 1 / (1 + 2 / s^2).
    variance = 1 / (1 + 2 / 0.49)
    for i in range(3):
        mean = variance * (updates.sum(1) - updates[:, i]) / 0.49
        expected = torch.distributions.Normal(mean, math.sqrt(variance + 0.49)).log_prob(updates[:, i]).sum((-2, -1))
        assert_close(found.value[:, i], expected, 1e-10)
    assert float(found.standard_error.max()) == 0
    assert found.updates == ("a", "b", "c")


def test_leaving_out_keeps_operators_scales_and_anchor(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 2)
    poe = ProductOfExperts.of(NAMES, (InputGram(), OutputGram()), Gaussian(), Relative(0.8))
    posterior = poe.bind(updates)
    found = leave_one_expert_out(posterior, generator=generator)
    rest = replace(posterior, experts=tuple(e for e in posterior.experts if e.update_name != "b"))
    assert_close(found.value[:, 1], closed_form(posterior) - closed_form(rest), 1e-8)
    alone = ProductOfExperts.of(["a"], InputGram(), Gaussian()).bind(updates[:, :1])
    only = leave_one_expert_out(alone, generator=generator)
    assert_close(only.value[:, 0], closed_form(alone), 1e-9)


def test_a_student_expert_is_predicted_with_an_error(generator: torch.Generator) -> None:
    posterior = design(StudentT(4.0, "multivariate")).bind(SKEWED)
    found = leave_one_expert_out(posterior, generator=generator, samples=3000)
    for i in range(3):
        rest = replace(posterior, experts=tuple(e for j, e in enumerate(posterior.experts) if j != i))
        truth = grid_evidence(posterior) - grid_evidence(rest)
        assert 0 < float(found.standard_error[0, i]) < 0.05
        assert abs(float(found.value[0, i]) - truth) < Z * float(found.standard_error[0, i])


def test_pareto_shapes_of_known_tails(generator: torch.Generator) -> None:
    tail = 3 * math.sqrt(20_000)  # draws that the shape is fitted to, with the standard error (1 + k) / sqrt(tail)
    for shape in (0.3, 0.8, 1.5):
        uniform = torch.rand(20_000, 8, generator=generator, dtype=torch.float64)
        found = pareto_k(-shape * uniform.log())  # weights u^-k have a Pareto tail of shape k
        assert float((found - shape).abs().max()) < 5 * (1 + shape) / math.sqrt(tail)
    assert float(pareto_k(torch.zeros(1000, 1, dtype=torch.float64))) == -math.inf


def test_an_estimate_that_cannot_be_trusted_is_refused_and_carries_its_number(generator: torch.Generator) -> None:
    # Heavy tails in many dimensions without the help of their mixture.
    heavy = StudentT(3.0, "multivariate")

    class Bare(Energy):
        rho = heavy.for_dimension(torch.tensor(512.0, dtype=torch.float64)).rho

        @override
        def log_normalizer(self, scale: object, dim: object, importance: float = 1.0) -> Tensor:
            return heavy.log_normalizer(scale, dim, importance)  # type: ignore[arg-type]

    updates = simulate(12, 4, 512, 1.0, generator)
    with pytest.raises(UntrustedEvidence, match=r"module \d of the batch: \d+ of 1000.*which 'a' has not") as caught:
        log_evidence(plain(list("abcd"), Bare()).bind(updates), generator=generator)
    assert bool(caught.value.evidence.value.isfinite().all())
    assert not bool(caught.value.evidence.trusted.all())


def test_single_precision_loses_nothing(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 8, 6).float()
    poe = ProductOfExperts.of(NAMES, OutputGram(), Gaussian(), Relative(0.5))
    single, double = poe.bind(updates), poe.bind(updates.double())
    values = [log_evidence(each, generator=generator).value for each in (single, double)]
    assert_close(values[0], values[1], 1e-5)


def calls(posterior: Posterior, generator: torch.Generator) -> list[Callable[[], object]]:
    return [
        lambda: log_evidence(posterior, generator=generator),
        lambda: leave_one_expert_out(posterior, generator=generator),
    ]


@pytest.mark.parametrize("energy", [Welsch(), Cauchy(), StudentT(3.0), Custom(torch.sqrt)], ids=name_of)
def test_unnormalised_experts_are_refused_by_name(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 3, 4)
    posterior = ProductOfExperts.of(NAMES, InputGram(), energy, Relative(1.0)).bind(updates)
    for call in calls(posterior, generator):
        with pytest.raises(ValueError, match=f"(?s)'a' is not a density.*{type(energy).__name__}"):
            call()


def test_a_missing_anchor_is_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 2, 2)
    poe = ProductOfExperts.of(
        NAMES, Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    for call in calls(poe.bind(updates), generator):
        with pytest.raises(ValueError, match="eta = 0.*flat prior has no normaliser"):
            call()


def test_span_coordinates_are_refused_with_the_reason(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0))
    posterior = poe.bind(span_statistics(poe, updates))
    for call in calls(posterior, generator):
        with pytest.raises(ValueError, match="Span coordinates.*made of the updates.*bind"):
            call()


def test_other_bad_input_is_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 3)
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0))
    posterior = poe.bind(updates)
    with pytest.raises(ValueError, match="fewer than 50 effective samples.*at least 100"):
        log_evidence(posterior, generator=generator, samples=99)
    weak = ProductOfExperts.of(
            NAMES, (InputGram(), OutputGram(), Identity()), Gaussian(), Absolute(1.0),
            anchor=Anchor(precision=AbsolutePrecision(1.0)),
        ).bind(updates)  # fmt: skip
    assert dimensions(weak).shape == (2, 9)
    mixed = Expert("a", Directional()) * Expert("b", Identity()) * Expert("c", Identity())
    gaussian = replace(mixed, experts=tuple(replace(e, energy=Gaussian()) for e in mixed.experts))
    with pytest.raises(ValueError, match="Directional and Identity.*one kind per module"):
        log_evidence(gaussian.bind(updates), generator=generator)
    factor = poe * FactorExpert("extra", lambda c: c.sum(-1), "span")
    bound = factor.bind(span_statistics(factor, updates))
    with pytest.raises(ValueError, match="'extra' is a FactorExpert"):
        log_normalizers(replace(bound, span=None))
