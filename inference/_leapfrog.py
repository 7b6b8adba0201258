"""One step of Hamiltonian Monte Carlo for all chains and groups: what :mod:`inference.hmc` tunes and repeats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference._adaptation import Tuning
from inference._target import Density

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
            f"the log density of group {group} (a module, unless a factor expert couples them) or its gradient is not "
            f"finite where chain {chain} starts. Give another `start`, or look at the experts' energies there."
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
    energy = kinetic(velocity) - state.log_density
    error = kinetic(end_velocity) - end.log_density - energy
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


def kinetic(velocity: Tensor) -> Tensor:
    """Kinetic energy in nats of velocities in units of the scale, ``(C, G, D)`` to ``(C, G)``."""
    return 0.5 * velocity.square().sum(-1)


def _choose(where: Tensor, one: HMCState, other: HMCState) -> HMCState:
    """Per chain and group, ``one`` where true and ``other`` elsewhere."""
    wide = where.unsqueeze(-1)
    return HMCState(
        torch.where(wide, one.position, other.position),
        torch.where(where, one.log_density, other.log_density),
        torch.where(wide, one.gradient, other.gradient),
    )
