r"""Laplace's approximation with the exact Hessian, in the structure it has.

At ``Z`` the energy's Hessian is ``2 (sum_i w_i P_i + eta I) + sum_i c_i g_i g_i^T`` with ``g_i = 2 P_i (Z - U_i)`` and
``c_i = a_i rho''_i / s_i^4``: a Gram, Kronecker-sum or diagonal matrix and one rank-one term per expert, negative for
heavy tails. Sampling, densities and determinants need the factors of the small side and an ``E x E`` correction. The
approximation is ``N(Z*, T Hessian^-1)`` (MacKay, 1992, Neural Computation 4(3)).
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from inference.draws import Draws
from inference.gibbs import anchor_spread, seeded_noise
from inference.map import fixed_point
from inference.propriety import require_proper
from inference.solution import FixedPointInfo, MinimizeInfo, Solution
from inference.summed_residuals import SummedResiduals
from inference.units import own_units
from poe_models.least_squares import quadratic_of
from poe_models.module_names import naming
from poe_models.posterior import Posterior
from poe_models.precisions import DiagonalPrecision, GramPrecision, LowRankUpdate
from poe_models.program import log_density
from poe_models.sums import sum_of_squares


def laplace(posterior: Posterior, at: Solution[FixedPointInfo] | Solution[MinimizeInfo] | None = None) -> Laplace:
    """Laplace's approximation of a posterior without factor experts, at its MAP, which by default is solved for.

    A warning says so if the MAP had not converged.

    Raises:
        ValueError: If ``at`` is of other modules, its Hessian is not positive definite, or the posterior is improper.
    """
    at = fixed_point(posterior) if at is None else at
    expected = (posterior.num_modules, *posterior.event_shape)
    if tuple(at.value.shape) != expected:
        raise ValueError(
            f"`laplace(at=...)`: a solution of shape {tuple(at.value.shape)} for a posterior with latents {expected}. "
            "Solve this posterior first."
        )
    loose = [index for index, status in enumerate(at.status) if not status.converged]
    if loose:
        warnings.warn(
            f"`laplace(at=...)`: the MAP of {', '.join(map(posterior.label, loose))} had not converged "
            f"({at.status[loose[0]]}), so that the approximation is centred beside the mode.",
            stacklevel=2,
        )
    return Laplace(posterior, at.value.to(posterior.dtype))


class Laplace:
    """``N(Z*, T Hessian^-1)`` of a posterior without factor experts, at a mode ``Z*``, ``(M, *event)``.

    Raises:
        ValueError: If the Hessian is not positive definite at the mode, or the posterior is improper.
    """

    def __init__(self, posterior: Posterior, mode: Tensor) -> None:
        if posterior.factors:
            raise ValueError(
                f"`Laplace(...)`: {posterior.factors[0].name!r} is a FactorExpert; its Hessian has no structure: "
                "use `DenseLaplace`, which differentiates the Pyro program."
            )
        self.posterior, self.mode = posterior, mode
        self._own = own_units(posterior, "Laplace")
        posterior = self._posterior = self._own.posterior
        require_proper(posterior)
        mode = self._mode = self._own.latents(mode)
        self.quadratic = quadratic_of(posterior, for_draws=True)
        x = self.quadratic.compression.compress(mode if posterior.center is None else mode - posterior.center)
        q = SummedResiduals(posterior, self.quadratic, self.quadratic.pulls()).at(x)
        base = self.quadratic.precision(2 * posterior.weights(q), 2 * posterior.anchor_precision)
        with naming(posterior.modules):
            slopes = (each.mul_(2) for each in self.quadratic.forces(x))  # one in memory at a time
            self.hessian = LowRankUpdate(base, slopes, posterior.curvatures(q))

    @override
    def __repr__(self) -> str:
        return f"Laplace({self.posterior})"

    def sample(self, num_samples: int, generator: torch.Generator) -> Draws:
        """Independent draws in one chain, kept as seeds."""
        modules = self._posterior.num_modules
        size = (1, num_samples, modules)
        seeds = torch.randint(2**62, size, generator=generator, device=generator.device).cpu()
        alone = [self] if modules == 1 and not self._own.changed else None
        singles = alone or [Laplace(self._posterior.module(m), self._mode[m : m + 1]) for m in range(modules)]
        drawn = Draws(
            torch.zeros(*size, 0),
            sampler="laplace",
            temperature=self._posterior.fixed_temperature,
            seeds=seeds,
            regenerate=lambda m, _, seed: singles[m].draw(seed),
        )
        return self._own.draws(drawn)

    def draw(self, seed: int) -> Tensor:
        """One draw of a posterior of one module from a seed, ``(*event)``."""
        noise = seeded_noise(seed, self._posterior.event_shape, self._mode).unsqueeze(0)
        white = self.quadratic.compression.compress(noise)
        spread = anchor_spread(self._posterior.anchor_precision)
        z = self.quadratic.lift_draws(self.hessian.sample(white), noise, white, spread)
        torch.add(self._mode, z, alpha=self._posterior.fixed_temperature**0.5, out=z)
        return self._own.back(z).squeeze(0)

    def log_density(self, z: Tensor) -> Tensor:
        """Normalised log density of the approximation in nats, ``(*S, M, *event)`` to ``(*S, M)``."""
        displacement = self._own.latents(z) - self._mode
        x = self.quadratic.compression.compress(displacement)
        distance = sum_of_squares(self.hessian.standardize(x))
        if not self.quadratic.compression.trivial:
            outside = sum_of_squares(displacement) - sum_of_squares(x)
            distance = distance + 2 * self._posterior.anchor_precision * outside
        return -distance / (2 * self._posterior.temperature) - self._log_volume()

    def log_integral(self) -> Tensor:
        """Approximate log of the integral of ``exp(-E(Z) / T)`` in nats, ``(M,)``; exact for Gaussian energies."""
        return self._log_volume() - self._posterior.energy(self._mode) / self._posterior.temperature

    def standard_deviations(self) -> Tensor:
        """Marginal standard deviations of the latents, ``(M, *event)`` float64."""
        variance = self._base_variance().double() + self.hessian.inverse_diagonal_change(self.quadratic.lift)
        return self._own.back((self._posterior.temperature * variance).sqrt())

    def _log_volume(self) -> Tensor:
        """Log of the Gaussian's integral, ``log sqrt(det(2 pi T Hessian^-1))``, ``(M,)``."""
        entries, inside = math.prod(self._posterior.event_shape), math.prod(self.quadratic.event_shape)
        log_determinant = self.hessian.logdet()
        if entries > inside:
            log_determinant = log_determinant + (entries - inside) * torch.log(2 * self._posterior.anchor_precision)
        unit = entries * self._own.units.log()
        return entries / 2 * math.log(2 * math.pi * self._posterior.temperature) - log_determinant / 2 + unit

    def _base_variance(self) -> Tensor:
        """Marginal variances without the rank-one terms, in the posterior's own coordinates."""
        compression, base = self.quadratic.compression, self.hessian.base
        flat = None if compression.flat is None else compression.flat.dense().to(self._mode.dtype)
        bases = [b for b in (compression.left, compression.right, flat) if b is not None]
        if not bases:
            return base.inverse_diagonal()
        # Draws compress at most one side, and then every expert acts on it: one small covariance, the anchor elsewhere.
        (basis,) = bases
        assert isinstance(base, GramPrecision)
        inside = ((basis @ base.side_covariance()) * basis).sum(-1)
        alone = anchor_spread(self._posterior.anchor_precision).square().to(basis.dtype)
        outside = (1 - basis.square().sum(-1)) * alone[:, None]
        variance = inside + outside
        if flat is not None:
            return variance.unflatten(-1, self._posterior.event_shape)
        column = variance.unsqueeze(-1) if compression.left is not None else variance.unsqueeze(-2)
        return column.expand(-1, *self._posterior.event_shape)


class DenseLaplace:
    """``N(x*, T Hessian^-1)`` over all modules together, at a mode ``x*``, ``(M, *event)``; for a few coordinates.

    The Hessian is that of the Pyro program by autograd, so there may be factor experts, also such that couple modules;
    or it is given: of ``E / T``, ``(M K, M K)``, as the Gauss-Newton matrix of functional experts is.

    Raises:
        ValueError: If the Hessian is not positive definite at the mode, or the temperature is a tensor.
    """

    def __init__(self, posterior: Posterior, mode: Tensor, hessian: Tensor | None = None) -> None:
        _ = posterior.fixed_temperature  # or its error
        self.posterior = posterior
        self.mode = mode
        if hessian is None:
            density = log_density(posterior, joint=True)
            hessian = torch.func.hessian(lambda x: -density(x.view(mode.shape)))(mode.double().flatten())
        values, self.vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        if not bool((values > 0).all()):
            raise ValueError(
                f"`DenseLaplace(...)`: not at a minimum: the Hessian has the eigenvalue {float(values.min()):.3g}. "
                "Converge `minimize` first, or start it elsewhere."
            )
        self.precision = DiagonalPrecision(values.unsqueeze(-1), (len(values), 1))

    @override
    def __repr__(self) -> str:
        return f"DenseLaplace({self.posterior})"

    def sample(self, num_samples: int, generator: torch.Generator) -> Draws:
        """Independent draws of all latents in one chain, kept as they are."""
        shape = (num_samples, len(self.vectors), 1)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=self.vectors.device)
        values = self.mode + (self.vectors @ self.precision.sample(noise)).view(num_samples, *self.mode.shape)
        return Draws(values.unsqueeze(0), sampler="laplace", temperature=self.posterior.fixed_temperature)

    def tempered(self, temperature: float) -> DenseLaplace:
        """The approximation at another temperature: the same mode, the covariance times the ratio of both."""
        found = copy.copy(self)
        found.posterior = replace(self.posterior, temperature=temperature)
        ratio = self.posterior.fixed_temperature / found.posterior.fixed_temperature
        values, shape = ratio * self.precision.values, self.precision.shape
        found.precision = DiagonalPrecision(values, shape)
        return found

    def log_density(self, x: Tensor) -> Tensor:
        """Normalised log density in nats, ``(*S, M, *event)`` to ``(*S)``."""
        displacement = (x - self.mode).flatten(-3).unsqueeze(-1)
        distance = sum_of_squares(self.precision.standardize(self.vectors.mT @ displacement))
        return -distance / 2 - self._log_volume()

    def log_integral(self) -> Tensor:
        """Approximate log of the integral of ``exp(-E / T)`` over all latents in nats, a scalar."""
        return self._log_volume() - self.posterior.joint_energy(self.mode) / self.posterior.temperature

    def decrement(self, gradient: Tensor) -> float:
        """Newton's decrement ``g^T H^-1 g / 2`` in nats: how far the quadratic model falls from ``x*`` to its minimum.

        Args:
            gradient: Of ``E`` at ``x*``, ``(M, *event)``.
        """
        slope = gradient.double().reshape(-1, 1) / self.posterior.fixed_temperature
        return float(sum_of_squares(self.precision.whiten(self.vectors.mT @ slope))) / 2

    def standard_deviations(self) -> Tensor:
        """Marginal standard deviations, ``(M, *event)``."""
        variance = self.vectors.square() @ self.precision.inverse_diagonal()
        return variance.sqrt().view(self.mode.shape)

    def _log_volume(self) -> Tensor:
        return len(self.vectors) / 2 * math.log(2 * math.pi) - self.precision.logdet() / 2
