"""Checks of ``hierarchical``: its settings, and that the design is a generative model of the updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import pyro.distributions as dist
import torch

from poe_models.energies import Cauchy, StudentT
from poe_models.experts import ProductOfExperts
from poe_models.posterior import Posterior
from poe_models.scales import Absolute, Balanced, NormScaled, Relative, Scale

Shared = Literal["model", "expert", "module"]
"""Owners of a ``gamma`` and ``nu``: the whole model, every expert (task), or every module (layer)."""

POWERS: dict[type[Scale], int] = {Absolute: 2, Balanced: 2, Relative: 2, NormScaled: 1}
"""``s^2`` is proportional to this power of ``gamma``."""


def shared_prior(name: str, prior: dist.TorchDistribution, size: tuple[int, ...]) -> dist.TorchDistribution:
    """A scalar prior on positive numbers, expanded to shared quantities of a shape; errors name the argument.

    Raises:
        ValueError: If it is not scalar, or allows negative values.
    """
    if prior.batch_shape or prior.event_shape:
        raise ValueError(
            f"`hierarchical({name}=...)`: has batch shape {tuple(prior.batch_shape)} and event shape "
            f"{tuple(prior.event_shape)}. Give a scalar distribution; `shared` decides how many there are."
        )
    if prior.support is None or bool(prior.support.check(torch.tensor(-1.0))):
        raise ValueError(
            f"`hierarchical({name}={prior})`: allows negative values. Give a distribution on positive numbers, for "
            "instance LogNormal, Gamma or HalfNormal."
        )
    return prior.expand(size).to_event(len(size))


def check_energies(poe: ProductOfExperts) -> bool:
    """Return whether there are degrees of freedom to infer.

    Raises:
        ValueError: If its Student-t experts are no densities for every ``nu``, or only some experts are Student-t.
    """
    tailed = [expert for expert in poe.experts if isinstance(expert.energy, StudentT)]
    students = [expert for expert in tailed if not isinstance(expert.energy, Cauchy)]
    for expert in students:
        if not expert.energy.needs_dimension:
            raise ValueError(
                f"`hierarchical(...)`: expert {expert.name!r} has the energy {expert.energy!r}, which is no normalised "
                "density for every `nu`. Set exponent='multivariate'."
            )
        if expert.importance < poe.temperature:
            raise ValueError(
                f"`hierarchical(...)`: expert {expert.name!r} has importance {expert.importance:g} at temperature "
                f"{poe.temperature:g}: a Student-t to a power below 1 has no finite integral for small `nu`. Leave "
                "both at 1; `gamma` and `nu` do their work."
            )
    if students and len(students) < len(poe.experts):
        other = next(expert for expert in poe.experts if expert not in students)
        raise ValueError(
            f"`hierarchical(...)`: {students[0].name!r} has degrees of freedom and {other.name!r} ({other.energy!r}) "
            "has none. Give all experts a Student-t energy or none."
        )
    return bool(students)


def check_mixtures(poe: ProductOfExperts) -> None:
    """Refuse energies under which the merged update cannot be integrated out.

    Raises:
        ValueError: If an energy is no Gaussian scale mixture.
    """
    for expert in poe.experts:
        if not expert.energy.is_mixture:
            raise ValueError(
                f"`hierarchical(...)`: expert {expert.name!r} has the energy {expert.energy!r}, which is no known "
                "Gaussian scale mixture, so that the merged update cannot be integrated out. Use Gaussian, or StudentT "
                "or Cauchy with exponent='multivariate'; `compare_designs` compares values of gamma for others."
            )


def check_scales(poe: ProductOfExperts, shared: Shared) -> tuple[int, list[float]]:
    """The power of ``gamma`` in the squared scales, and each expert's own ``gamma``.

    Raises:
        ValueError: If the experts' scales are of different kinds, or differ where one takes their place.
    """
    if shared not in get_args(Shared):
        raise ValueError(f"`hierarchical(shared={shared!r})`: is one of {', '.join(map(repr, get_args(Shared)))}.")
    kinds = {type(expert.scale) for expert in poe.experts}
    if len(kinds) > 1 or kinds.isdisjoint(POWERS):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        known = ", ".join(kind.__name__ for kind in POWERS)
        raise ValueError(f"`hierarchical(...)`: the experts have scales {names}. Give all the same one of {known}.")
    reference = [float(expert.scale.gamma) for expert in poe.experts]  # type: ignore[attr-defined]
    if shared != "expert" and len(set(reference)) > 1:
        raise ValueError(
            f"`hierarchical(shared={shared!r})`: one `gamma` takes the place of the experts' own, which differ "
            f"({', '.join(f'{gamma:g}' for gamma in reference)}). Give them one, or use shared='expert'."
        )
    return POWERS[kinds.pop()], reference


def check_anchor(posteriors: Sequence[Posterior], modules: Sequence[str]) -> None:
    """Refuse modules without an anchor, by name.

    Raises:
        ValueError: If there are no modules, or some have a zero anchor precision.
    """
    if not posteriors:
        raise ValueError("`hierarchical(updates=...)`: there are no modules. Give task vectors that merge some.")
    eta = torch.cat([posterior.anchor_precision for posterior in posteriors]).tolist()
    loose = [name for name, value in zip(modules, eta, strict=True) if value == 0]
    if loose:
        raise ValueError(
            f"`hierarchical(...)`: modules {', '.join(loose)} have no anchor (eta = 0), a flat prior under which "
            "`gamma` and `nu` have no likelihood. Give the anchor a positive precision, and leave out modules whose "
            "updates are zero."
        )
