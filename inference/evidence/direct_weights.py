r"""Importance weights in the merged update itself, for energies without a Gaussian scale mixture (Huber, powers).

Under a posterior in many dimensions the squared residuals hardly vary, so near it an energy is the Gaussian whose
weight is that of the *typical* residual, ``w_i = a_i rho'(E[q_i] / s_i^2) / (T s_i^2)`` with the mean taken under the
same Gaussians: a few steps of a fixed point. (Laplace's method takes the weight at the mode, where residuals are
smaller; for heavy tails in many dimensions that is another Gaussian.) Proposals are these, found from several starts,
wider ones, and the anchor itself, which bounds the weights whatever the tails are. Where some weights are much larger
than the others, all samples are drawn again with one more proposal, at the largest weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.evidence.gaussian_integrals import GaussianIntegral, gaussian_integral, in_float64
from inference.evidence.importance import ROUNDS, importance_mean
from poe_models.least_squares import Quadratic, quadratic_of
from poe_models.posterior import Posterior
from poe_models.precisions import Precision
from poe_models.sums import sum_of_squares

STEPS = 100
"""Damped steps of the fixed point of the weights."""
WIDER = (0.5, 0.25, 0.0)
"""Shares of the first weights in wider proposals; the last is the anchor."""
CHUNK = 2**25
"""Numbers (of eight bytes) that one evaluation may hold."""


def direct_log_weights(posterior: Posterior, samples: int, generator: torch.Generator) -> Tensor:
    """Importance weights whose mean is the integral of the anchor times ``exp(-E / T)`` over the merged update.

    Log weights in nats, ``(S, M)``, of a posterior in Full coordinates with an anchor, in which all experts speak.
    """
    posterior = in_float64(posterior)
    integral = gaussian_integral(posterior)
    components = _components(posterior, integral)
    for _ in range(ROUNDS):
        log_weights, best = _sampled(posterior, components, samples, generator)
        if importance_mean(log_weights).good:
            break
        components.append(_component_at(posterior, components[0], best))
    return log_weights


def typical_weights(posterior: Posterior, integral: GaussianIntegral, residuals: Tensor) -> Tensor:
    """Weights ``w_i / T`` at the mean residuals of the Gaussian that they make, from starts ``q_i``: ``(*S, M, E)``."""
    weights = posterior.weights(residuals) / posterior.fixed_temperature
    for _ in range(STEPS):
        mean = -integral.value_and_slope(weights)[1]
        weights = (weights * posterior.weights(mean) / posterior.fixed_temperature).sqrt()
    return weights


@dataclass(frozen=True, eq=False)
class _Component:
    """``N(x*, H^-1 / 2)`` over displacements ``x`` in the compressed coordinates of the least-squares problem."""

    quadratic: Quadratic
    precision: Precision
    mean: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        like = self.mean
        noise = torch.randn((count, *like.shape), generator=generator, dtype=like.dtype, device=like.device)
        return self.mean + self.precision.sample(noise) * 0.5**0.5

    def log_density(self, x: Tensor) -> Tensor:
        distance = sum_of_squares(self.precision.standardize(x - self.mean))
        return self.precision.logdet() / 2 - math.prod(x.shape[-2:]) / 2 * math.log(math.pi) - distance


def _components(posterior: Posterior, integral: GaussianIntegral) -> list[_Component]:
    center = torch.zeros_like(posterior.like) if posterior.center is None else posterior.center
    points = (center, *(expert.update for expert in posterior.experts))
    found = typical_weights(posterior, integral, torch.stack([posterior.residuals(z) for z in points]))
    quadratic = quadratic_of(posterior, for_draws=True)
    pulls = torch.stack(quadratic.pulls(), 1)
    components = []
    for weights in (*found, *(share * found[0] for share in WIDER)):
        precision = quadratic.precision(weights, integral.ridge)
        pull = (weights[..., None, None] * pulls).sum(1)
        components.append(_Component(quadratic, precision, precision.solve(pull)))
    return components


def _component_at(posterior: Posterior, first: _Component, point: Tensor) -> _Component:
    """A component at a point ``(M, a, b)``, with the weights of residuals there beside the first one's typical ones."""
    quadratic = first.quadratic
    residuals = quadratic.residuals(point) + quadratic.residuals(first.mean)
    ridge = posterior.anchor_precision / posterior.fixed_temperature
    weights = posterior.weights(residuals) / posterior.fixed_temperature
    return _Component(quadratic, quadratic.precision(weights, ridge), point)


def _sampled(
    posterior: Posterior, components: list[_Component], samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Log weights of samples from the components in equal shares, ``(S, M)``, and the points of largest weight."""
    quadratic, best = components[0].quadratic, components[0].mean.clone()
    highest = torch.full_like(posterior.anchor_precision, -math.inf)
    size = posterior.num_modules * math.prod(quadratic.event_shape) * (len(posterior.experts) + 3)
    parts = []
    for turn, component in enumerate(components):
        for part in torch.arange(turn, samples, len(components)).split(max(1, CHUNK // size)):
            x = component.sample(len(part), generator)
            proposed = torch.logsumexp(torch.stack([each.log_density(x) for each in components]), 0)
            parts.append(_log_target(posterior, quadratic, x) - proposed + math.log(len(components)))
            top, place = parts[-1].max(0)
            found = x[place, torch.arange(len(place))]
            best = torch.where((top > highest)[:, None, None], found, best)
            highest = torch.maximum(top, highest)
    return torch.cat(parts), best


def _log_target(posterior: Posterior, quadratic: Quadratic, x: Tensor) -> Tensor:
    """The anchor's log density less ``E / T``, ``(S, M, a, b)`` to ``(S, M)``."""
    ridge = posterior.anchor_precision / posterior.fixed_temperature
    anchor = math.prod(x.shape[-2:]) / 2 * (ridge / math.pi).log() - ridge * sum_of_squares(x)
    return anchor - posterior.energy_of(quadratic.residuals(x)) / posterior.fixed_temperature
