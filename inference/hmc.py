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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference._adaptation import RESCALE_AT, Adaptation, Tuning, chees_gradient
from inference._starts import Starts, overdispersed_starts
from inference._target import Density, Target
from inference.draws import StoredDraws
from inference.propriety import require_proper
from poe_models.posterior import Posterior

DIVERGENT = 1000.0
"""Energy error in nats above which a trajectory counts as diverged, as in Stan and Pyro."""


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
    rescale_at = {round(share * warmup) for share in RESCALE_AT}
    positions, records = [], []
    for count in range(1, warmup + num_samples + 1):
        tuning = adaptation.tuning if count <= warmup else adaptation.settled
        before = state
        state, info = step(state, target, tuning, van_der_corput(count), generator)
        if count <= warmup:
            adaptation = _learn(adaptation, before, state, info, tuning)
            adaptation = adaptation.rescaled() if count in rescale_at else adaptation
        else:
            positions.append(state.position)
            records.append((state.log_density, info))
        if progress is not None:
            progress(count, warmup + num_samples)
    values = target.latents(torch.stack(positions, 1))
    return StoredDraws(values, _statistics(records, adaptation.settled.step_size, target))


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
    shortest, longest = int(steps.min()), int(steps.max())
    position = state.position
    velocity = velocity + 0.5 * pace * state.gradient
    for i in range(1, longest + 1):
        moved = position + pace * velocity
        position = moved if i <= shortest else torch.where((steps >= i).unsqueeze(-1), moved, position)
        log_density, gradient = density(position)
        kick = pace if i < shortest else pace * _share_of_kick(steps, i)
        velocity = velocity + kick * gradient if i <= shortest else _kicked(velocity, kick, gradient, steps >= i)
    return HMCState(position, log_density, gradient), velocity


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
