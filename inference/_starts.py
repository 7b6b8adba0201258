"""Overdispersed starting points for Markov chains: around the MAP and around every task vector.

Chains that start in different places disagree for as long as they have not mixed; from one mode they would not notice
another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.fixed_point import solve_posterior
from inference.lbfgs import minimize
from poe_models.posterior import Posterior
from poe_models.quadratics import quadratic_of

SPREAD = 2.0
"""Standard deviation of the starts around their centres, in those of the posterior's Gaussian approximation."""


@dataclass(frozen=True, eq=False)
class Starts:
    """Starting points.

    Attributes:
        points: one per chain, ``(C, M, *event)``.
        scale: rough standard deviations of the posterior, ``(M, *event)``, positive.
    """

    points: Tensor
    scale: Tensor


def starts_of(posterior: Posterior, chains: int, generator: torch.Generator, start: Tensor | None) -> Starts:
    """The caller's start, with the anchor's standard deviation (1 without an anchor) as a first scale, or our own.

    Args:
        posterior: in Full or Span coordinates, proper without its factor experts.
        chains: ``C``.
        generator: source of the noise.
        start: ``(C, M, *event)``, or None for :func:`overdispersed_starts`.

    Returns:
        The starts.

    Raises:
        ValueError: ``start`` has the wrong shape.
    """
    if start is None:
        return overdispersed_starts(posterior, chains, generator)
    shape = (chains, posterior.num_modules, *posterior.event_shape)
    if tuple(start.shape) != shape:
        raise ValueError(
            f"`start` has shape {tuple(start.shape)}, but {chains} chains of this posterior have {shape}. "
            "Give one point per chain, for instance `point.expand(chains, *point.shape)`."
        )
    eta = posterior.anchor_precision
    spread = torch.where(eta > 0, (posterior.temperature / (2 * eta)).sqrt(), torch.ones_like(eta))
    return Starts(start, spread[:, None, None].expand(shape[1:]))


def overdispersed_starts(posterior: Posterior, chains: int, generator: torch.Generator) -> Starts:
    """Chain 0 starts at the MAP, the next ones at every task vector in turn, and so on, all with noise.

    The noise is Gaussian with twice the standard deviations of the quadratic that majorises the energy at the MAP.

    Args:
        posterior: in Full or Span coordinates, proper without its factor experts.
        chains: ``C``.
        generator: source of the noise.

    Returns:
        The starts.

    Raises:
        ValueError: the modules' operators do not share a factorisation (Full coordinates only).
    """
    mode = (minimize(posterior) if posterior.factors else solve_posterior(posterior)).value.to(posterior.dtype)
    by_update = {expert.update_name: expert.update for expert in posterior.experts}
    centers = [mode, *by_update.values()]
    noise = _noise(posterior, mode, chains, generator)
    points = torch.stack([centers[chain % len(centers)] for chain in range(chains)]) + SPREAD * noise
    return Starts(points, noise.square().mean(0).sqrt())


def _noise(posterior: Posterior, mode: Tensor, chains: int, generator: torch.Generator) -> Tensor:
    """Draws of ``N(0, T H^-1 / 2)`` with ``H = sum_i w_i P_i + eta I`` at the mode, ``(C, M, *event)``."""
    quadratic = quadratic_of(posterior, for_draws=True)
    weights = posterior.weights(posterior.residuals(mode))
    precision = quadratic.precision(weights, posterior.anchor_precision)
    shape = (chains, posterior.num_modules, *posterior.event_shape)
    noise = torch.randn(shape, generator=generator, dtype=mode.dtype, device=mode.device)
    white = quadratic.compression.compress(noise)
    draws = quadratic.lift(precision.sample(white))
    if not quadratic.compression.trivial:
        eta = posterior.anchor_precision
        alone = torch.where(eta > 0, eta.rsqrt(), torch.zeros_like(eta))  # directions that only the anchor holds
        draws = draws + (noise - quadratic.lift(white)) * alone.to(noise.dtype)[:, None, None]
    return draws * (posterior.temperature / 2) ** 0.5
