r"""Log evidence: how well a design predicts the fine-tunes themselves, to compare designs without labels.

With every expert and the anchor normalised, a design is a generative model of the updates: ``Z`` comes from the anchor
and what an expert sees of ``U_i`` scatters around ``Z``. Its evidence is the density of the updates under it,

    p(U | design) = int N(Z; Z_0, T / (2 eta) I) prod_i exp(-E_i(Z) / T) / Z_i dZ
    log Z_i = log_normalizer(s_i, D_i, a_i / T) - log pdet(P_i) / 2

where ``D_i`` is the rank of ``P_i`` and ``pdet`` the product of its nonzero eigenvalues: ``Z_i`` integrates over the
``D_i`` directions that the expert sees. The operators ``P_i``, the units of scales and a relative ``eta`` are computed
from the updates and then held fixed.

**How.** Gaussian designs have a closed form. Scale mixtures (Student-t and Cauchy with ``exponent="multivariate"``, or
any power of them that is a density) have one given a number per expert, the mixture weight, and these few numbers are
integrated by importance sampling (:mod:`inference.evidence.mixture_weights`). Other energies with a normaliser (Huber,
GeneralizedGaussian) are sampled in the merged update itself (:mod:`inference.evidence.direct_weights`). Values come
with a standard error, and an estimate that cannot be trusted is refused. Laplace's approximation is not among the
methods: at 64 numbers per update it is off by 26 nats a module for a Student-t of 3 degrees of freedom, and ranks a
lighter tail above the true one.

**In Full coordinates only.** Span coordinates are made of the updates, so that every residual lies inside the span. A
likelihood of what is seen there finds a scale of 23 where it was 1 (1024 numbers, 4 experts), and takes tails for
Gaussian.

>>> from poe_models import AbsolutePrecision, Absolute, Anchor, Gaussian, Identity, ProductOfExperts
>>> anchor = Anchor(precision=AbsolutePrecision(0.5))
>>> poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=anchor)
>>> posterior = poe.bind(torch.zeros(2, 1, 1, dtype=torch.float64))
>>> found = log_evidence(posterior, generator=torch.Generator().manual_seed(0))   # covariance [[2, 1], [1, 2]]
>>> bool(torch.isclose(found.value, torch.tensor(-math.log(2 * math.pi) - math.log(3) / 2, dtype=torch.float64)))
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.evidence.direct_weights import direct_log_weights
from inference.evidence.importance import FEWEST_EFFECTIVE, LARGEST_PARETO_K, importance_mean, trusted
from inference.evidence.mixture_weights import mixture_log_weights
from inference.units import own_units
from poe_models.posterior import BoundExpert, Posterior
from poe_models.printing import Brief

SAMPLES = 1000
"""Importance samples by default."""
MOST_TOGETHER = 2**17
"""Importance samples of all modules that are handled at once, at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Brief):
    """Log evidence of one design, per module.

    Attributes:
        value: ``log p(U | design)`` in nats, ``(M,)`` float64.
        standard_error: Monte Carlo standard error of ``value`` in nats, ``(M,)``; 0 where it is exact.
        dimension: How many numbers of its update each expert sees, ``(M, E)``; ``value`` is a density of all of them.
        effective_samples: Kish's effective number of importance samples, ``(M,)``; infinite where ``value`` is exact.
        pareto_k: Shape of the upper tail of the importance weights, ``(M,)``; ``-inf`` where ``value`` is exact.
    """

    value: Tensor
    standard_error: Tensor
    dimension: Tensor
    effective_samples: Tensor
    pareto_k: Tensor

    @property
    def total(self) -> float:
        """Log evidence of all modules together in nats; they are independent."""
        return float(self.value.sum())

    @property
    def total_error(self) -> float:
        """Standard error of :attr:`total` in nats."""
        return float(self.standard_error.square().sum().sqrt())

    @property
    def trusted(self) -> Tensor:
        """Modules whose value and error can be trusted, ``(M,)`` bool."""
        return trusted(self.pareto_k, self.effective_samples)


class UntrustedEvidence(ValueError):
    """An estimate whose value and error cannot be trusted.

    Attributes:
        evidence: The estimate all the same.
    """

    def __init__(self, message: str, evidence: Evidence) -> None:
        super().__init__(message)
        self.evidence = evidence


def log_evidence(posterior: Posterior, *, generator: torch.Generator, samples: int = SAMPLES) -> Evidence:
    """Log evidence of a design in a batch of modules.

    Args:
        posterior: In Full coordinates, with an anchor in every module.
        generator: Source of all randomness; not touched where all energies are Gaussian.
        samples: Importance samples per module. Each costs one factorisation of the smaller compressed side.

    Returns:
        The evidence with its standard error; exact for Gaussian energies.

    Raises:
        ValueError: If an expert or the anchor has no normaliser, the posterior is in Span coordinates, or the samples
            are fewer than would be trusted.
        UntrustedEvidence: If the importance weights are too uneven; carries the estimate.
    """
    if samples < 2 * FEWEST_EFFECTIVE:
        raise ValueError(
            f"`log_evidence(samples={samples})`: fewer than {FEWEST_EFFECTIVE:g} effective samples are never trusted. "
            f"Give at least {2 * FEWEST_EFFECTIVE:g}."
        )
    own = own_units(posterior, "log_evidence")
    posterior = own.posterior
    normalizers, seen = log_normalizers(posterior), dimensions(posterior)
    _require_anchor(posterior)
    value = -normalizers.sum(-1) - seen.sum(-1) * own.units.log()
    error = torch.zeros_like(value)
    effective, tail = error + math.inf, error - math.inf
    for modules, part in _homogeneous(posterior, samples):
        mixtures = all(expert.rho.is_mixture for expert in part.experts)
        sampler = mixture_log_weights if mixtures else direct_log_weights
        log_weights = sampler(part, samples, generator)
        if len(log_weights) == 1:
            value[modules] += log_weights[0]
            continue
        mean = importance_mean(log_weights)
        value[modules] += mean.value
        error[modules], effective[modules], tail[modules] = mean.standard_error, mean.effective_samples, mean.pareto_k
    evidence = Evidence(value, error, seen, effective, tail)
    _require_trusted(evidence, posterior, samples)
    return evidence


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneExpertOut(Brief):
    """Log density of every expert's update given the other experts', from evidences with and without those on it."""

    updates: tuple[str, ...]
    whole: Evidence
    without: tuple[Evidence, ...]

    @property
    def value(self) -> Tensor:
        """``log p(U_i | U_-i)`` in nats, ``(M, N)``; 0 where nothing is seen of an update."""
        return torch.stack([self.whole.value - each.value for each in self.without], -1)

    @property
    def standard_error(self) -> Tensor:
        """Of each value, ``(M, N)``; 0 where it is exact."""
        squares = [self.whole.standard_error.square() + each.standard_error.square() for each in self.without]
        return torch.stack(squares, -1).sqrt()


def leave_one_expert_out(
    posterior: Posterior, *, generator: torch.Generator, samples: int = SAMPLES
) -> LeaveOneExpertOut:
    """Log density of each expert's update given the other experts and the anchor, by two evidences.

    ``log p(U_i | U_-i) = log p(U) - log p(U_-i)``: exact for Gaussian designs, with an error for others. It holds fixed
    what the design has computed from all updates: operators, scales and the anchor. Several experts about one update
    are left out together. ``az.loo`` on posterior draws is not usable for this question: one expert of a few is so much
    of the data that its importance weights have Pareto shapes above 0.7 nearly everywhere. Arguments and errors are
    those of :func:`log_evidence`.
    """
    names = tuple(dict.fromkeys(expert.update_name for expert in posterior.experts))
    whole = log_evidence(posterior, generator=generator, samples=samples)
    without = []
    for name in names:
        rest = replace(posterior, experts=tuple(each for each in posterior.experts if each.update_name != name))
        found = log_evidence(rest, generator=generator, samples=samples) if rest.experts else _nothing(posterior)
        without.append(found)
    return LeaveOneExpertOut(names, whole, tuple(without))


def log_normalizers(posterior: Posterior) -> Tensor:
    """``log Z_i`` of every expert in nats, ``(M, E)``: ``-E_i / T - log Z_i`` is its normalised log likelihood.

    It is ``log_normalizer(s_i, D_i, a_i / T) - log pdet(P_i) / 2``, and zero where an expert sees nothing.

    Raises:
        ValueError: If an expert has no normaliser, or the posterior is in Span coordinates.
    """
    if posterior.coordinates == "span":
        raise ValueError(
            "`log_normalizers(...)`: a posterior in Span coordinates. The span is made of the updates themselves, so "
            "that a likelihood of what is seen of them there says nothing about the design. Use `poe.bind("
            "updates)`; a model's evidence is `compare_designs(designs, task_vectors)`."
        )
    if posterior.factors:
        raise ValueError(
            f"`log_normalizers(...)`: {posterior.factors[0].name!r} is a FactorExpert, a function without a "
            "normaliser. Designs can be compared without it."
        )
    return torch.stack([_log_normalizer(expert, posterior.fixed_temperature) for expert in posterior.experts], -1)


def dimensions(posterior: Posterior) -> Tensor:
    """``D_i``, the ranks of the experts' operators, ``(M, E)``; zero where an expert drops out."""
    return torch.stack([_dimension(expert) for expert in posterior.experts], -1)


def _log_normalizer(expert: BoundExpert, temperature: float) -> Tensor:
    dimension = _dimension(expert)
    scale, power, seen = expert.scale_squared.sqrt(), expert.importance / temperature, dimension > 0
    result = torch.zeros_like(dimension)
    try:
        if bool(seen.all()):
            result = expert.rho.log_normalizer(scale, dimension, power).expand_as(dimension)
        else:
            for module in seen.nonzero().flatten().tolist():
                rho = expert.rho.module(slice(module, module + 1))
                result[module] = rho.log_normalizer(scale[module], dimension[module], power).squeeze()
    except ValueError as error:
        raise ValueError(f"expert {expert.name!r} is not a density: {error}") from error
    return torch.where(seen, result - expert.operator.log_pseudo_determinant() / 2, 0.0)


def _dimension(expert: BoundExpert) -> Tensor:
    """Rank of an expert's operator, ``(M,)``; zero where the expert is inactive."""
    return torch.where(expert.active, expert.operator.dimension(), 0.0)


def _homogeneous(posterior: Posterior, samples: int) -> Iterator[tuple[slice, Posterior]]:
    """Runs of modules with the same active experts, each as the posterior of these experts alone.

    Yields:
        Positions and posterior of a run.
    """
    complete = posterior.active.all(-1).tolist()
    most, start = max(1, MOST_TOGETHER // samples), 0
    while start < len(complete):
        end = start + 1
        while complete[start] and end < len(complete) and complete[end] and end - start < most:
            end += 1
        speaking = posterior.active[start].nonzero().flatten().tolist()
        if speaking:
            part = posterior.part(slice(start, end))
            yield slice(start, end), replace(part, experts=tuple(part.experts[i] for i in speaking))
        start = end


def _nothing(posterior: Posterior) -> Evidence:
    """Evidence of modules without an active expert: log density 0, without error."""
    zero = torch.zeros_like(posterior.anchor_precision)
    return Evidence(zero, zero, zero.new_zeros(len(zero), 0), zero + math.inf, zero - math.inf)


def _require_anchor(posterior: Posterior) -> None:
    loose = (posterior.anchor_precision == 0).nonzero().flatten().tolist()
    if loose:
        raise ValueError(
            f"no anchor (eta = 0) in {', '.join(map(posterior.label, loose))}: a flat prior has no normaliser, so that "
            "the evidence would be known only up to a constant, another one for every design. Give the anchor a "
            "positive precision, and leave out modules whose updates are all zero: a relative precision is zero there."
        )


def _require_trusted(evidence: Evidence, posterior: Posterior, samples: int) -> None:
    bad = (~evidence.trusted).nonzero().flatten().tolist()
    if not bad:
        return
    others = [expert for expert in posterior.experts if not expert.rho.is_mixture]
    advice = "Raise `samples`"
    if others:
        advice += f", or use an energy that is a Gaussian scale mixture, which {others[0].name!r} has not"
    effective, tail = float(evidence.effective_samples[bad[0]]), float(evidence.pareto_k[bad[0]])
    raise UntrustedEvidence(
        f"{posterior.label(bad[0])}: {effective:.0f} of {samples} importance samples are effective and their "
        f"weights have a Pareto k of {tail:.2f} (trusted from "
        f"{FEWEST_EFFECTIVE:g} and up to {LARGEST_PARETO_K:g}), so that neither value nor error can be trusted. "
        f"{advice}.",
        evidence,
    )
