r"""Coefficients that several modules share: the same posterior on a smaller span.

With one coefficient for each expert and *group* of modules ``g`` the energy is that of all modules at the coefficients
of their groups. The anchors add up to one Gaussian of a group, ``sum_m eta_m |Z_m - Z_0m|^2 = eta_g |c - e_0|^2_G``
with ``eta_g = sum_m eta_m`` and ``G_g = sum_m eta_m G_m / eta_g``, so that the latents of a group are orthonormal in
``G_g``; the experts of its modules stay apart, each with its own scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poe_models.binding import bind_factor, form_root
from poe_models.experts import FactorExpert
from poe_models.operators import Gram
from poe_models.posterior import BoundExpert, Posterior
from poe_models.records import with_tensors
from poe_models.span import SpanCoordinates, SpanStatistics, span_coordinates
from poe_models.weights.patterns import pattern as regular


@dataclass(frozen=True)
class Groups:
    """Modules that share coefficients.

    Attributes:
        names: Of the ``G`` groups, in order of first appearance.
        places: Group of each module, ``M`` of them.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[str], tied: str | None) -> Groups:
        r"""Groups by a regular expression: modules share coefficients if its own groups match the same in their names.

        ``""`` ties all of them, ``r"layers\.(\d+)\."`` those of a layer, ``r"(attn|mlp)"`` those of a role; a module
        whose name it does not find keeps its own, as all do with None.

        Raises:
            ValueError: If it finds no name.

        >>> Groups.of(["0.fc1", "0.fc2", "1.fc1", "head"], r"(fc\d)").names
        ('fc1', 'fc2', 'head')
        """
        if tied is None:
            return cls(tuple(modules), tuple(range(len(modules))))
        found = [regular(tied).groups(name) for name in modules]
        if all(groups is None for groups in found):
            raise ValueError(
                f"`SpanModel(tied={tied!r})`: it finds none of {len(modules)} modules ({', '.join(modules[:3])}"
                f"{', ...' if len(modules) > 3 else ''}). Give a regular expression that their names match."
            )
        keys = [(name,) if own is None else (None, *own) for name, own in zip(modules, found, strict=True)]
        distinct = list(dict.fromkeys(keys))
        return cls(tuple(map(_name_of, distinct)), tuple(distinct.index(key) for key in keys))

    def members(self) -> list[list[int]]:
        """Places of the modules of each group."""
        return [[m for m, group in enumerate(self.places) if group == g] for g in range(len(self.names))]


def _name_of(key: tuple[str | None, ...]) -> str:
    return key[0] if key[0] is not None else "/".join(part or "" for part in key[1:]) or "all modules"


def tied_posterior(untied: Posterior, groups: Groups, factors: Sequence[FactorExpert]) -> Posterior:
    """The posterior over the latents of groups, ``(G, K, 1)``.

    Args:
        untied: The product in weight space of all modules in Span coordinates, without factor experts.
        groups: Which modules share coefficients.
        factors: Factor experts, functions of the groups' coefficients ``(..., G, K)``.
    """
    assert untied.span is not None
    members, own = groups.members(), untied.span.statistics
    eta = torch.stack([untied.anchor_precision[places].sum() for places in members])
    span = span_coordinates(_statistics(own, untied.anchor_precision, groups))
    experts = []
    for slot in range(max(map(len, members))):
        there = torch.tensor([slot < len(places) for places in members], device=own.gram.device)
        places = [places[slot] if slot < len(places) else places[0] for places in members]
        for i, expert in enumerate(untied.experts):
            named = replace(expert, name=f"{expert.name}/{slot}") if slot else expert
            experts.append(_of_slot(named, i, places, there, span, own))
    center = span.latents(_unit(own, len(own.updates), len(members)))
    bound = tuple(bind_factor(factor, span) for factor in factors)
    return Posterior(tuple(experts), center, eta, untied.temperature, untied.event_shape, bound, span, groups.names)


def _of_slot(
    expert: BoundExpert, index: int, places: list[int], there: Tensor, span: SpanCoordinates, own: SpanStatistics
) -> BoundExpert:
    """An expert's energies of one module of every group, as functions of the groups' latents."""
    some = with_tensors(lambda value: value[places], expert)
    update = span.latents(_unit(own, own.updates.index(expert.update_name), len(places)))
    return replace(
        some,
        operator=Gram(form_root(span, own.forms[places, index]), "left", (len(own.basis), 1)),
        update=update,
        norm_squared=update.square().sum((-2, -1)),
        rho=expert.rho.module(places),
        active=some.active & there,
    )


def _statistics(own: SpanStatistics, eta: Tensor, groups: Groups) -> SpanStatistics:
    """Statistics of groups: the Gram matrix of their anchor, and forms of the experts of each of their modules."""
    members = groups.members()
    slots = max(map(len, members))

    def summed(values: Tensor) -> Tensor:
        return torch.stack([values[places].sum(0) for places in members])

    def apart(values: Tensor) -> Tensor:
        """Values ``(M, E, ...)`` to ``(G, slots E, ...)``, nan where a group has fewer modules."""
        found = values.new_full((len(members), slots, *values.shape[1:]), math.nan)
        for group, places in enumerate(members):
            found[group, : len(places)] = values[places]
        return found.flatten(1, 2)

    weights = eta / summed(eta)[list(groups.places)]
    return replace(
        own,
        modules=groups.names,
        residual_maps=own.residual_maps * slots,
        gram=summed(weights[:, None, None] * own.gram),
        forms=apart(own.forms),
        mean_curvature=apart(own.mean_curvature),
        dimension=apart(own.dimension),
        through=None if own.through is None else tuple(own.through[places[0]] for places in members),
    )


def _unit(own: SpanStatistics, place: int, count: int) -> Tensor:
    """Coefficients ``(G, K)`` of one member of the basis."""
    units = torch.eye(len(own.basis), dtype=torch.float64, device=own.gram.device)
    return units[place].expand(count, -1)
