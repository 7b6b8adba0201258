r"""Batched Hamiltonian Monte Carlo: many chains of many modules as one tensor program, for any differentiable energy.

Pyro and Stan run chains in processes, one posterior at a time. Here the state is ``(C, G, D)`` and one gradient
evaluation serves all chains ``C`` of all groups ``G``; a group is one module, or all of them where a factor expert
couples the modules. Every group has its own step size (dual averaging), scales (pooled variances of the chains) and
trajectory length by ChEES-HMC (Hoffman, Radul and Sountsov, 2021, *An Adaptive-MCMC Scheme for Setting Trajectory
Lengths in Hamiltonian Monte Carlo*, AISTATS, PMLR 130:3907-3915), which learns from many chains without branching, so
that it fits a batch where NUTS does not. Groups whose trajectories are shorter wait for the longest.

:func:`init` and :func:`step` are the sampler; :func:`hmc` tunes and runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inference._adaptation import RESCALE_AT, TARGET_ACCEPTANCE, Adaptation, Tuning, chees_gradient
from inference._leapfrog import HMCInfo, HMCState, init, kinetic, leapfrog, step, van_der_corput
from inference._starts import starts_of
from inference._target import Density, Target
from inference.draws import StoredDraws
from inference.propriety import require_proper
from poe_models.posterior import Posterior

__all__ = ["HMCInfo", "HMCState", "hmc", "init", "step"]

SHORTEST_WARMUP = 50
MOST_DOUBLINGS = 60


def hmc(
    posterior: Posterior,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 16,
    warmup: int = 500,
    start: Tensor | None = None,
    max_steps: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> StoredDraws:
    """Draws of a posterior in its own coordinates by batched ChEES-HMC.

    It can be interrupted at any step (also by an exception from ``progress``): it keeps no state but its locals and
    the generator.

    Args:
        posterior: in Span coordinates, or Full ones of few entries; any differentiable energy and factor expert.
        num_samples: draws kept per chain.
        generator: source of all randomness, on the posterior's device.
        chains: ``C``; the tuning learns from differences between chains, so give it about 16 or more.
        warmup: steps per chain before the first kept draw, in which everything is tuned.
        start: ``(C, M, *event)``; by default overdispersed around the MAP and all task vectors.
        max_steps: most leapfrog steps of one trajectory.
        progress: called with the number of finished steps and their total.

    Returns:
        Draws ``(C, S, M, *event)`` in float64. ``stats`` has ``lp`` (``-E / T``), ``acceptance_rate``, ``step_size``,
        ``n_steps``, ``energy`` and ``diverging``; where a factor expert couples the modules they are of all modules
        together.

    Raises:
        ValueError: the posterior is improper, or a setting or the start cannot be used.
    """
    _check_settings(num_samples, chains, warmup, max_steps)
    require_proper(posterior)
    target = Target(posterior)
    starts = starts_of(posterior, chains, generator, start)
    state = init(target.states(starts.points), target)
    scale = target.states(starts.scale)
    adaptation = Adaptation.start(_first_log_step(state, target, scale, generator), scale, max_steps)
    positions, statistics = [], []
    for kept, info, tuning in _kept(state, target, adaptation, num_samples, warmup, generator, progress):
        positions.append(kept.position)
        statistics.append(_statistics(kept, info, tuning, target))
    stacked = {name: torch.stack([each[name] for each in statistics], 1) for name in statistics[0]}
    return StoredDraws(target.latents(torch.stack(positions, 1)), stacked, "hmc", posterior.fixed_temperature)


def _kept(
    state: HMCState,
    density: Density,
    adaptation: Adaptation,
    num_samples: int,
    warmup: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[HMCState, HMCInfo, Tuning]]:
    """Run all chains: tune, then sample.

    Yields:
        The states that are kept, what happened, and the settings.
    """
    total = warmup + num_samples
    rescale_at = {round(share * warmup) for share in RESCALE_AT}
    for count in range(1, total + 1):
        tuning = adaptation.tuning if count <= warmup else adaptation.settled
        before = state
        state, info = step(state, density, tuning, van_der_corput(count), generator)
        if count <= warmup:
            adaptation = _learn(adaptation, before, state, info, tuning)
            adaptation = adaptation.rescaled() if count in rescale_at else adaptation
        if progress is not None:
            progress(count, total)
        if count > warmup:
            yield state, info, tuning


def _learn(adaptation: Adaptation, before: HMCState, after: HMCState, info: HMCInfo, tuning: Tuning) -> Adaptation:
    """Feed one step of all chains to the adaptation, in units of the scales."""
    criterion = chees_gradient(
        before=before.position / tuning.scale,
        proposal=info.proposal / tuning.scale,
        velocity=info.velocity,
        acceptance=info.acceptance,
        time=info.steps * tuning.step_size,
    )
    return adaptation.update(info.acceptance, criterion, after.position)


def _first_log_step(state: HMCState, density: Density, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Log step size at which one leapfrog step is accepted about as often as it should be, by doubling, ``(G,)``."""
    velocity = torch.randn(state.position.shape, generator=generator, dtype=scale.dtype, device=scale.device)
    log_step = torch.zeros_like(scale[:, 0])
    once = torch.ones_like(log_step, dtype=torch.long)
    direction, searching = torch.zeros_like(log_step), torch.ones_like(log_step, dtype=torch.bool)
    for _ in range(MOST_DOUBLINGS):
        end, end_velocity = leapfrog(state, velocity, density, Tuning(log_step.exp(), log_step.exp(), scale), once)
        error = kinetic(end_velocity) - end.log_density - kinetic(velocity) + state.log_density
        acceptance = torch.exp(-torch.where(error.isnan(), torch.inf, error).clamp(min=0)).mean(0)
        towards = torch.where(acceptance > TARGET_ACCEPTANCE, 1.0, -1.0).to(log_step)
        direction = torch.where(direction == 0, towards, direction)
        searching = searching & (towards == direction)
        if not bool(searching.any()):
            break
        log_step = log_step + math.log(2) * direction * searching
    return log_step


def _statistics(state: HMCState, info: HMCInfo, tuning: Tuning, target: Target) -> dict[str, Tensor]:
    """ArviZ's names, ``(C, M)`` each."""
    shape = state.log_density.shape
    by_group = {
        "lp": state.log_density,
        "acceptance_rate": info.acceptance,
        "step_size": tuning.step_size.expand(shape),
        "n_steps": info.steps.expand(shape),
        "energy": info.energy,
        "diverging": info.diverging,
    }
    return {name: target.per_module(value) for name, value in by_group.items()}


def _check_settings(num_samples: int, chains: int, warmup: int, max_steps: int) -> None:
    if num_samples < 1 or chains < 2 or warmup < SHORTEST_WARMUP or max_steps < 1:
        raise ValueError(
            f"`hmc(num_samples={num_samples}, chains={chains}, warmup={warmup}, max_steps={max_steps})`: at least "
            f"1 sample, 2 chains (trajectory lengths are learnt from differences between chains), {SHORTEST_WARMUP} "
            "steps of warm-up and 1 leapfrog step."
        )
