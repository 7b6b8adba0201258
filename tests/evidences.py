"""Designs, simulated updates and reference integrals for tests of the evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from typing_extensions import override

from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Energy,
    Gaussian,
    Gram,
    Identity,
    ProductOfExperts,
    ResidualMap,
)
from poe_models.operators import Diagonal
from poe_models.posterior import Posterior

NAMES = ["a", "b", "c"]


SKEWED = torch.tensor([[[[1.0, 0.2]], [[2.0, -1.5]], [[-0.5, 2.5]]]], dtype=torch.float64)


ETA = 0.5


Z = 4.9
"""Standard errors that a correct estimate exceeds once in a million."""


@dataclass(frozen=True)
class Fixed(ResidualMap):
    """A given covariance, whatever the update is."""

    covariance: Tensor

    @override
    def operator(self, update: Tensor) -> Gram:
        root = torch.linalg.cholesky(torch.linalg.inv(self.covariance))
        return Gram(root.expand(*update.shape[:-2], -1, -1), "right", (update.shape[-2], update.shape[-1]))


def design(energy: Energy, temperature: float = 1.0, eta: float = 0.05) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(eta))
    return ProductOfExperts.of(NAMES, Identity(), energy, Absolute(0.6), [1.0, 1.6, 2.0], anchor, temperature)


def plain(names: list[str], energy: Energy, gamma: float = 1.0) -> ProductOfExperts:
    return ProductOfExperts.of(
        names, Identity(), energy, Absolute(gamma), anchor=Anchor(precision=AbsolutePrecision(ETA))
    )


def simulate(modules: int, experts: int, size: int, nu: float, generator: torch.Generator) -> Tensor:
    """Updates of the model itself, Identity maps and `gamma = 1`, `(M, N, 1, D)`; infinite `nu` is normal."""
    z = torch.randn(modules, 1, 1, size, generator=generator, dtype=torch.float64) / math.sqrt(2 * ETA)
    noise = torch.randn(modules, experts, 1, size, generator=generator, dtype=torch.float64)
    mixing = torch.ones(modules, experts, 1, 1, dtype=torch.float64)
    if math.isfinite(nu):
        mixing = torch._standard_gamma(mixing * nu / 2, generator=generator) / (nu / 2)
    return z + noise / mixing.sqrt()


def closed_form(posterior: Posterior) -> Tensor:
    """Log density of everything that Gaussian experts see, as one joint normal over all experts, `(M,)`."""
    values = []
    temperature = float(posterior.temperature)
    for m in range(posterior.num_modules):
        shape = posterior.event_shape
        size = math.prod(shape)
        units = torch.eye(size, dtype=torch.float64).view(size, 1, *shape)
        prior = temperature / (2 * posterior.anchor_precision[m]) * torch.eye(size, dtype=torch.float64)
        center = torch.zeros(size, dtype=torch.float64) if posterior.center is None else posterior.center[m].flatten()
        seen, noise, data = [], [], []
        for expert in posterior.module(m).experts:
            matrix = expert.operator.apply(units).flatten(1)
            eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
            kept = eigenvalues > 1e-9 * eigenvalues.max()
            assert isinstance(expert.rho, Gaussian)
            precision = expert.importance * expert.rho.precision / temperature / float(expert.scale_squared)
            seen.append(vectors[:, kept].mT)
            noise.append(1 / (precision * eigenvalues[kept]))
            data.append(seen[-1] @ expert.update.flatten())
        rows = torch.cat(seen)
        covariance = rows @ prior @ rows.mT + torch.diag(torch.cat(noise))
        normal = torch.distributions.MultivariateNormal(rows @ center, covariance)
        values.append(normal.log_prob(torch.cat(data)))
    return torch.stack(values)


def grid_evidence(posterior: Posterior) -> float:
    """Integral over a two-dimensional latent of the normalised product by brute force, from scipy's densities."""
    axis = np.linspace(-20.0, 20.0, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    temperature = float(posterior.temperature)
    variance = temperature / (2 * float(posterior.anchor_precision))
    total = stats.multivariate_normal(np.zeros(2), variance * np.eye(2)).logpdf(grid)
    for expert in posterior.experts:
        scale, center = float(expert.scale_squared), expert.update.flatten().numpy()
        kappa = expert.importance * float(expert.rho.k) / temperature  # type: ignore[attr-defined]
        unit = scale * float(getattr(expert.rho, "df", 1.0))
        # (1 + |x|^2 / unit)^-kappa in two dimensions is a Student-t of 2 kappa - 2 degrees of freedom.
        df = 2 * kappa - 2
        total = total + stats.multivariate_t(center, unit / df * np.eye(2), df=df).logpdf(grid)
    step = axis[1] - axis[0]
    return float(np.logaddexp.reduce(total.ravel()) + 2 * math.log(step))


@dataclass(frozen=True)
class Columns(ResidualMap):
    """Elementwise weights, some zero: a Fisher map without statistics."""

    @override
    def operator(self, update: Tensor) -> Diagonal:
        values = torch.arange(update.shape[-1], dtype=update.dtype).expand(update.shape)
        return Diagonal(values.contiguous())
