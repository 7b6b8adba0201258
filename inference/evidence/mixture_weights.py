r"""The posterior of the experts' mixture weights, the merged update integrated out: ``N`` numbers a module.

A heavy-tailed expert is a Gaussian of unknown weight, ``exp(-E_i / T) = E[exp(-tau_i q_i / unit_i)]`` over
``tau_i ~ Gamma(alpha_i, 1)``. In ``u = log tau``, with ``w_i = tau_i / unit_i`` (fixed for Gaussian experts),

    log p(u) = sum_i (alpha_i u_i - e^{u_i} - log Gamma(alpha_i)) + log int N(Z; Z_0) exp(-sum_i w_i q_i(Z)) dZ

whose integral over ``u`` is that of the anchor times all ``exp(-E_i / T)`` over ``Z``. The second term is
:mod:`inference.evidence.gaussian_integrals`. The target may have several modes: experts that contradict each other are
believed in turns. So it is climbed from several starts, and importance samples come from a mixture of multivariate t
distributions at whatever was found. Where some weights are much larger than the others, all samples are drawn again
with one more component, at the largest weight (Raftery and Bao, 2010, Biometrics 66(4)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.evidence.gaussian_integrals import GaussianIntegral, gaussian_integral
from inference.evidence.importance import ROUNDS, importance_mean
from poe_models.posterior import Posterior
from poe_models.records import joined

MOST_STEPS = 60
LONGEST_STEP = 2.0
"""Newton steps are cut to this length in ``log tau``."""
DIFFERENCE = 1e-5
"""Step of the finite differences of the gradient, for the Hessian."""
EM_STEPS = 4
SAME = 0.1
"""Starts that are no further apart in any ``log tau`` have met: the target's modes are of the order of 1 apart."""
CONVERGED = 1e-6
"""Nats that a Newton step may still promise."""
HEAVIER = 5.0
"""Degrees of freedom of the proposals, beside the number of weights."""
LEAST_CURVATURE = 0.1
"""Of a proposal: no component has a standard deviation above 3 in ``log tau``."""
CHUNK = 2**25
"""Numbers (of eight bytes) that one evaluation may hold."""


@dataclass(frozen=True, eq=False)
class WeightTarget:
    """The collapsed target of ``M`` modules in ``F`` log mixture weights.

    Attributes:
        integral: Over the merged update.
        shape: ``alpha_i`` of the ``F`` experts that have a mixture, ``(M, F)``.
        unit: Their ``unit_i``, ``(M, F)``.
        fixed: Weights of all experts, where the others have theirs, ``(M, E)``.
        free: Places of the ``F`` experts among all.
    """

    integral: GaussianIntegral
    shape: Tensor
    unit: Tensor
    fixed: Tensor
    free: tuple[int, ...]

    def weights(self, u: Tensor) -> Tensor:
        """Weights of the ``P_i``, ``(*S, M, F)`` to ``(*S, M, E)``."""
        weights = self.fixed.expand(*u.shape[:-1], -1).clone()
        weights[..., list(self.free)] = u.exp() / self.unit
        return weights

    def log_density(self, u: Tensor) -> Tensor:
        """``log p(u)`` in nats, ``(*S, M, F)`` to ``(*S, M)``; ``-inf`` where ``tau`` is not finite."""
        prior = self._prior(u)
        known = prior.isfinite()
        parts = self._chunks(torch.where(known.unsqueeze(-1), u, 0.0))
        value = torch.cat([self.integral.value(self.weights(part)) for part in parts]).reshape(prior.shape)
        return torch.where(known, prior + value, -math.inf)

    def log_density_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(u)`` and its gradient, ``(*S, M)`` and ``(*S, M, F)``."""
        pairs = [self.integral.value_and_slope(self.weights(part)) for part in self._chunks(u)]
        value = torch.cat([value for value, _ in pairs]).reshape(u.shape[:-1])
        slope = torch.cat([slope[..., list(self.free)] for _, slope in pairs]).reshape(u.shape)
        tau = u.exp()
        return self._prior(u) + value, self.shape - tau + slope * tau / self.unit

    def hessian(self, u: Tensor) -> Tensor:
        """Second derivatives by differences of the gradient, ``(*S, M, F)`` to ``(*S, M, F, F)``."""
        slope = self.log_density_and_slope(u)[1]
        steps = DIFFERENCE * torch.eye(u.shape[-1]).to(u)
        rough = torch.stack([self.log_density_and_slope(u + step)[1] - slope for step in steps], -1) / DIFFERENCE
        return (rough + rough.mT) / 2

    def _prior(self, u: Tensor) -> Tensor:
        return (self.shape * u - u.exp() - torch.lgamma(self.shape)).sum(-1)

    def _chunks(self, u: Tensor) -> Iterator[Tensor]:
        flat = u.reshape(-1, *u.shape[-2:])
        return iter(flat.split(max(1, CHUNK // (self.integral.size * u.shape[-2]))))


def weight_target(posterior: Posterior) -> WeightTarget:
    """The collapsed target of modules in which every expert is active; ``free`` is empty if all are Gaussian.

    Raises:
        ValueError: If an energy has no scale mixture, or the operators of one module do not share a factorisation.
    """
    shapes, units, fixed, free = [], [], [], []
    for place, expert in enumerate(posterior.experts):
        mixture, power = expert.rho.scale_mixture(), expert.importance / posterior.fixed_temperature
        unit = per_module(mixture.unit, posterior) * expert.scale_squared
        fixed.append(power / unit)
        if mixture.shape is not None:
            free.append(place)
            shapes.append(power * per_module(mixture.shape, posterior))
            units.append(unit)
    empty = posterior.anchor_precision.new_zeros(posterior.num_modules, 0)
    return WeightTarget(
        gaussian_integral(posterior),
        torch.stack(shapes, -1) if free else empty,
        torch.stack(units, -1) if free else empty,
        torch.stack(fixed, -1),
        tuple(free),
    )


def starts(target: WeightTarget, posterior: Posterior) -> Tensor:
    """Starts of the climbs, ``(K, M, F)``.

    The best weights for the merge at each expert's update, for none at all, and for the one of Gaussian twins, after a
    few steps of expectation maximisation; ``K`` is less than these ``E + 2`` where some have met.
    """
    center = torch.zeros_like(posterior.like) if posterior.center is None else posterior.center
    residuals = [posterior.residuals(z) for z in (center, *(expert.update for expert in posterior.experts))]
    twins = target.weights(target.shape.log())
    residuals.append(-target.integral.value_and_slope(twins)[1])
    u = _best_weights(target, torch.stack(residuals))
    for _ in range(EM_STEPS):
        u = _best_weights(target, -target.integral.value_and_slope(target.weights(u))[1])
    kept: list[Tensor] = []
    for one in u:
        if all(bool(((one - other).abs() > SAME).any()) for other in kept):
            kept.append(one)
    return torch.stack(kept)


def _best_weights(target: WeightTarget, residuals: Tensor) -> Tensor:
    """``log E[tau | q]``, for residuals ``(K, M, E)``."""
    return (target.shape / (1 + residuals[..., list(target.free)] / target.unit)).log()


def climb(target: WeightTarget, u: Tensor) -> Tensor:
    """Maxima of the target from starts ``(K, M, F)``, by Newton's method with a line search; or points near them."""
    value, slope = target.log_density_and_slope(u)
    for _ in range(MOST_STEPS):
        step = _newton_step(slope, target.hessian(u))
        promised = (step * slope).sum(-1) / 2
        if not bool((promised > CONVERGED).any()):
            break
        u = _searched(target, u, step, value)
        value, slope = target.log_density_and_slope(u)
    return u


def _newton_step(slope: Tensor, hessian: Tensor) -> Tensor:
    """The step of a Hessian made negative definite, cut to :data:`LONGEST_STEP`."""
    curvatures, vectors = torch.linalg.eigh(-hessian)
    curvatures = curvatures.abs().clamp(min=1e-8)
    step = (vectors @ ((vectors.mT @ slope.unsqueeze(-1)) / curvatures.unsqueeze(-1))).squeeze(-1)
    return step * (LONGEST_STEP / step.norm(dim=-1, keepdim=True).clamp(min=LONGEST_STEP))


def _searched(target: WeightTarget, u: Tensor, step: Tensor, value: Tensor) -> Tensor:
    """The first of ever shorter steps after which the target is not lower, but for rounding."""
    slack = 1e-13 * value.abs()
    for _ in range(40):
        lower = target.log_density(u + step) < value - slack
        if not bool(lower.any()):
            return u + step
        step = torch.where(lower.unsqueeze(-1), step / 2, step)
    return torch.where(lower.unsqueeze(-1), u, u + step)


@dataclass(frozen=True, eq=False)
class Proposal:
    """Multivariate t distributions at ``K`` points, with equal shares.

    Attributes:
        location: ``(K, M, F)``.
        whitening: ``W``, ``(K, M, F, F)``: ``W (u - location)`` is a standard t.
        coloring: Its inverse.
        df: Degrees of freedom.
    """

    location: Tensor
    whitening: Tensor
    coloring: Tensor
    df: float

    @classmethod
    def at(cls, target: WeightTarget, points: Tensor) -> Proposal:
        """The proposal with the target's curvature at points ``(K, M, F)``, or its size where there is no maximum."""
        curvatures, vectors = torch.linalg.eigh(-target.hessian(points))
        roots = curvatures.abs().clamp(min=LEAST_CURVATURE).sqrt()
        return cls(points, roots.unsqueeze(-1) * vectors.mT, vectors / roots.unsqueeze(-2), HEAVIER + points.shape[-1])

    def with_point(self, target: WeightTarget, point: Tensor) -> Proposal:
        """The proposal with one more component, at a point ``(1, M, F)``."""
        return joined(self, Proposal.at(target, point))

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws ``(S, M, F)``, from the ``K`` components in turns."""
        components, modules, size = self.location.shape
        like = self.location
        shape = (num_samples, modules, size, 1)
        normal = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        half = like.new_full((num_samples, modules, 1, 1), self.df / 2)
        noise = normal / (torch._standard_gamma(half, generator=generator) / half).sqrt()
        turn = torch.arange(num_samples, device=self.location.device) % components
        return self.location[turn] + (self.coloring[turn] @ noise).squeeze(-1)

    def log_density(self, u: Tensor) -> Tensor:
        """In nats, ``(S, M, F)`` to ``(S, M)``."""
        size = u.shape[-1]
        constant = math.lgamma((self.df + size) / 2) - math.lgamma(self.df / 2) - size / 2 * math.log(math.pi * self.df)
        parts = []
        for location, whitening in zip(self.location, self.whitening, strict=True):
            distance = (whitening @ (u - location).unsqueeze(-1)).square().sum((-2, -1))
            volume = torch.linalg.slogdet(whitening)[1]
            parts.append(constant + volume - (self.df + size) / 2 * torch.log1p(distance / self.df))
        return torch.logsumexp(torch.stack(parts), 0) - math.log(len(parts))


def mixture_log_weights(posterior: Posterior, samples: int, generator: torch.Generator) -> Tensor:
    """Importance weights whose mean is the integral of the anchor times ``exp(-E / T)`` over the merged update.

    Log weights in nats, ``(S, M)``, of a posterior in Full coordinates with an anchor, in which every expert speaks
    and is a scale mixture; ``(1, M)``, the exact value without randomness, where all energies are Gaussian.

    Raises:
        ValueError: If the anchor cannot be told from rounding beside the experts.
    """
    target = weight_target(posterior)
    if not target.free:
        return _finite(target.integral.value(target.fixed), posterior).unsqueeze(0)
    modes = climb(target, starts(target, posterior))
    _finite(target.log_density(modes[0]), posterior)
    proposal = Proposal.at(target, modes)
    for _ in range(ROUNDS):
        u = proposal.sample(samples, generator)
        log_weights = target.log_density(u) - proposal.log_density(u)
        if importance_mean(log_weights).good:
            break
        place = log_weights.argmax(0).expand(u.shape[-1], -1).mT
        proposal = proposal.with_point(target, u.gather(0, place.unsqueeze(0)))
    return log_weights


def _finite(value: Tensor, posterior: Posterior) -> Tensor:
    if not bool(value.isfinite().all()):
        raise ValueError(
            f"{posterior.label(int((~value.isfinite()).nonzero()[0, 0]))} has an anchor precision that is rounding "
            "beside the experts' in float64, and directions that no other holds. Raise the anchor's precision."
        )
    return value


def per_module(setting: float | Tensor, posterior: Posterior) -> Tensor:
    """A setting of an energy for every module, ``(M,)`` float64."""
    device = posterior.anchor_precision.device
    return torch.as_tensor(setting, dtype=torch.float64, device=device).expand(posterior.num_modules)
