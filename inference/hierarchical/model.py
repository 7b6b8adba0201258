r"""The Pyro model of shared scales and tails, with the merged updates integrated out.

A heavy-tailed expert is a Gaussian of unknown weight ``w_i`` (:mod:`inference.evidence.mixture_weights`), and given the
weights the merged update is Gaussian and integrated out (:mod:`inference.evidence.gaussian_integrals`). What is left
are ``gamma``,
``nu`` and one weight for every expert in every module:

    gamma ~ gamma_prior,  nu ~ df_prior
    w_i | gamma, nu ~ Gamma(alpha_i - D_i / 2, rate unit_i s_i(gamma)^2)
    log p(U | w) = sum_i (D_i log(w_i / pi) + log pdet P_i) / 2 + log int N(Z; Z_0) exp(-sum_i w_i q_i(Z)) dZ

with ``D_i = rank(P_i)`` and, for a Student-t of power ``c = a / T``, ``unit = nu`` and ``alpha = c (nu + D_i) / 2``.
Gaussian experts have the fixed weight ``c / (unit_i s_i(gamma)^2)``.

NUTS moves in ``white``, about standard normal whatever ``gamma`` and ``nu`` are and whether the updates know the
weights well (``D_i`` far above ``nu``) or hardly (below): near a reference the likelihood of one weight is about
``w^(d / 2) exp(-w r)``, conjugate to its prior, which gives ``log w = log(A / R) + white / sqrt(A)`` with
``A = alpha - D / 2 + d / 2`` and ``R = unit s^2 + r``. This is a change of variables with its Jacobian: the model is
the same whatever ``d`` and ``r`` are.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import override

from inference.evidence.direct_weights import typical_weights
from inference.evidence.estimate import dimensions, log_normalizers
from inference.evidence.gaussian_integrals import GaussianIntegral, gaussian_integral, in_float64
from inference.evidence.mixture_weights import per_module
from inference.evidence.module_batches import Updates, module_batches
from inference.hierarchical.requirements import (
    Shared,
    check_anchor,
    check_energies,
    check_mixtures,
    check_scales,
    shared_prior,
)
from poe_models.experts import ProductOfExperts


class HierarchicalModel:
    """The Pyro model: sites ``gamma``, ``nu`` (where the energy has it), ``white``, ``weights`` and ``updates``.

    ``weights`` (deterministic) are the experts' weights in every module, ``(M, E)``, and ``updates`` the factor of
    everything but the priors of ``gamma`` and ``nu``. Leading dimensions ``(*S)`` of all methods are draws.

    The arguments are those of :func:`~inference.hierarchical.sampler.hierarchical`.

    Raises:
        ValueError: If an expert is not a normalised density or no scale mixture, or a setting cannot be used.
    """

    def __init__(
        self,
        poe: ProductOfExperts,
        updates: Updates,
        shared: Shared = "model",
        gamma_prior: dist.TorchDistribution | None = None,
        df_prior: dist.TorchDistribution | None = None,
    ) -> None:
        self.shared: Shared = shared
        self.has_df = check_energies(poe)
        check_mixtures(poe)
        self.scale_power, own = check_scales(poe, shared)
        batches = list(module_batches(updates, (poe,)))
        self.modules = tuple(name for batch in batches for name in batch.names)
        self.experts = tuple(expert.name for expert in poe.experts)
        self.posteriors = [poe.bind(batch.updates) for batch in batches]
        check_anchor(self.posteriors, self.modules)
        for posterior in self.posteriors:
            log_normalizers(posterior)  # refuses experts that are not densities
        self.integrals = [gaussian_integral(posterior) for posterior in self.posteriors]
        self._prepare(own)
        size = {"model": (), "expert": (len(self.experts),), "module": (len(self.modules),)}[shared]
        reference = self.eta.new_tensor(own)
        center = (reference if shared == "expert" else reference[0]).log().expand(size)
        own_prior = dist.LogNormal(center, torch.ones_like(center)).to_event(len(size))
        self.gamma_prior = own_prior if gamma_prior is None else shared_prior("gamma_prior", gamma_prior, size)
        if df_prior is not None and not self.has_df:
            raise ValueError("`hierarchical(df_prior=...)`: no expert has a Student-t energy. Leave it out.")
        default = dist.Gamma(reference.new_tensor(2.0), reference.new_tensor(0.1))
        self.df_prior = shared_prior("df_prior", df_prior or default, size)
        self._prepare_white()

    def __call__(self) -> Tensor:
        """Run the model; returns the experts' weights ``(M, E)``."""
        gamma = pyro.sample("gamma", self.gamma_prior)
        nu = pyro.sample("nu", self.df_prior) if self.has_df else None
        white = pyro.sample("white", self.white_prior) if bool(self.free.any()) else None
        log_density, weights = self.log_density(gamma, nu, white)
        prior = 0.0 if white is None else self.white_prior.log_prob(white)
        pyro.factor("updates", log_density - prior)
        return pyro.deterministic("weights", weights)

    def log_density(self, gamma: Tensor, nu: Tensor | None, white: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log density of updates and ``white`` given ``gamma`` and ``nu``, and the weights.

        Args:
            gamma: ``(*S)``, ``(*S, E)`` or ``(*S, M)``, as ``shared`` says.
            nu: Of the same shape; None where no energy has degrees of freedom.
            white: ``(*S, M, E)``; None where all energies are Gaussian.

        Returns:
            Nats, ``(*S)``, ``-inf`` where a number is beyond what float64 holds; and ``(*S, M, E)``.
        """
        known = _inside(gamma) if nu is None else _inside(gamma) & _inside(nu)
        axes = () if self.shared == "model" else (-1,)
        known = known.all(axes) if axes else known
        gamma = torch.where(known[(..., *(None,) * len(axes))], gamma, 1.0)
        nu = None if nu is None else torch.where(known[(..., *(None,) * len(axes))], nu, 1.0)
        log_weights, log_prior = self._log_weights(gamma, nu, white)
        known = known & (log_weights.abs() < 600).all((-2, -1))
        log_weights = torch.where(known[..., None, None], log_weights, 0.0)
        weights = torch.where(self.seen, log_weights.exp(), 0.0)
        normal = torch.where(self.seen, self.rank / 2 * (log_weights - math.log(math.pi)) + self.half_volume, 0.0)
        parts = weights.split([posterior.num_modules for posterior in self.posteriors], -2)
        value = (normal + log_prior).sum((-2, -1))
        for integral, part in zip(self.integrals, parts, strict=True):
            value = value + integrated(part, integral).sum(-1)
        return torch.where(known & value.isfinite(), value, -math.inf), weights

    def weights(self, gamma: Tensor, nu: Tensor | None, white: Tensor | None) -> Tensor:
        """The experts' weights ``w_i``, ``(*S, M, E)``; zero where one is inactive. Arguments: :meth:`log_density`."""
        return torch.where(self.seen, self._log_weights(gamma, nu, white)[0].exp(), 0.0)

    def scale_squared(self, gamma: Tensor) -> Tensor:
        """``s_i^2``, ``(*S, M, E)``."""
        return self.unit * self.spread(gamma) ** self.scale_power

    def spread(self, shared: Tensor) -> Tensor:
        """A shared quantity as one per module and expert, broadcastable to ``(*S, M, E)``."""
        if self.shared == "model":
            return shared[..., None, None]
        return shared.unsqueeze(-2) if self.shared == "expert" else shared.unsqueeze(-1)

    def start(self) -> dict[str, Tensor]:
        """A start from the priors, in the unconstrained coordinates that NUTS moves in."""
        priors = {"gamma": self.gamma_prior}
        if self.has_df:
            priors["nu"] = self.df_prior
        if bool(self.free.any()):
            priors["white"] = self.white_prior
        values = {name: prior.sample().to(self.eta) for name, prior in priors.items()}
        return {name: torch.distributions.biject_to(priors[name].support).inv(value) for name, value in values.items()}

    def first_variances(self) -> dict[str, Tensor]:
        """Rough posterior variances of ``log gamma``, ``log nu`` and ``white``, by counting what is known of each."""
        axes = {"model": (0, 1), "expert": (0,), "module": (1,)}[self.shared]
        mixing = 0.1 if bool(self.free.any()) else 0.0  # a residual of a t(10) knows log gamma^2 no better than this
        known = torch.where(self.seen, 1 / (2 / self.rank.clamp(min=1) + 2 * mixing), 0.0).sum(axes)
        log_gamma = (1 / (self.scale_power**2 * known.clamp(min=0.25))).clamp(max=1) * 4
        residuals = self.seen.double().sum(axes)
        return {"gamma": log_gamma, "nu": (10 / residuals.clamp(min=1)).clamp(max=0.5), "white": self.eta.new_ones(())}

    def _log_weights(self, gamma: Tensor, nu: Tensor | None, white: Tensor | None) -> tuple[Tensor, Tensor]:
        """``log w`` and the log density of ``white`` by the weights' priors, both ``(*S, M, E)``."""
        shape, unit = self._mixture(nu)
        log_rate = unit.log() + self.scale_squared(gamma).log()
        fixed = self.power.log() - log_rate
        if white is None:
            return fixed, torch.zeros_like(fixed)
        rate = log_rate.exp()
        sharpness = shape + self.half_count
        log_weights = (sharpness / (rate + self.mean_residual)).log() + white * sharpness.rsqrt()
        prior = shape * (log_rate + log_weights) - rate * log_weights.exp() - torch.lgamma(shape)
        jacobian = -0.5 * sharpness.log()
        unused = -0.5 * (white.square() + math.log(2 * math.pi))
        log_density = torch.where(self.free, prior + jacobian, unused)
        return torch.where(self.free, log_weights, fixed), log_density

    def _mixture(self, nu: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shape of the weights' Gamma priors and unit of their rates, broadcastable to ``(*S, M, E)``."""
        if nu is None:
            return self.shape, self.mixture_unit
        df = self.spread(nu)
        return torch.where(self.free, (self.power * df + (self.power - 1) * self.rank) / 2, 1.0), df

    def _prepare(self, own_gamma: list[float]) -> None:
        """Compute everything that does not depend on the unknowns, for the modules of all batches."""
        posteriors = self.posteriors
        self.eta = torch.cat([posterior.anchor_precision for posterior in posteriors])
        self.rank = torch.cat([dimensions(posterior) for posterior in posteriors])
        self.seen = self.rank > 0
        self.power = self.eta.new_tensor([expert.importance for expert in posteriors[0].experts])
        self.power = self.power / float(posteriors[0].temperature)
        volumes = [torch.stack([e.operator.log_pseudo_determinant() for e in p.experts], -1) for p in posteriors]
        self.half_volume = torch.where(self.seen, torch.cat(volumes), 0.0) / 2
        scales = torch.cat([torch.stack([e.scale_squared for e in p.experts], -1) for p in posteriors])
        self.unit = scales / self.eta.new_tensor(own_gamma) ** self.scale_power
        mixtures = [[e.rho.scale_mixture() for e in p.experts] for p in posteriors]
        self.free = self.seen & torch.tensor([m.shape is not None for m in mixtures[0]], device=self.eta.device)
        rows = list(zip(posteriors, mixtures, strict=True))
        alpha = [[per_module(1.0 if m.shape is None else m.shape, p) for m in row] for p, row in rows]
        unit = [[per_module(m.unit, p) for m in row] for p, row in rows]
        self.shape = self.power * torch.cat([torch.stack(each, -1) for each in alpha])
        self.shape = torch.where(self.free, self.shape - self.rank / 2, 1.0)
        self.mixture_unit = torch.cat([torch.stack(each, -1) for each in unit])

    def _prepare_white(self) -> None:
        """The conjugate approximation ``w^(d / 2) exp(-w r)`` of each weight's likelihood, at typical weights."""
        zero = torch.zeros_like(self.rank)
        self.white_prior = dist.Normal(zero, torch.ones_like(zero)).to_event(2)
        counts, residuals = [], []
        for posterior, integral in zip(self.posteriors, self.integrals, strict=True):
            posterior = in_float64(posterior)
            start = torch.stack([posterior.residuals(e.update) for e in posterior.experts]).mean(0)
            weights = typical_weights(posterior, integral, start)
            mean, curvature = _mean_and_curvature(integral, weights)
            flat = (mean + weights * curvature).clamp(min=1e-3 * mean)
            counts.append(weights * (flat - mean))
            residuals.append(flat)
        self.mean_residual = torch.where(self.free, torch.cat(residuals), 1.0)
        half_count = self.rank / 2 + torch.cat(counts)
        self.half_count = torch.where(self.free, half_count.clamp(min=0.0), 1.0)


class _Integrated(torch.autograd.Function):
    """A Gaussian integral as a differentiable function of the weights."""

    @staticmethod
    @override
    def forward(ctx: Any, weights: Tensor, integral: GaussianIntegral) -> Tensor:
        value, slope = integral.value_and_slope(weights)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * slope, None


def integrated(weights: Tensor, integral: GaussianIntegral) -> Tensor:
    """The log integral over the merged update in nats, ``(*S, M, E)`` to ``(*S, M)``, differentiable once."""
    result: Tensor = _Integrated.apply(weights, integral)
    return result


def _mean_and_curvature(integral: GaussianIntegral, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``E[q_i]`` and its derivative in the expert's own weight, ``(M, E)`` each."""
    mean = -integral.value_and_slope(weights)[1]
    columns = []
    for i in range(weights.shape[-1]):
        step = torch.zeros_like(weights)
        step[..., i] = 1e-4 * weights[..., i]
        moved = -integral.value_and_slope(weights + step)[1]
        columns.append((moved - mean)[..., i] / step[..., i].clamp(min=torch.finfo(step.dtype).tiny))
    return mean, torch.stack(columns, -1)


def _inside(value: Tensor) -> Tensor:
    return (value > 0) & value.isfinite()
