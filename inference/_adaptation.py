"""What a batch of HMC chains learns during warm-up: step sizes, scales and trajectory lengths, per group.

Everything acts on all groups ``G`` (modules) at once and uses the chains ``C`` as a sample of the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TARGET_ACCEPTANCE = 0.651
"""Optimal acceptance rate of HMC as the dimension grows (Beskos et al., 2013, Bernoulli 19(5A))."""

QUARTER_TURN = math.log(math.pi / 2)
"""Log time in which a standard Gaussian forgets where it started."""

RESCALE_AT = (0.1, 0.2, 0.4, 0.8)
"""Shares of the warm-up at which the scales are renewed from the draws since the last time."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """The settings of one HMC step; lengths and times are in units of ``scale``.

    Attributes:
        step_size: of the leapfrog integrator, ``(G,)``.
        trajectory: longest integration time, ``(G,)``.
        scale: square root of the inverse mass, about the posterior's standard deviation, ``(G, D)``.
    """

    step_size: Tensor
    trajectory: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class StepSize:
    """Dual averaging (Hoffman and Gelman, 2014, JMLR 15, Section 3.2) with Stan's constants.

    Only its pull towards ten times the first guess is left out: here the guess comes from all chains.

    Attributes:
        log_value: current log step size, ``(G,)``.
        log_mean: weighted mean over steps, what sampling uses, ``(G,)``.
        pull: the log step size it shrinks towards, ``(G,)``.
        error: running mean of target minus acceptance, ``(G,)``.
        count: steps so far.
    """

    log_value: Tensor
    log_mean: Tensor
    pull: Tensor
    error: Tensor
    count: int = 0

    @classmethod
    def start(cls, log_value: Tensor) -> StepSize:
        """At a first guess, ``(G,)``."""
        return cls(log_value, log_value, log_value, torch.zeros_like(log_value))

    def update(self, acceptance: Tensor) -> StepSize:
        """One step with the chains' acceptance rate, ``(G,)``."""
        count = self.count + 1
        share = 1 / (count + 10)
        error = (1 - share) * self.error + share * (TARGET_ACCEPTANCE - acceptance)
        log_value = self.pull - math.sqrt(count) / 0.05 * error
        recent = count**-0.75
        return StepSize(log_value, recent * log_value + (1 - recent) * self.log_mean, self.pull, error, count)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Adam without momentum on the log trajectory length, with ChEES-HMC's constants.

    Attributes:
        log_value: current log length, ``(G,)``.
        log_mean: its mean since the last renewal of the scales, what sampling uses, ``(G,)``.
        second_moment: running mean of the squared gradient, ``(G,)``.
        count: steps so far.
        averaged: steps in ``log_mean``.
    """

    log_value: Tensor
    log_mean: Tensor
    second_moment: Tensor
    count: int = 0
    averaged: int = 0

    @classmethod
    def start(cls, log_value: Tensor) -> Trajectory:
        """At a first guess, ``(G,)``."""
        return cls(log_value, log_value, torch.zeros_like(log_value))

    def update(self, gradient: Tensor, shortest: Tensor, longest: Tensor) -> Trajectory:
        """One ascent step along ``gradient`` within bounds on the log length, ``(G,)`` each."""
        count, averaged = self.count + 1, self.averaged + 1
        second_moment = 0.95 * self.second_moment + 0.05 * gradient.square()
        size = (second_moment / (1 - 0.95**count)).sqrt()
        moved = self.log_value + 0.025 * torch.where(size > 0, gradient / size, torch.zeros_like(size))
        log_value = torch.maximum(torch.minimum(moved, longest), shortest)
        log_mean = self.log_mean + (log_value - self.log_mean) / averaged
        return Trajectory(log_value, log_mean, second_moment, count, averaged)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and spread of the draws of all chains since the last renewal, by Chan's pairwise update.

    Attributes:
        mean: ``(G, D)``.
        squares: sum of squared deviations, ``(G, D)``.
        count: draws.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0

    def update(self, positions: Tensor) -> Moments:
        """Add one draw of every chain, ``(C, G, D)``."""
        chains = len(positions)
        count = self.count + chains
        mean = positions.mean(0)
        shift = mean - self.mean
        squares = self.squares + (positions - mean).square().sum(0) + shift.square() * (self.count * chains / count)
        return Moments(self.mean + shift * (chains / count), squares, count)


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Everything that is learnt; frozen, each step returns a new one."""

    step_size: StepSize
    trajectory: Trajectory
    moments: Moments
    scale: Tensor
    max_steps: int
    renewed: bool = False

    @classmethod
    def start(cls, log_step: Tensor, scale: Tensor, max_steps: int) -> Adaptation:
        """From first guesses ``(G,)`` and ``(G, D)``: a quarter turn of a standard Gaussian, or eight steps."""
        length = torch.minimum(torch.full_like(log_step, QUARTER_TURN), log_step + math.log(8))
        moments = Moments(torch.zeros_like(scale), torch.zeros_like(scale))
        return cls(StepSize.start(log_step), Trajectory.start(length), moments, scale, max_steps)

    @property
    def tuning(self) -> Tuning:
        """Current settings, for the next step of the warm-up."""
        return self._tuning(self.step_size.log_value, self.trajectory.log_value)

    @property
    def settled(self) -> Tuning:
        """Averaged settings, for sampling."""
        return self._tuning(self.step_size.log_mean, self.trajectory.log_mean)

    def _tuning(self, log_step: Tensor, log_length: Tensor) -> Tuning:
        """No trajectory is longer than ``max_steps``, whatever the step size has become."""
        longest = log_step + math.log(self.max_steps)
        return Tuning(log_step.exp(), torch.minimum(log_length, longest).exp(), self.scale)

    def update(self, acceptance: Tensor, criterion_gradient: Tensor, positions: Tensor) -> Adaptation:
        """Learn from one step of all chains.

        Args:
            acceptance: Metropolis acceptance probabilities, ``(C, G)``. Their harmonic mean is held at the target, so
                that a few chains that are stuck weigh as much as they should.
            criterion_gradient: :func:`chees_gradient`, ``(G,)``.
            positions: the chains after the step, ``(C, G, D)``.

        Returns:
            The next adaptation.
        """
        tiny = torch.finfo(acceptance.dtype).tiny
        harmonic = 1 / (1 / acceptance.clamp(min=tiny)).mean(0)
        step_size = self.step_size.update(harmonic)
        log_step = step_size.log_mean  # the current one still swings
        trajectory = self.trajectory.update(criterion_gradient, log_step, log_step + math.log(self.max_steps))
        return replace(self, step_size=step_size, trajectory=trajectory, moments=self.moments.update(positions))

    def rescaled(self) -> Adaptation:
        """Renew the scales.

        The step size keeps its length in the units of the posterior. The trajectory starts again from a quarter turn
        at the first renewal, when what it learnt was in wrong units, and keeps its number of turns later: on a
        nearly Gaussian posterior ChEES is periodic in the length, with equally good maxima many turns away.
        """
        count = self.moments.count
        variance = (self.moments.squares + 5 * self.scale.square()) / (count + 5)
        scale = variance.sqrt()
        longer = (self.scale.log() - scale.log()).mean(-1)
        turns = self.trajectory.log_value if self.renewed else torch.full_like(longer, QUARTER_TURN)
        return Adaptation(
            StepSize.start(self.step_size.log_mean + longer),
            replace(self.trajectory, log_value=turns, log_mean=turns, averaged=0),
            Moments(torch.zeros_like(scale), torch.zeros_like(scale)),
            scale,
            self.max_steps,
            renewed=True,
        )


def chees_gradient(before: Tensor, proposal: Tensor, velocity: Tensor, acceptance: Tensor, time: Tensor) -> Tensor:
    r"""Gradient of ChEES in the log trajectory length, estimated from one step of all chains.

    ``ChEES = E[(|x' - m|^2 - |x - m|^2)^2] / 4`` is the squared change of the squared distance from the centre ``m``: a
    trajectory that only mirrors the chain earns nothing. Its gradient is ``t (|x' - m|^2 - |x - m|^2) <x' - m, v'>``
    (Hoffman, Radul and Sountsov, 2021, AISTATS, PMLR 130). The criterion is not invariant to units: here all lengths
    are in those of the scales.

    Args:
        before: where the trajectories started, ``(C, G, D)``.
        proposal: where they ended.
        velocity: there.
        acceptance: of the proposals, their weights, ``(C, G)``.
        time: integration time, ``(G,)``.

    Returns:
        The gradient, ``(G,)``; zero where no proposal can be accepted.
    """
    weight = acceptance / acceptance.sum(0).clamp(min=torch.finfo(acceptance.dtype).tiny)
    usable = (acceptance > 0).unsqueeze(-1)
    proposal = torch.where(usable, proposal, before)  # diverged proposals may be infinite
    velocity = torch.where(usable, velocity, torch.zeros_like(velocity))
    from_center = before - before.mean(0)
    to_center = proposal - (weight.unsqueeze(-1) * proposal).sum(0)
    change = to_center.square().sum(-1) - from_center.square().sum(-1)
    return time * (weight * change * (to_center * velocity).sum(-1)).sum(0)
