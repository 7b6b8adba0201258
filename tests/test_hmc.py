from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inference._adaptation import Adaptation, StepSize, Tuning, chees_gradient
from inference._leapfrog import HMCInfo, HMCState, init, leapfrog, step, van_der_corput
from inference._starts import overdispersed_starts
from inference._target import Density, Target
from inference.gibbs import gibbs_posterior
from inference.hmc import hmc
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Energy,
    FactorExpert,
    Gaussian,
    InputGram,
    OutputGram,
    Posterior,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    StudentT,
    Welsch,
    average,
    full_posterior,
    log_density,
    span_posterior,
    span_statistics,
)
from poe_models.program import log_constant
from poe_models.span import concatenate, span_basis
from tests.helpers import ENERGIES, MAPS, assert_close, name_of, random_updates
from tests.sampling import DoesNotMix, IsBiased, assert_same_mean, gaussian_means, grid_means
from tests.seeds import seeded

SKEWED = ProductOfExperts.of(
    ["a", "b"],
    InputGram(),
    Cauchy(),
    Relative(0.3),
    [1.0, 2.0],
    Anchor(precision=RelativePrecision(0.05)),
    temperature=0.5,
)
"""Two experts that disagree: skewness 1.5 and kurtosis 6 along one coordinate."""


def span_of(poe: ProductOfExperts, updates: Tensor) -> Posterior:
    return span_posterior(poe, span_statistics(poe, updates))[0]


def value_and_gradient(function: Callable[[Tensor], Tensor]) -> Density:
    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_(True)
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return density


# The density that is sampled


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
def test_target_is_the_programs_log_density(residual_map: object, energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 3, 4)
    poe = ProductOfExperts.of(list("abc"), residual_map, energy, Relative(0.8), anchor=Anchor(average), temperature=0.7)  # type: ignore[arg-type]
    for posterior in (full_posterior(poe, updates), span_of(poe, updates)):
        z = torch.randn(5, 2, *posterior.event_shape, generator=generator, dtype=torch.float64)
        target = Target(posterior)
        value, gradient = target(target.states(z))
        by_program = value_and_gradient(log_density(posterior))(z)
        assert_close(value + log_constant(posterior), by_program[0], 1e-12)
        assert_close(target.latents(gradient), by_program[1], 1e-9)


def test_target_is_the_programs_log_density_with_factor_experts(generator: torch.Generator) -> None:
    updates = [random_updates(generator, 1, 2, 3, 6), random_updates(generator, 1, 2, 5, 2)]
    on_update = FactorExpert("l1", lambda z: z.abs().sum((-2, -1)))
    on_span = FactorExpert("ridge", lambda c: c.square().sum(-1), coordinates="span")
    on_model = FactorExpert("sum", lambda zs: sum(z.sum((-2, -1)) for z in zs.values()).square(), scope="model")
    for factors in ((on_update, on_span), (on_update, on_span, on_model), (on_model,)):
        poe = ProductOfExperts.of(["a", "b"], energy=StudentT(3.0), temperature=0.6)
        for factor in factors:
            poe = poe * factor
        bases = [span_basis(poe, each)[0] for each in updates]
        posterior = span_posterior(poe, concatenate([span_statistics(poe, each) for each in updates]), bases)[0]
        z = torch.randn(5, 2, 3, 1, generator=generator, dtype=torch.float64)
        joint = on_model in factors
        target = Target(posterior)
        assert target.joint == joint
        value, gradient = target(target.states(z))
        by_program = value_and_gradient(log_density(posterior, joint=joint))(z)
        constant = log_constant(posterior)
        assert_close(
            value.squeeze(-1) if joint else value, by_program[0] - (constant.sum() if joint else constant), 1e-9
        )
        assert_close(target.latents(gradient), by_program[1], 1e-9)


def test_target_computes_single_precision_posteriors_in_their_own_dtype(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], OutputGram())
    exact, rough = Target(full_posterior(poe, updates)), Target(full_posterior(poe, updates.float()))
    x = torch.randn(5, 2, 12, generator=generator, dtype=torch.float64)
    assert rough(x)[1].dtype == torch.float64
    assert_close(rough(x)[0], exact(x)[0], 1e-5)
    assert_close(rough(x)[1], exact(x)[1], 1e-5)


# The sampler against exact answers


@pytest.mark.parametrize("residual_map", [InputGram(), (OutputGram(), InputGram())], ids=name_of)
def test_hmc_is_exact_on_gaussian_experts(residual_map: object, generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    updates[2] *= 30  # modules of very different size in one batch
    poe = ProductOfExperts.of(["a", "b"], residual_map, Gaussian(), Relative(0.4), temperature=0.7)  # type: ignore[arg-type]
    posterior = span_of(poe, updates)
    draws = hmc(posterior, 400, warmup=300, generator=generator)
    assert_same_mean(posterior, draws, gaussian_means(posterior))
    assert int(draws.stats["diverging"].sum()) == 0


@pytest.mark.parametrize("energy", [Cauchy(), StudentT(2.0)], ids=name_of)
def test_hmc_agrees_with_a_grid_on_a_skewed_posterior(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 2, 3)
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), energy, Relative(0.3), [1.0, 2.0], SKEWED.anchor, temperature=0.5
    )
    posterior, coordinates = span_posterior(poe, span_statistics(poe, updates))
    active = coordinates.transform[0].abs().sum(0).nonzero().flatten().tolist()
    truth = grid_means(posterior, active)
    draws = hmc(posterior, 600, generator=generator)
    assert_same_mean(posterior, draws, truth)
    centred = draws.values - draws.values.mean((0, 1))
    skewness = (centred**3).mean((0, 1)) / (centred**2).mean((0, 1)) ** 1.5
    assert float(skewness.abs().max()) > 0.5  # or a wrong sign would go unnoticed


def test_hmc_agrees_with_gibbs_on_many_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 6, 3, 4, 5)
    posterior = span_of(ProductOfExperts.of(list("abc"), InputGram(), StudentT(3.0, exponent=4.0)), updates)
    exact = gibbs_posterior(posterior, 800, chains=8, generator=generator)
    assert_same_mean(posterior, hmc(posterior, 300, warmup=300, generator=generator), exact)


def test_hmc_in_full_coordinates(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 2, 3)
    poe = ProductOfExperts.of(["a", "b"], (OutputGram(), InputGram()), Gaussian(), Relative(0.5), temperature=0.4)
    posterior = full_posterior(poe, updates)
    assert_same_mean(posterior, hmc(posterior, 400, warmup=300, generator=generator), gaussian_means(posterior))


def test_a_batch_of_modules_is_its_modules_alone(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 2, 3, 4)
    updates[1] *= 0.05
    together = span_of(SKEWED, updates)
    draws = hmc(together, 400, warmup=300, generator=generator)
    for module in range(3):
        alone = span_of(SKEWED, updates[module : module + 1])
        assert_same_mean(
            alone, draws.values[:, :, module : module + 1], hmc(alone, 400, warmup=300, generator=generator)
        )


def test_a_factor_expert_that_couples_modules(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    tie = FactorExpert(
        "tie", lambda c: 3.0 * (c[..., 0, 0] - c[..., 1, 1] - 1.0).square(), coordinates="span", scope="model"
    )
    posterior = span_of(
        ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.5), temperature=0.5) * tie, updates
    )
    truth = gaussian_means(posterior)
    untied = gaussian_means(
        span_of(ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.5), temperature=0.5), updates)
    )
    assert float((truth["x"] - untied["x"]).abs().max()) > 0.1
    draws = hmc(posterior, 400, warmup=300, generator=generator)
    assert_same_mean(posterior, draws, truth)
    with pytest.raises(IsBiased):
        assert_same_mean(posterior, draws, untied)
    # One group: both modules have the same statistics, those of the joint density.
    target = Target(posterior)
    assert_close(draws.stats["lp"], -posterior.joint_energy(draws.values).unsqueeze(-1) / 0.5, 1e-12)
    assert bool((draws.stats["n_steps"][..., 0] == draws.stats["n_steps"][..., 1]).all())
    assert target.states(draws.values).shape == (16, 400, 1, 6)


# Samplers that are wrong on purpose


Move = Callable[[HMCState, Density, Tuning, int, torch.Generator], HMCState]


def right(state: HMCState, density: Density, tuning: Tuning, index: int, generator: torch.Generator) -> HMCState:
    return step(state, density, tuning, van_der_corput(index), generator)[0]


def without_decision(
    state: HMCState, density: Density, tuning: Tuning, index: int, generator: torch.Generator
) -> HMCState:
    velocity = torch.randn(state.position.shape, generator=generator, dtype=torch.float64)
    return leapfrog(state, velocity, density, tuning, torch.tensor([2]))[0]


def chain(
    density: Density, generator: torch.Generator, move: Move = right, step_size: float = 0.8, num_samples: int = 1500
) -> Tensor:
    """States `(16, S, 1, 3)` of 16 chains under any move."""
    state = init(torch.randn(16, 1, 3, generator=generator, dtype=torch.float64), density)
    ones = torch.ones(1, dtype=torch.float64)
    tuning = Tuning(step_size * ones, 4 * step_size * ones, torch.ones(1, 3, dtype=torch.float64))
    positions = []
    for index in range(1, num_samples + 101):
        state = move(state, density, tuning, index, generator)
        positions.append(state.position)
    return torch.stack(positions[100:], 1)


@pytest.fixture
def skewed(generator: torch.Generator) -> Posterior:
    """One module, in units in which its standard deviations are between 1 and 3."""
    anchor = Anchor(precision=AbsolutePrecision(0.05))
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Cauchy(), Absolute(1.0), anchor=anchor)
    return span_of(poe, 0.7 * random_updates(generator, 1, 2, 2, 3))


def large_steps_without_a_decision(target: Target, generator: torch.Generator) -> Tensor:
    return chain(target, generator, without_decision, step_size=1.2)


def a_temperature_of_1_2(target: Target, generator: torch.Generator) -> Tensor:
    def hot(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(x)
        return value / 1.2, gradient / 1.2

    return chain(hot, generator)


def no_jacobian(target: Target, generator: torch.Generator) -> Tensor:
    posterior = target.posterior

    def density(y: Tensor) -> Tensor:
        return -posterior.energy(target.latents(torch.sinh(y))) / posterior.temperature

    return torch.sinh(chain(value_and_gradient(density), generator, step_size=0.4))


def a_mirrored_target(target: Target, generator: torch.Generator) -> Tensor:
    def mirrored(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(-x)
        return value, -gradient

    return chain(mirrored, generator)


def mirrored_at_the_mean(target: Target, generator: torch.Generator) -> Tensor:
    draws = chain(target, generator)
    return 2 * draws.mean((0, 1)) - draws


WRONG = [large_steps_without_a_decision, a_temperature_of_1_2, no_jacobian, a_mirrored_target, mirrored_at_the_mean]


def test_the_helper_passes_a_correct_sampler(skewed: Posterior, generator: torch.Generator) -> None:
    target = Target(skewed)
    assert_same_mean(skewed, target.latents(chain(target, generator)), grid_means(skewed, [1, 2]))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_the_helper_catches_a_wrong_sampler(
    wrong: Callable[[Target, torch.Generator], Tensor], skewed: Posterior, generator: torch.Generator
) -> None:
    target = Target(skewed)
    draws = target.latents(wrong(target, generator))
    with pytest.raises(IsBiased):
        assert_same_mean(skewed, draws, grid_means(skewed, [1, 2]))


def test_the_helper_asks_first_whether_the_chains_mix(skewed: Posterior, generator: torch.Generator) -> None:
    target, truth = Target(skewed), grid_means(skewed, [1, 2])
    stuck = target.latents(chain(target, generator, step_size=0.005, num_samples=500))
    with pytest.raises(DoesNotMix):
        assert_same_mean(skewed, stuck, truth)
    short = target.latents(chain(target, generator, num_samples=20))
    with pytest.raises(DoesNotMix):
        assert_same_mean(skewed, short, truth)


# The parts


def test_leapfrog_is_reversible_second_order_and_stops_every_group_at_its_own_step(
    skewed: Posterior, generator: torch.Generator
) -> None:
    density = Target(span_of(SKEWED, random_updates(generator, 3, 2, 3, 4)))
    state = init(torch.randn(4, 3, 3, generator=generator, dtype=torch.float64), density)
    velocity = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, 3, generator=generator, dtype=torch.float64) + 0.5
    tuning = Tuning(torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64), torch.ones(3, dtype=torch.float64), scale)
    steps = torch.tensor([5, 1, 9])
    end, end_velocity = leapfrog(state, velocity, density, tuning, steps)
    back, back_velocity = leapfrog(end, -end_velocity, density, tuning, steps)
    assert_close(back.position, state.position, 1e-10)
    assert_close(back_velocity, -velocity, 1e-10)
    for group, count in enumerate(steps.tolist()):
        alone, alone_velocity = leapfrog(state, velocity, density, tuning, torch.full((3,), count))
        assert_close(end.position[:, group], alone.position[:, group], 1e-12)
        assert_close(end_velocity[:, group], alone_velocity[:, group], 1e-12)
        assert_close(end.log_density[:, group], alone.log_density[:, group], 1e-12)

    def error(step_size: float) -> Tensor:
        fine = Tuning(torch.full((3,), step_size, dtype=torch.float64), tuning.trajectory, scale)
        end, v = leapfrog(state, velocity, density, fine, torch.full((3,), round(0.4 / step_size)))
        return 0.5 * (v.square() - velocity.square()).sum(-1) - end.log_density + state.log_density

    ratio = error(0.02) / error(0.01)
    assert float((ratio.median() - 4).abs()) < 0.2


def test_a_diverging_trajectory_is_counted_and_rejected(generator: torch.Generator) -> None:
    def quartic(x: Tensor) -> tuple[Tensor, Tensor]:
        return -x.pow(4).sum(-1), -4 * x.pow(3)

    state = init(torch.full((3, 2, 1), 3.0, dtype=torch.float64), quartic)
    step_size = torch.tensor([0.01, 50.0], dtype=torch.float64)
    tuning = Tuning(step_size, 100 * step_size, torch.ones(2, 1, dtype=torch.float64))
    new, info = step(state, quartic, tuning, 0.5, generator)
    assert info.diverging.tolist() == [[False, True]] * 3
    assert bool((new.position[:, 0] != 3.0).all())
    assert bool((new.position[:, 1] == 3.0).all())
    assert bool((info.acceptance[:, 1] == 0).all())
    value, gradient = quartic(new.position)  # the state is that of the position that was kept
    assert_close(new.log_density, value, 1e-12)
    assert_close(new.gradient, gradient, 1e-12)
    assert bool(info.energy.isfinite().all())
    assert info.steps.tolist() == [50, 50]


def test_chees_gradient_is_the_derivative_of_chees(generator: torch.Generator) -> None:
    before, proposal, velocity = torch.randn(3, 7, 2, 3, generator=generator, dtype=torch.float64)
    acceptance = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    acceptance[3, 1] = 0
    proposal[3, 1] = math.inf  # diverged: must not spoil the others
    time = torch.tensor([0.7, 2.0], dtype=torch.float64)
    share = acceptance / acceptance.sum(0)
    finite = torch.where(proposal.isfinite(), proposal, torch.zeros_like(proposal))
    center = (share.unsqueeze(-1) * finite).sum(0)

    def chees(log_time: Tensor) -> Tensor:
        end = finite + ((log_time - time.log()).exp() - 1).unsqueeze(-1) * time.unsqueeze(-1) * velocity
        change = (end - center).square().sum(-1) - (before - before.mean(0)).square().sum(-1)
        return (share * change.square()).sum(0) / 4

    derivative = torch.autograd.functional.jacobian(chees, time.log()).diagonal()
    assert_close(chees_gradient(before, proposal, velocity, acceptance, time), derivative, 1e-10)


def test_step_sizes_reach_the_target_acceptance() -> None:
    size = StepSize.start(torch.tensor([0.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 50.0], dtype=torch.float64)
    for _ in range(500):
        size = size.update(torch.exp(-size.log_value.exp() / scale))
    assert_close(torch.exp(-size.log_mean.exp() / scale), torch.full((2,), 0.651), 1e-2)


def test_scales_are_the_pooled_standard_deviations(generator: torch.Generator) -> None:
    scale = torch.tensor([[1e-3, 1.0, 40.0]], dtype=torch.float64)
    adaptation = Adaptation.start(torch.zeros(1, dtype=torch.float64), torch.ones_like(scale), max_steps=10)
    draws = 5.0 + scale * torch.randn(50, 16, 1, 3, generator=generator, dtype=torch.float64)
    for positions in draws:
        adaptation = adaptation.update(torch.ones(16, 1), torch.zeros(1), positions)
    # Five pseudo-draws with the old scale keep a new one from collapsing.
    shrunk = (draws.flatten(0, 1).var(0, correction=0) * 800 + 5) / 805
    assert_close(adaptation.rescaled().scale, shrunk.sqrt(), 1e-12)


def test_tuning_finds_scales_that_the_start_does_not_know(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    updates[:, 1] *= 0.01  # coordinates of very different length
    updates[1] *= 1e-3
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), Gaussian(), Relative(0.4), anchor=Anchor(precision=RelativePrecision(1e-3))
    )
    posterior = span_of(poe, updates)
    start = torch.zeros(16, 2, 3, 1, dtype=torch.float64)
    draws = hmc(posterior, 400, generator=generator, start=start)
    assert_same_mean(posterior, draws, gaussian_means(posterior))
    rates = draws.stats["acceptance_rate"].mean((0, 1))
    assert bool(((rates > 0.6) & (rates < 0.99)).all())
    assert float(draws.stats["n_steps"].double().mean()) < 6  # in the units of the start it takes over 20


@pytest.mark.parametrize("most", [1, 3])
def test_no_trajectory_has_more_steps_than_allowed(
    most: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = random_updates(generator, 1, 2, 3, 4)
    updates[:, 1] = updates[:, 0] + 1e-3 * updates[:, 1]  # long and narrow
    poe = ProductOfExperts.of(
        ["a", "b"], InputGram(), Cauchy(), Relative(0.05), anchor=Anchor(precision=RelativePrecision(1e-4))
    )
    taken: list[int] = []

    def counted(*arguments: Any) -> tuple[HMCState, HMCInfo]:
        state, info = step(*arguments)
        taken.append(int(info.steps.max()))
        return state, info

    monkeypatch.setattr(sys.modules["inference.hmc"], "step", counted)
    start = torch.zeros(16, 1, 3, 1, dtype=torch.float64)
    for given in (None, start):
        hmc(span_of(poe, updates), 20, warmup=100, generator=generator, max_steps=most, start=given)
    assert len(taken) == 240
    assert max(taken) == most  # in the warm-up, too


def test_sampling_uses_averaged_settings(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 4).expand(8, 2, 3, 4)  # eight times the same module
    step_size = hmc(span_of(SKEWED, updates), 1, generator=generator).stats["step_size"][0, 0]
    assert 1 < float(step_size.max() / step_size.min()) < 1.3  # the last ones of the warm-up differ by 1.5 and more


# The interface


def test_statistics_have_arviz_names_and_shapes(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED, random_updates(generator, 2, 2, 3, 4))
    draws = hmc(posterior, 30, chains=4, warmup=60, generator=generator)
    assert draws.values.shape == (4, 30, 2, 3, 1)
    assert draws.values.dtype == torch.float64
    assert (draws.num_chains, draws.num_draws) == (4, 30)
    assert set(draws.stats) == {"lp", "acceptance_rate", "step_size", "n_steps", "energy", "diverging"}
    assert all(value.shape == (4, 30, 2) for value in draws.stats.values())
    assert_close(draws.stats["lp"], -posterior.energy(draws.values) / posterior.temperature, 1e-12)
    # What is left of the energy is kinetic: half a chi-square with three degrees of freedom.
    kinetic = draws.stats["energy"] + draws.stats["lp"]
    assert float(kinetic.min()) >= 0
    assert abs(float(kinetic.mean()) - 1.5) < 0.5
    assert bool((draws.stats["step_size"] == draws.stats["step_size"][:1, :1]).all())
    assert bool((draws.stats["n_steps"] >= 1).all())


def test_the_generator_decides_everything(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED, random_updates(generator, 2, 2, 3, 4))
    before = torch.random.get_rng_state()
    first, same, other = (hmc(posterior, 20, chains=4, warmup=60, generator=seeded(seed)).values for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_reports_progress_and_can_be_interrupted(generator: torch.Generator) -> None:
    posterior = span_of(SKEWED, random_updates(generator, 1, 2, 3, 4))
    seen: list[tuple[int, int]] = []
    hmc(posterior, 5, chains=2, warmup=50, generator=generator, progress=lambda *count: seen.append(count))
    assert seen == [(i, 55) for i in range(1, 56)]

    def stop(count: int, total: int) -> None:
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hmc(posterior, 5, chains=2, warmup=50, generator=generator, progress=stop)
    assert hmc(posterior, 5, chains=2, warmup=50, generator=generator).num_draws == 5


def test_starts_lie_around_the_map_and_every_task_vector(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), Relative(0.4), temperature=0.3)
    posterior = span_of(poe, updates)
    starts = overdispersed_starts(posterior, 1500, generator)
    truth = gaussian_means(posterior)
    spread = (truth["x^2"] - truth["x"].square()).sqrt().view(2, 3, 1)
    assert_close(starts.scale, spread, 0.1)
    centers = [truth["x"].view(2, 3, 1), *(expert.update for expert in posterior.experts)]
    for i, center in enumerate(centers):
        points = starts.points[i::3]
        assert bool(((points.mean(0) - center).abs() < 5 * 2 * spread / 500**0.5).all())
        assert bool(((points.std(0) / (2 * spread) - 1).abs() < 0.2).all())


def test_bad_settings_are_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 2, 3, 4)
    posterior = span_of(SKEWED, updates)
    with pytest.raises(ValueError, match="chains=1.*differences between chains"):
        hmc(posterior, 10, chains=1, generator=generator)
    with pytest.raises(ValueError, match="warmup=10"):
        hmc(posterior, 10, warmup=10, generator=generator)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 1\), but 16 chains .* \(16, 2, 3, 1\)"):
        hmc(posterior, 10, generator=generator, start=torch.zeros(2, 3, 1))
    start = torch.zeros(16, 2, 3, 1)
    start[0, 1] = math.nan
    with pytest.raises(ValueError, match="group 1 .* finite where chain 0 starts"):
        hmc(posterior, 10, generator=generator, start=start)
    improper = ProductOfExperts.of(["a", "b"], energy=Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="improper"):
        hmc(full_posterior(improper, updates), 10, generator=generator)
