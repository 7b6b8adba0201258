r"""Exact Gibbs sampling of heavy-tailed products by Gaussian scale mixtures: no tuning, no rejections.

``(1 + q / s^2)^(-kappa / T) = E[exp(-tau q / s^2)]`` over ``tau ~ Gamma(kappa / T, 1)``, so with one ``tau`` per expert
two exact draws alternate (Andrews and Mallows, 1974, JRSS B 36(1); West, 1987, Biometrika 74(3)):

    tau_i | Z ~ Gamma(kappa_i / T, rate 1 + q_i / s_i^2)
    Z | tau   ~ N(H^-1 b, H^-1 / 2),   H = sum_i (tau_i / s_i^2) P_i + (eta / T) I

with ``kappa_i = a_i k`` and, for a Student-t, ``nu s_i^2`` in the place of ``s_i^2``. The fixed point is its EM shadow:
the same ``H`` and ``b`` with the expected weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.chains import kept_states, require_counts
from inference.draws import Draws
from inference.inputs import unpack
from inference.propriety import require_proper
from poe_models.experts import ProductOfExperts
from poe_models.least_squares import quadratic_of
from poe_models.operators import sum_of_squares
from poe_models.posterior import Posterior, full_posterior
from poe_models.weights.task_vectors import ModuleUpdates


def gibbs(
    poe: ProductOfExperts,
    updates: Tensor | ModuleUpdates,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    low_rank: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Draws:
    """Draws of the merged update itself (Full coordinates), kept as mixture weights and seeds.

    Args:
        poe: the design; every energy must be Gaussian, Cauchy or Student-t.
        updates: ``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)`` in the order of ``poe.update_names``, or one module of
            a :class:`~poe_models.weights.task_vectors.TaskVectors`.
        num_samples: draws kept per chain.
        generator: source of all randomness, on the updates' device.
        chains: independent chains, from overdispersed starts.
        warmup: steps per chain before the first kept draw.
        thin: steps per kept draw.
        low_rank: factors of the updates, if they are adapters.
        progress: called with the number of finished steps and their total.

    Returns:
        Draws whose ``latents(chain, draw)`` are merged updates ``(M, d_out, d_in)``.

    Raises:
        ValueError: an energy has no scale mixture, or the posterior is improper.
    """
    posterior = full_posterior(*unpack(poe, updates, low_rank))
    kernel = GibbsKernel(posterior, regenerable=True)
    modules = range(posterior.num_modules)
    singles = [GibbsKernel(posterior.module(m), regenerable=True) for m in modules] if len(modules) > 1 else [kernel]
    weights, seeds, energies = [], [], []
    for state in _chains(kernel, num_samples, chains, warmup, thin, generator, progress):
        weights.append(state.weights)
        seeds.append(state.seeds)
        energies.append(state.energy)

    def regenerate(module: int, weight: Tensor, seed: int) -> Tensor:
        return singles[module].regenerate(weight, seed)

    statistics = {"lp": -torch.stack(energies, 1) / posterior.fixed_temperature}
    return Draws(
        torch.stack(weights, 1),
        statistics,
        "gibbs",
        posterior.fixed_temperature,
        seeds=torch.stack(seeds, 1),
        regenerate=regenerate,
    )


def gibbs_posterior(
    posterior: Posterior,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Draws:
    """Draws of a bound posterior in its own coordinates, stored as they are; meant for Span coordinates.

    Args:
        posterior: in Full or Span coordinates.
        num_samples: draws kept per chain.
        generator: source of all randomness.
        chains: independent chains, from overdispersed starts.
        warmup: steps per chain before the first kept draw.
        thin: steps per kept draw.
        progress: called with the number of finished steps and their total.

    Returns:
        Draws of the latents, ``(C, S, M, *event)``.
    """
    kernel = GibbsKernel(posterior, regenerable=False)
    values, energies = [], []
    for state in _chains(kernel, num_samples, chains, warmup, thin, generator, progress):
        values.append(state.z)
        energies.append(state.energy)
    statistics = {"lp": -torch.stack(energies, 1) / posterior.temperature}
    return Draws(torch.stack(values, 1), statistics, "gibbs", posterior.fixed_temperature)


def _chains(
    kernel: GibbsKernel,
    num_samples: int,
    chains: int,
    warmup: int,
    thin: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> Iterator[GibbsState]:
    """The states that are kept."""
    require_counts("gibbs", num_samples=num_samples, chains=chains, thin=thin, warmup=warmup)
    first = kernel.init(chains, generator)
    return kept_states(lambda state, _: kernel.step(state, generator), first, num_samples, warmup, thin, progress)


@dataclass(frozen=True, eq=False)
class GibbsState:
    """What ``C`` chains of ``M`` modules need.

    Attributes:
        z: the latents, ``(C, M, *event)``; empty where they can be regenerated.
        residuals: ``q_i``, ``(C, M, E)``.
        energy: ``E(Z)`` in nats, ``(C, M)``.
        weights: the mixture weights that ``Z`` was drawn with, ``(C, M, E)``.
        seeds: seed of the noise of each chain and module, ``(C, M)`` int64; empty where latents are kept.
    """

    z: Tensor
    residuals: Tensor
    energy: Tensor
    weights: Tensor
    seeds: Tensor


class GibbsKernel:
    """One exact Gibbs step for all chains and modules of a posterior.

    Args:
        posterior: in Full or Span coordinates.
        regenerable: give the noise of every chain and module a seed of its own, so that a latent can be made again from
            its mixture weights and seed instead of being kept.

    Raises:
        ValueError: an energy has no scale mixture, the posterior is improper, or its modules' operators do not share a
            factorisation.
    """

    def __init__(self, posterior: Posterior, regenerable: bool) -> None:
        if posterior.factors:
            raise ValueError(
                f"`gibbs(...)`: {posterior.factors[0].name!r} is a FactorExpert, which has no Gaussian scale mixture. "
                "Use `slice_sample` or `nuts` in Span coordinates."
            )
        for expert in posterior.experts:
            expert.rho.scale_mixture()  # or an error that names the energy
        require_proper(posterior)
        self.posterior = posterior
        self.regenerable = regenerable
        self.quadratic = quadratic_of(posterior, for_draws=True)
        self.pulls = self.quadratic.pulls()
        self.shift = posterior.anchor_precision / posterior.temperature
        self.power = torch.ones_like(self.shift) / posterior.temperature

    def init(self, chains: int, generator: torch.Generator) -> GibbsState:
        """Overdispersed start: mixture weights from their priors, then ``Z`` given them."""
        shape = (chains, self.posterior.num_modules, len(self.posterior.experts))
        zeros = torch.zeros(shape, dtype=torch.float64, device=self.shift.device)
        return self._draw(draw_weights(self.posterior, zeros, self.power, generator), generator)

    def step(self, state: GibbsState, generator: torch.Generator) -> GibbsState:
        """``tau | Z``, then ``Z | tau``."""
        return self._draw(draw_weights(self.posterior, state.residuals, self.power, generator), generator)

    def regenerate(self, weights: Tensor, seed: int) -> Tensor:
        """``Z`` of a posterior of one module from its mixture weights ``(E,)`` and seed, ``(*event)``.

        One module at a time, whatever batch it was drawn in, because batched linear algebra may round differently.
        """
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
        """Variance of ``<Z, direction>`` given mixture weights ``(*C, M, E)``, ``(*C, M)`` float64.

        Args:
            weights: of the ``P_i``, ``1 / T`` included.
            direction: ``(M, *event)``.
        """
        seen = self.quadratic.compression.compress(direction)
        solved = self.quadratic.precision(weights, self.shift).solve(seen.expand(*weights.shape[:-1], *seen.shape[-2:]))
        inside = (seen.double() * solved.double()).sum((-2, -1)) / 2
        outside = (sum_of_squares(direction) - sum_of_squares(seen)).clamp(min=0)
        return inside + outside * anchor_spread(self.shift).square()

    def _draw(self, weights: Tensor, generator: torch.Generator) -> GibbsState:
        """``Z | tau`` for all chains at once."""
        chains = len(weights)
        if self.regenerable:
            size = (chains, self.posterior.num_modules)
            seeds = torch.randint(2**62, size, generator=generator, device=generator.device).cpu()
            noise = torch.stack([self._noise(row) for row in seeds])
        else:
            seeds = torch.empty(0, dtype=torch.int64)
            like = self.posterior.like
            noise = torch.randn(
                (chains, self.posterior.num_modules, *self.posterior.event_shape),
                generator=generator, dtype=like.dtype, device=like.device,
            )  # fmt: skip
        white = self.quadratic.compression.compress(noise)
        x = self._conditional(weights, white)
        residuals = self.quadratic.residuals(x)
        # Outside the compressed coordinates Z is white noise of variance 1 / (2 shift), which costs T / 2 per unit.
        outside = (sum_of_squares(noise) - sum_of_squares(white)) * self.posterior.temperature / 2
        energy = self.posterior.energy_of(residuals) + self.posterior.anchor_precision * sum_of_squares(x) + outside
        z = noise.new_empty(0) if self.regenerable else self._latent(x, noise, white)
        return GibbsState(z, residuals, energy, weights, seeds)

    def _conditional(self, weights: Tensor, white: Tensor) -> Tensor:
        """``H^-1 b + L^-T white / sqrt 2``: weights ``(*C, M, E)`` and noise ``(*C, M, a, b)`` to ``(*C, M, a, b)``."""
        precision = self.quadratic.precision(weights, self.shift)
        b = torch.zeros_like(white)
        for i, pull in enumerate(self.pulls):
            b = b + weights[..., i].to(pull.dtype)[..., None, None] * pull
        return precision.solve(b) + precision.sample(white) * 0.5**0.5

    def _latent(self, x: Tensor, noise: Tensor, white: Tensor) -> Tensor:
        """The latent of compressed ``x``, with the anchor's own noise where no expert sees anything."""
        z = self.quadratic.lift(x)
        if not self.quadratic.compression.trivial:
            outside = noise - self.quadratic.lift(white)
            z = z + outside * anchor_spread(self.shift).to(z.dtype)[:, None, None]
        return z if self.posterior.center is None else self.posterior.center + z

    def _noise(self, seeds: Tensor) -> Tensor:
        """Standard normal noise of one chain from a seed per module, ``(M,)`` to ``(M, *event)``."""
        return torch.stack([seeded_noise(int(seed), self.posterior.event_shape, self.posterior.like) for seed in seeds])


def draw_weights(posterior: Posterior, residuals: Tensor, power: Tensor, generator: torch.Generator) -> Tensor:
    """Mixture weights ``tau_i / (unit s_i^2)`` given ``Z``, for the density ``exp(-power E_i)`` of every expert.

    Args:
        posterior: every energy has a Gaussian scale mixture.
        residuals: ``q_i``, ``(*C, M, E)``.
        power: ``1 / T``, ``(M,)``.
        generator: source of the ``tau_i``.

    Returns:
        Weights of the ``P_i``, ``(*C, M, E)``; zero where an expert drops out.
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


def anchor_spread(shift: Tensor) -> Tensor:
    """Standard deviation ``(2 shift)^-1/2`` in directions that only the anchor holds; ``(M,)``.

    Zero without an anchor: a proper posterior has no such directions then, and what is left of the noise is rounding.
    """
    return torch.where(shift > 0, (2 * shift).rsqrt(), torch.zeros_like(shift))


def seeded_noise(seed: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Standard normal noise that a seed alone decides, on the device and in the dtype of ``like``."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
