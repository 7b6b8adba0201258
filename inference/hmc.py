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
from dataclasses import dataclass

import torch
from torch import Tensor

from inference._adaptation import RESCALE_AT, TARGET_ACCEPTANCE, Adaptation, Tuning, chees_rate_gradient
from inference._starts import Starts, overdispersed_starts
from inference._target import Density, Target
from inference.draws import StoredDraws
from inference.propriety import require_proper
from poe_models.posterior import Posterior

DIVERGENT = 1000.0
"""Energy error in nats above which a trajectory counts as diverged, as in Stan and Pyro."""

SHORTEST_WARMUP = 50
MOST_DOUBLINGS = 60


@dataclass(frozen=True, eq=False)
class HMCState:
    """What the chains need.

    Attributes:
        position: ``(C, G, D)``.
        log_density: there, in nats, ``(C, G)``.
        gradient: of the log density, ``(C, G, D)``.
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class HMCInfo:
    """What a reader, and the warm-up, want to know of one step.

    Attributes:
        acceptance: Metropolis acceptance probability, ``(C, G)``.
        diverging: whether the energy error exceeded ``DIVERGENT`` or was not a number, ``(C, G)``.
        energy: minus log density plus kinetic energy of the state that was kept, ``(C, G)``.
        steps: leapfrog steps, ``(G,)``.
        proposal: end of the trajectory, ``(C, G, D)``.
        velocity: there, in units of the scale.
    """

    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    steps: Tensor
    proposal: Tensor
    velocity: Tensor


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
    starts = overdispersed_starts(posterior, chains, generator) if start is None else _given(posterior, start, chains)
    state = init(target.states(starts.points), target)
    scale = target.states(starts.scale)
    adaptation = Adaptation.start(_first_log_step(state, target, scale, generator), scale, max_steps)
    positions, statistics = [], []
    for kept, info, tuning in _kept(state, target, adaptation, num_samples, warmup, generator, progress):
        positions.append(kept.position)
        statistics.append(_statistics(kept, info, tuning, target))
    stacked = {name: torch.stack([each[name] for each in statistics], 1) for name in statistics[0]}
    return StoredDraws(target.latents(torch.stack(positions, 1)), stacked)


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


def init(position: Tensor, density: Density) -> HMCState:
    """The state at a position ``(C, G, D)``.

    Raises:
        ValueError: the log density or its gradient is not finite there.
    """
    log_density, gradient = density(position)
    finite = log_density.isfinite() & gradient.isfinite().all(-1)
    if not bool(finite.all()):
        chain, group = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"`hmc(...)`: the log density of module {group} or its gradient is not finite where chain {chain} starts. "
            "Give another `start`, or look at the experts' energies there."
        )
    return HMCState(position, log_density, gradient)


def step(
    state: HMCState, density: Density, tuning: Tuning, jitter: float, generator: torch.Generator
) -> tuple[HMCState, HMCInfo]:
    """One trajectory and its Metropolis decision, for all chains and groups.

    Args:
        state: where the chains are.
        density: what they sample.
        tuning: step sizes, longest trajectories and scales per group.
        jitter: share of the longest trajectory to integrate, in (0, 1]; any sequence that does not look at the chains.
        generator: source of velocities and decisions.

    Returns:
        The next state, and what happened.
    """
    shape = state.log_density.shape
    like = {"dtype": torch.float64, "device": state.position.device, "generator": generator}
    velocity = torch.randn(state.position.shape, **like)  # type: ignore[call-overload]
    threshold = torch.rand(shape, **like)  # type: ignore[call-overload]
    steps = torch.ceil(jitter * tuning.trajectory / tuning.step_size).clamp(min=1).long()
    end, end_velocity = leapfrog(state, velocity, density, tuning, steps)
    energy = _kinetic(velocity) - state.log_density
    error = _kinetic(end_velocity) - end.log_density - energy
    error = torch.where(error.isnan(), torch.inf, error)
    acceptance = torch.exp(-error.clamp(min=0))
    accepted = threshold < acceptance
    info = HMCInfo(
        acceptance=acceptance,
        diverging=error > DIVERGENT,
        energy=torch.where(accepted, energy + error, energy),
        steps=steps,
        proposal=end.position,
        velocity=end_velocity,
    )
    return _choose(accepted, end, state), info


def leapfrog(
    state: HMCState, velocity: Tensor, density: Density, tuning: Tuning, steps: Tensor
) -> tuple[HMCState, Tensor]:
    """Integrate Hamilton's equations; groups stop after their own number of steps.

    Args:
        state: where the trajectories start.
        velocity: in units of the scale, ``(C, G, D)``.
        density: minus the potential.
        tuning: step sizes and scales.
        steps: per group, ``(G,)``.

    Returns:
        Where they end, and the velocities there.
    """
    pace = tuning.step_size.unsqueeze(-1) * tuning.scale
    pace = tuning.step_size.unsqueeze(-1) * tuning.scale
    end = state
    longest = int(steps.max())
    # 1 while a group moves and 0 after: its last kick is a half one, and then it stands still.
    moving = (steps > torch.arange(longest + 1, device=steps.device).unsqueeze(-1)).to(pace.dtype).unsqueeze(-1)
    velocity = velocity + 0.5 * pace * state.gradient
    for i in range(longest):
        position = end.position + pace * moving[i] * velocity
        end = HMCState(position, *density(position))
        velocity = velocity + pace * (0.5 * (moving[i] + moving[i + 1])) * end.gradient
    return end, velocity


def van_der_corput(index: int) -> float:
    """Element of the base-2 van der Corput (one-dimensional Halton) sequence: evenly spread over (0, 1).

    >>> [van_der_corput(i) for i in range(1, 6)]
    [0.5, 0.25, 0.75, 0.125, 0.625]
    """
    value, digit = 0.0, 0.5
    while index:
        value += digit * (index & 1)
        index >>= 1
        digit /= 2
    return value


def _learn(adaptation: Adaptation, before: HMCState, after: HMCState, info: HMCInfo, tuning: Tuning) -> Adaptation:
    """Feed one step of all chains to the adaptation, in units of the scales."""
    criterion = chees_rate_gradient(
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
        error = _kinetic(end_velocity) - end.log_density - _kinetic(velocity) + state.log_density
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


def _given(posterior: Posterior, start: Tensor, chains: int) -> Starts:
    """A start from the caller, with the anchor's standard deviation (1 without an anchor) as a first scale.

    Raises:
        ValueError: it has the wrong shape.
    """
    shape = (chains, posterior.num_modules, *posterior.event_shape)
    if tuple(start.shape) != shape:
        raise ValueError(
            f"`hmc(start=...)`: has shape {tuple(start.shape)}, but {chains} chains of this posterior have {shape}. "
            "Give one point per chain, for instance `point.expand(chains, *point.shape)`."
        )
    eta = posterior.anchor_precision
    spread = torch.where(eta > 0, (posterior.temperature / (2 * eta)).sqrt(), torch.ones_like(eta))
    return Starts(start, spread[:, None, None].expand(shape[1:]))


def _check_settings(num_samples: int, chains: int, warmup: int, max_steps: int) -> None:
    if num_samples < 1 or chains < 2 or warmup < SHORTEST_WARMUP or max_steps < 1:
        raise ValueError(
            f"`hmc(num_samples={num_samples}, chains={chains}, warmup={warmup}, max_steps={max_steps})`: at least "
            f"1 sample, 2 chains (trajectory lengths are learnt from differences between chains), {SHORTEST_WARMUP} "
            "steps of warm-up and 1 leapfrog step."
        )


def _kinetic(velocity: Tensor) -> Tensor:
    return 0.5 * velocity.square().sum(-1)


def _choose(where: Tensor, one: HMCState, other: HMCState) -> HMCState:
    """Per chain and group, ``one`` where true and ``other`` elsewhere."""
    wide = where.unsqueeze(-1)
    return HMCState(
        torch.where(wide, one.position, other.position),
        torch.where(where, one.log_density, other.log_density),
        torch.where(wide, one.gradient, other.gradient),
    )
