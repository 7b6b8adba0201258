r"""Check that a posterior is proper (has a finite integral), before anything is sampled.

With an anchor (``eta > 0``) it always is. Without one the experts must hold every direction by themselves (a
generalisation of the propriety of Student-t regressions, Fernandez and Steel, 1999, Biometrika 86(1)): Gaussian, Huber
and GeneralizedGaussian experts do wherever they see; Cauchy and Student-t experts decay only as powers, so that for
every subspace ``V`` the experts that see it need ``sum 2 kappa_i / T > dim V``; Welsch experts never do.
"""

from __future__ import annotations

from itertools import chain, combinations

import torch
from torch import Tensor

from poe_models.energies import Gaussian as GaussianEnergy
from poe_models.energies import GeneralizedGaussian, Huber, StudentT
from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import BoundExpert, Posterior

MOST_EXPERTS = 14
"""Every subset of power-law experts is checked; beyond this many the check would take too long."""


def require_proper(posterior: Posterior) -> None:
    """Raise unless every module's posterior has a finite integral, whatever its factor experts.

    Raises:
        ValueError: If the posterior is improper, or cannot be shown to be proper; says why and what to change. Or its
            temperature is a tensor, to be inferred in a Pyro model.
    """
    _ = posterior.fixed_temperature  # or its error: every sampler comes by here
    silent = posterior.undetermined.tolist()
    loose = (posterior.anchor_precision == 0).nonzero().flatten().tolist()
    for module in loose:
        if silent[module]:
            raise ValueError(
                f"{posterior.label(module)} has updates that are all zero, so that its relative anchor precision is "
                "zero, too: nothing is to be inferred there. Leave the module out, or give an absolute precision."
            )
        reason = _improper(posterior, module)
        if reason is not None:
            raise ValueError(
                f"the posterior of {posterior.label(module)} has no anchor (eta = 0) and is improper: {reason}. "
                "It has no draws, no standard deviations and no evidence. Give the anchor a positive precision."
            )


def _improper(posterior: Posterior, module: int) -> str | None:
    experts = [expert for expert in posterior.experts if bool(expert.active[module])]
    unknown = [e.name for e in experts if not isinstance(e.rho, _HOLDING) and _exponent(e, posterior, module) is None]
    if unknown:
        return f"the energy of {unknown[0]!r} is bounded, or its tail is not known, so it holds no direction by itself"
    holding = [e for e in experts if isinstance(e.rho, _HOLDING)]
    heavy = [e for e in experts if not isinstance(e.rho, _HOLDING)]
    if len(heavy) > MOST_EXPERTS:
        return f"{len(heavy)} power-law experts are too many to check every subspace (at most {MOST_EXPERTS})"
    subsets = chain.from_iterable(combinations(heavy, size) for size in range(len(heavy) + 1))
    for blind in subsets:
        dimension = _null_dimension([e.operator for e in (*holding, *blind)], module, posterior.event_shape)
        strength = sum(2 * (_exponent(e, posterior, module) or 0.0) for e in heavy if e not in blind)
        if dimension > 0 and strength <= dimension:
            return (
                f"{dimension} of its directions are seen only by experts whose tails decay as powers, with "
                f"2 sum kappa / T = {strength:g} where more than {dimension} is needed"
            )
    return None


_HOLDING = (GaussianEnergy, Huber, GeneralizedGaussian)


def _exponent(expert: BoundExpert, posterior: Posterior, module: int) -> float | None:
    """``kappa / T`` of a power-law expert; None for other energies."""
    if not isinstance(expert.rho, StudentT):
        return None
    k = torch.as_tensor(expert.rho.k, dtype=torch.float64).expand(posterior.num_modules)[module]
    return expert.importance * float(k) / posterior.fixed_temperature


def _null_dimension(operators: list[Operator], module: int, shape: tuple[int, int]) -> int:
    """Dimension of the directions that none of the operators sees, for one module."""
    if any(isinstance(operator, ScaledIdentity) for operator in operators):
        return 0
    grams = [operator for operator in operators if isinstance(operator, Gram)]
    left = _nullity([g.narrow[module] for g in grams if g.side == "left"], shape[0])
    right = _nullity([g.narrow[module] for g in grams if g.side == "right"], shape[1])
    vectors = [each.vector[module].flatten().unsqueeze(-1) for each in operators if isinstance(each, RankOne)]
    if vectors and not grams:
        return _nullity(vectors, shape[0] * shape[1])
    blind = [each.values[module] == 0 for each in operators if isinstance(each, Diagonal)]
    if blind and not vectors:
        return min(int(torch.stack(blind).all(0).sum()), left * right)
    return left * right  # an upper bound beside a few Directional experts, which can only lower it


def _nullity(factors: list[Tensor], size: int) -> int:
    """Dimension of the common null space of ``F F^T`` over factors ``(size, r)``."""
    if not factors:
        return size
    return size - int(torch.linalg.matrix_rank(torch.cat(factors, -1).double()))
