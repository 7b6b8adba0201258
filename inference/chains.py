"""The common part of Markov chain samplers: the kernel's interface, the loop over its steps, and overdispersed starts.

Chains that start in different places, around the MAP and around every task vector, disagree for as long as they have
not mixed; from one mode they would not notice another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from inference.draws import Draws
from inference.map import fixed_point
from inference.minimize import minimize
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior

SPREAD = 2.0
"""Standard deviation of the starts around their centres, in those of the posterior's Gaussian approximation."""


def mode_of(posterior: Posterior) -> Tensor:
    """The MAP of any posterior in its dtype, ``(M, *event)``."""
    return (minimize(posterior) if posterior.factors else fixed_point(posterior)).value.to(posterior.dtype)


def overdispersed_starts(posterior: Posterior, mode: Tensor, chains: int, generator: torch.Generator) -> Tensor:
    """Chain 0 starts at the MAP, the next ones at every task vector in turn, and so on, all with noise.

    The noise is Gaussian with twice the standard deviations of the quadratic that majorises the energy at the MAP, so
    the posterior must be proper without its factor experts. From a mode ``(M, *event)`` to ``(C, M, *event)``.

    Raises:
        ValueError: If the modules' operators do not share a factorisation (Full coordinates only).
    """
    by_update = {expert.update_name: expert.update for expert in posterior.experts}
    centers = [mode, *by_update.values()]
    noise = torch.randn((chains, *mode.shape), generator=generator, dtype=mode.dtype, device=mode.device)
    points = torch.stack([centers[chain % len(centers)] for chain in range(chains)])
    return points + SPREAD * majoriser_draws(posterior, mode, noise)


def majoriser_draws(posterior: Posterior, mode: Tensor, noise: Tensor) -> Tensor:
    """Draws of ``N(0, T H^-1 / 2)`` with ``H = sum_i w_i P_i + eta I`` at the mode, ``(S, M, *event)`` like the noise.

    They are linear in the noise: ``R`` with ``R R^T = T H^-1 / 2`` has the draws of the unit vectors as its columns.
    """
    quadratic = quadratic_of(posterior, for_draws=True)
    weights = posterior.weights(posterior.residuals(mode))
    precision = quadratic.precision(weights, posterior.anchor_precision)
    white = quadratic.compression.compress(noise)
    eta = posterior.anchor_precision
    alone = torch.where(eta > 0, eta.rsqrt(), torch.zeros_like(eta))  # directions that only the anchor holds
    draws = quadratic.lift_draws(precision.sample(white), noise, white, alone)
    return draws * (posterior.temperature / 2) ** 0.5


State = TypeVar("State")
Info = TypeVar("Info")
Progress = Callable[[int, int], None]
"""Called with the number of finished steps and their total; an exception from it interrupts the sampler."""


class Kernel(ABC, Generic[State, Info]):
    """A Markov chain's transition for all chains and modules of a posterior at once.

    The state is what a chain needs for its next step, the info what a reader wants to know of the last one.

    Attributes:
        name: Name of the sampler, which its draws keep.
        function: Name of the function that users call, if it is another.
        posterior: Density that the transition leaves invariant.
    """

    name: str
    function: str | None = None
    posterior: Posterior

    @abstractmethod
    def init(self, chains: int, generator: torch.Generator) -> State:
        """Overdispersed first states of ``C`` chains."""

    @abstractmethod
    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        """The next state, and the info of the step."""

    def warm_up(self, state: State, step: int, steps: int) -> None:
        """Adapt the transition after a step of the warm-up; by default there is nothing to adapt."""

    @abstractmethod
    def latents(self, state: State, info: Info) -> Tensor:
        """The latents, ``(C, M, *event)``."""

    @abstractmethod
    def stats(self, state: State, info: Info) -> dict[str, Tensor]:
        """Statistics of the draw by ArviZ's names, ``lp`` (``-E / T``) among them; broadcastable to ``(C, M)``."""


def stored_draws(
    kernel: Kernel[State, Info],
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int,
    warmup: int,
    thin: int,
    progress: Progress | None,
) -> Draws:
    """The loop over steps that all samplers share.

    Args:
        kernel: The transition.
        num_samples: Draws kept per chain.
        generator: Source of all randomness.
        chains: Independent chains.
        warmup: Steps before the first one that counts.
        thin: Steps per kept draw.
        progress: Called after every step.

    Returns:
        Draws ``(C, S, M, *event)``.

    Raises:
        ValueError: If a count is too small.
    """
    if num_samples < 1 or chains < 1 or thin < 1 or warmup < 0:
        raise ValueError(
            f"`{kernel.function or kernel.name}(num_samples={num_samples}, chains={chains}, thin={thin}, "
            f"warmup={warmup})`: at least one draw, one chain and one step per draw are needed, and no negative warmup."
        )
    values, statistics = [], []
    state = kernel.init(chains, generator)
    total = warmup + num_samples * thin
    for count in range(1, total + 1):
        state, info = kernel.step(state, generator)
        if count <= warmup:
            kernel.warm_up(state, count, warmup)
        if progress is not None:
            progress(count, total)
        if count > warmup and (count - warmup) % thin == 0:
            values.append(kernel.latents(state, info))
            statistics.append(kernel.stats(state, info))
    shape = (chains, num_samples, kernel.posterior.num_modules)
    stats = {name: torch.stack([each[name] for each in statistics], 1).expand(shape) for name in statistics[0]}
    return Draws(torch.stack(values, 1), stats, kernel.name, kernel.posterior.fixed_temperature)
