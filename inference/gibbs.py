r"""Exact Gibbs sampling of heavy-tailed products by Gaussian scale mixtures: no tuning, no rejections.

``(1 + q / s^2)^(-kappa / T) = E[exp(-tau q / s^2)]`` over ``tau ~ Gamma(kappa / T, 1)``, so with one ``tau`` per expert
two exact draws alternate (Andrews and Mallows, 1974, JRSS B 36(1); West, 1987, Biometrika 74(3)):

    tau_i | Z ~ Gamma(kappa_i / T, rate 1 + q_i / s_i^2)
    Z | tau   ~ N(H^-1 b, H^-1 / 2),   H = sum_i (tau_i / s_i^2) P_i + (eta / T) I

with ``kappa_i = a_i k`` and, for a Student-t, ``nu s_i^2`` in the place of ``s_i^2``. The fixed point is its EM shadow:
the same ``H`` and ``b`` with the expected weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from inference.chains import Kernel, Progress, stored_draws
from inference.draws import Draws
from inference.propriety import require_proper
from inference.units import own_units
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior
from poe_models.sums import sum_of_squares


def gibbs(
    posterior: Posterior,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    progress: Progress | None = None,
) -> Draws:
    """Draws of a posterior by Gibbs sampling.

    Args:
        posterior: In Full or Span coordinates; every energy must be Gaussian, Cauchy or Student-t.
        num_samples: Draws kept per chain.
        generator: Source of all randomness, on the posterior's device.
        chains: Independent chains, from overdispersed starts.
        warmup: Steps per chain before the first kept draw.
        thin: Steps per kept draw.
        progress: Called with the number of finished steps and their total.

    Returns:
        Draws of the latents ``(C, S, M, *event)``. In Span coordinates they are kept as they are, in Full ones as
        mixture weights and seeds, from which ``latents(chain, draw)`` makes merged updates again.

    Raises:
        ValueError: If an energy has no scale mixture, the posterior is improper or has factor experts, its modules'
            operators do not share a factorisation, or a count cannot be used.
    """
    kernel = GibbsKernel(posterior)
    draws = stored_draws(
        kernel, num_samples, generator=generator, chains=chains, warmup=warmup, thin=thin, progress=progress
    )
    if not kernel.regenerable:
        return draws
    lp, seeds = draws.stats["lp"], draws.stats["seeds"]
    return replace(draws, stats={"lp": lp}, seeds=seeds, regenerate=regenerate_with(posterior))


def regenerate_with(posterior: Posterior) -> Callable[[int, Tensor, int], Tensor]:
    """A function that makes a module's merged update from its position, mixture weights ``(E,)`` and seed.

    One module at a time, whatever batch it was drawn in, because batched linear algebra may round differently.
    """
    singles: dict[int, GibbsKernel] = {}

    def regenerate(module: int, weights: Tensor, seed: int) -> Tensor:
        if module not in singles:
            singles[module] = GibbsKernel(posterior.module(module))
        return singles[module].regenerate(weights, seed)

    return regenerate


@dataclass(frozen=True, eq=False)
class GibbsState:
    """Residuals ``q_i`` of ``C`` chains, ``(C, M, E)``: all that the next mixture weights depend on."""

    residuals: Tensor


@dataclass(frozen=True, eq=False)
class GibbsInfo:
    """Draw of one step.

    Attributes:
        z: Latents, ``(C, M, *event)``; empty where they can be regenerated.
        energy: ``E(Z)`` in nats, ``(C, M)``.
        weights: Mixture weights that ``Z`` was drawn with, ``(C, M, E)``.
        seeds: Seed of the noise of each chain and module, ``(C, M)`` int64; empty where latents are kept.
    """

    z: Tensor
    energy: Tensor
    weights: Tensor
    seeds: Tensor


class GibbsKernel(Kernel[GibbsState, GibbsInfo]):
    """Exact Gibbs steps for all chains and modules of a posterior.

    In Full coordinates the noise of every chain and module has a seed of its own, so that a latent can be made again
    from its mixture weights and seed instead of being kept.

    Raises:
        ValueError: If an energy has no scale mixture, the posterior is improper, or its modules' operators do not share
            a factorisation.
    """

    name = "gibbs"
    function = "gibbs"

    def __init__(self, posterior: Posterior) -> None:
        if posterior.factors:
            raise ValueError(
                f"`gibbs(...)`: {posterior.factors[0].name!r} is a FactorExpert, which has no Gaussian scale mixture. "
                "Use `slice_sample` or `nuts` in Span coordinates."
            )
        for expert in posterior.experts:
            expert.rho.scale_mixture()  # or an error that names the energy
        self.own = own_units(posterior, "gibbs")
        posterior = self.posterior = self.own.posterior
        require_proper(posterior)
        self.regenerable = posterior.span is None
        self.quadratic = quadratic_of(posterior, for_draws=True)
        self.pulls = self.quadratic.pulls()
        self.ridge = posterior.anchor_precision / posterior.temperature
        self.power = torch.ones_like(self.ridge) / posterior.temperature

    @override
    def init(self, chains: int, generator: torch.Generator) -> GibbsState:
        """Mixture weights from their priors, then ``Z`` given them."""
        shape = (chains, self.posterior.num_modules, len(self.posterior.experts))
        zeros = torch.zeros(shape, dtype=torch.float64, device=self.ridge.device)
        return self.step(GibbsState(zeros), generator)[0]

    @override
    def step(self, state: GibbsState, generator: torch.Generator) -> tuple[GibbsState, GibbsInfo]:
        """``tau | Z``, then ``Z | tau``."""
        weights = draw_weights(self.posterior, state.residuals, self.power, generator)
        noise, seeds = self._fresh_noise(len(weights), generator)
        white = self.quadratic.compression.compress(noise)
        x = self._conditional(weights, white)
        residuals = self.quadratic.residuals(x)
        # Outside the compressed coordinates Z is white noise of variance 1 / (2 ridge), which costs T / 2 per unit.
        outside = (sum_of_squares(noise) - sum_of_squares(white)) * self.posterior.temperature / 2
        energy = self.posterior.energy_of(residuals) + self.posterior.anchor_precision * sum_of_squares(x) + outside
        z = noise.new_empty(0) if self.regenerable else self._latent(x, noise, white)
        return GibbsState(residuals), GibbsInfo(z, energy, weights, seeds)

    @override
    def latents(self, state: GibbsState, info: GibbsInfo) -> Tensor:
        """The latents, or the mixture weights ``(C, M, E)`` that they are made again from, with seeds in ``stats``."""
        return info.weights if self.regenerable else info.z

    @override
    def stats(self, state: GibbsState, info: GibbsInfo) -> dict[str, Tensor]:
        lp = {"lp": -info.energy / self.posterior.temperature}
        return lp | {"seeds": info.seeds} if self.regenerable else lp

    def regenerate(self, weights: Tensor, seed: int) -> Tensor:
        """``Z`` of a posterior of one module from its mixture weights ``(E,)`` and seed, ``(*event)``."""
        noise = self._noise(torch.tensor([seed]))
        white = self.quadratic.compression.compress(noise)
        return self._latent(self._conditional(weights.unsqueeze(0), white), noise, white).squeeze(0)

    def conditional_mean(self, weights: Tensor) -> Tensor:
        """``E[Z | tau] = H^-1 b`` given mixture weights ``(*C, M, E)``, ``(*C, M, *event)``."""
        like = self.posterior.like
        still = like.new_zeros(*weights.shape[:-1], *self.posterior.event_shape)
        white = self.quadratic.compression.compress(still)
        return self._latent(self._conditional(weights, white), still, white)

    def conditional_variance(self, weights: Tensor, direction: Tensor) -> Tensor:
        """Variance of ``<Z, direction>`` given mixture weights, ``(*C, M, E)`` and ``(M, *event)`` to ``(*C, M)``."""
        seen = self.quadratic.compression.compress(direction)
        solved = self.quadratic.precision(weights, self.ridge).solve(seen.expand(*weights.shape[:-1], *seen.shape[-2:]))
        inside = (seen.double() * solved.double()).sum((-2, -1)) / 2
        outside = (sum_of_squares(direction) - sum_of_squares(seen)).clamp(min=0)
        return (inside + outside * anchor_spread(self.ridge).square()) * self.own.units.square()

    def _fresh_noise(self, chains: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Standard normal noise ``(C, M, *event)``, and its seeds ``(C, M)`` where a latent is to be made again."""
        like, size = self.posterior.like, (chains, self.posterior.num_modules)
        if self.regenerable:
            seeds = torch.randint(2**62, size, generator=generator, device=generator.device).cpu()
            return torch.stack([self._noise(row) for row in seeds]), seeds
        shape = (*size, *self.posterior.event_shape)
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return noise, torch.empty(0, dtype=torch.int64)

    def _conditional(self, weights: Tensor, white: Tensor) -> Tensor:
        """``H^-1 b + L^-T white / sqrt 2``: weights ``(*C, M, E)`` and noise ``(*C, M, a, b)`` to ``(*C, M, a, b)``."""
        precision = self.quadratic.precision(weights, self.ridge)
        b = torch.zeros_like(white)
        for i, pull in enumerate(self.pulls):
            b = b + weights[..., i].to(pull.dtype)[..., None, None] * pull
        return precision.solve(b) + precision.sample(white) * 0.5**0.5

    def _latent(self, x: Tensor, noise: Tensor, white: Tensor) -> Tensor:
        """The latent of compressed ``x``, with the anchor's own noise where no expert sees anything."""
        z = self.quadratic.lift_draws(x, noise, white, anchor_spread(self.ridge))
        return self.own.back(z if self.posterior.center is None else self.posterior.center + z)

    def _noise(self, seeds: Tensor) -> Tensor:
        """Standard normal noise of one chain from a seed per module, ``(M,)`` to ``(M, *event)``."""
        return torch.stack([seeded_noise(int(seed), self.posterior.event_shape, self.posterior.like) for seed in seeds])


def draw_weights(posterior: Posterior, residuals: Tensor, power: Tensor, generator: torch.Generator) -> Tensor:
    """Mixture weights ``tau_i / (unit s_i^2)`` given residuals ``q_i``, for the density ``exp(-power E_i)``.

    Both are ``(*C, M, E)``, ``power = 1 / T`` is ``(M,)``; a weight is zero where its expert drops out.
    """
    columns = []
    for i, expert in enumerate(posterior.experts):
        mixture = expert.rho.scale_mixture()
        strength = power * expert.importance
        scale = torch.as_tensor(mixture.unit, dtype=residuals.dtype, device=residuals.device) * expert.scale_squared
        if mixture.shape is None:
            weight = (strength / scale).expand(residuals.shape[:-1])
        else:
            rate = 1 + residuals[..., i] / scale
            shape = (strength * torch.as_tensor(mixture.shape, device=rate.device)).expand_as(rate)
            # The distribution objects take no generator; this is the kernel beneath torch.distributions.Gamma.
            weight = torch._standard_gamma(shape.contiguous(), generator=generator) / rate / scale
        columns.append(torch.where(expert.active, weight, 0.0))
    return torch.stack(columns, -1)


def anchor_spread(ridge: Tensor) -> Tensor:
    """Standard deviation ``(2 ridge)^-1/2`` in directions that only the anchor holds; ``(M,)``.

    Zero without an anchor: a proper posterior has no such directions then, and what is left of the noise is rounding.
    """
    return torch.where(ridge > 0, (2 * ridge).rsqrt(), torch.zeros_like(ridge))


def seeded_noise(seed: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Standard normal noise that a seed alone decides, on the device and in the dtype of ``like``."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
