"""The loop over steps that samplers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from inference.map import solve_posterior
from inference.minimize import minimize
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior

SPREAD = 2.0
"""Standard deviation of the starts around their centres, in those of the posterior's Gaussian approximation."""


def mode_of(posterior: Posterior) -> Tensor:
    """The MAP of any posterior in its dtype, ``(M, *event)``."""
    return (minimize(posterior) if posterior.factors else solve_posterior(posterior)).value.to(posterior.dtype)


def overdispersed_starts(posterior: Posterior, mode: Tensor, chains: int, generator: torch.Generator) -> Tensor:
    """Chain 0 starts at the MAP, the next ones at every task vector in turn, and so on, all with noise.

    The noise is Gaussian with twice the standard deviations of the quadratic that majorises the energy at the MAP.

    Args:
        posterior: in Full or Span coordinates, proper without its factor experts.
        mode: the MAP, ``(M, *event)``.
        chains: ``C``.
        generator: source of the noise.

    Returns:
        The starts, ``(C, M, *event)``.

    Raises:
        ValueError: the modules' operators do not share a factorisation (Full coordinates only).
    """
    by_update = {expert.update_name: expert.update for expert in posterior.experts}
    centers = [mode, *by_update.values()]
    noise = torch.randn((chains, *mode.shape), generator=generator, dtype=mode.dtype, device=mode.device)
    points = torch.stack([centers[chain % len(centers)] for chain in range(chains)])
    return points + SPREAD * majoriser_draws(posterior, mode, noise)


def majoriser_draws(posterior: Posterior, mode: Tensor, noise: Tensor) -> Tensor:
    """Draws of ``N(0, T H^-1 / 2)`` with ``H = sum_i w_i P_i + eta I`` at the mode.

    They are linear in the noise: ``R`` with ``R R^T = T H^-1 / 2`` has the draws of the unit vectors as its columns.

    Args:
        posterior: in Full or Span coordinates, proper without its factor experts.
        mode: the MAP, ``(M, *event)``.
        noise: standard normal, ``(S, M, *event)``.

    Returns:
        The draws, ``(S, M, *event)``.
    """
    quadratic = quadratic_of(posterior, for_draws=True)
    weights = posterior.weights(posterior.residuals(mode))
    precision = quadratic.precision(weights, posterior.anchor_precision)
    white = quadratic.compression.compress(noise)
    draws = quadratic.lift(precision.sample(white))
    if not quadratic.compression.trivial:
        eta = posterior.anchor_precision
        alone = torch.where(eta > 0, eta.rsqrt(), torch.zeros_like(eta))  # directions that only the anchor holds
        draws = draws + (noise - quadratic.lift(white)) * alone.to(noise.dtype)[:, None, None]
    return draws * (posterior.temperature / 2) ** 0.5


State = TypeVar("State")


def kept_states(
    step: Callable[[State, int], State],
    state: State,
    num_samples: int,
    warmup: int,
    thin: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[State]:
    """Run all chains of a sampler.

    Args:
        step: maps a state of all chains and the number of the step, from 1, to the next state.
        state: the first state.
        num_samples: states to keep.
        warmup: steps before the first one that counts.
        thin: steps per kept state.
        progress: called with the number of finished steps and their total.

    Yields:
        The states that are kept.
    """
    total = warmup + num_samples * thin
    for count in range(1, total + 1):
        state = step(state, count)
        if progress is not None:
            progress(count, total)
        if count > warmup and (count - warmup) % thin == 0:
            yield state


def require_counts(sampler: str, *, num_samples: int, chains: int, thin: int, warmup: int) -> None:
    """Refuse numbers of draws, chains and steps that cannot be used.

    Args:
        sampler: name of the function that was called.
        num_samples: draws kept per chain.
        chains: independent chains.
        thin: steps per kept draw.
        warmup: steps before the first kept draw.

    Raises:
        ValueError: one is too small.
    """
    if num_samples < 1 or chains < 1 or thin < 1 or warmup < 0:
        raise ValueError(
            f"`{sampler}(num_samples={num_samples}, chains={chains}, thin={thin}, warmup={warmup})`: at least one "
            "draw, one chain and one step per draw are needed, and no negative warmup."
        )
