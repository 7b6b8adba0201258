"""Share of every expert that a merge kept, whatever made the merge.

Two numbers per module and expert: the share of its update that the merged update contains, ``<Z, U_i> / |U_i|^2``, and
the share of its squared residual that is left, ``q_i(Z) / q_i(0)``. :func:`totals` sums them over the modules of a
checkpoint and :func:`concerns` says in words where a merge is little more than the base, or than one of its experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from poe_models.posterior import BoundExpert, Posterior
from poe_models.printing import Brief
from poe_models.sums import inner_each, sum_of_squares

MOST_LEFT = 0.9
"""Share of an expert's squared residual from which the merge is said to have passed it by."""

MOST_GROWN = 2.0
"""Factor from which a residual is said to have grown rather than to be left."""

LEAST_KEPT = 0.1
"""Share kept, relative to the best kept expert's, below which the merge is said to have passed an expert by."""


@dataclass(frozen=True)
class HeldBack:
    """Bounds from which an expert is said to be held back by another that holds the merge.

    Attributes:
        share: Of its update kept, relative to the other's share, at most.
        left: Of its squared residual left, at least.
        times: As much of the squared residual left as of the other's, at least.
    """

    share: float
    left: float
    times: float


HELD_BACK = HeldBack(share=1 / 3, left=0.4, times=20.0)
BY_A_SHORTER = HeldBack(share=0.5, left=0.2, times=10.0)
"""By an expert so much shorter that it should have no such say."""

MUCH = 1.5
"""Times as long as another that an expert is called longer."""

LEAST_LENGTH = 0.1
"""Length of the merged update, relative to the experts' median, below which it is little more than the base."""

WAYS_OUT = (
    "Look at λ and the experts' weights and, in a product of experts, at the anchor's precision (eta) and the scale."
)
SHORTER = (
    "Under Relative scales the shortest expert decides, use Balanced; under Balanced take a larger gamma or Gaussian "
    "experts, and look at eta and the importances."
)


@dataclass(frozen=True, eq=False, repr=False)
class Retention(Brief):
    """Retention of the experts by a merge; tensors are float64, one entry per module ``(M, ...)``.

    Attributes:
        experts: Names of the experts, the order of the last dimension.
        kept: ``<Z, U_i> / |U_i|^2``, ``(M, E)``; nan for a zero update.
        norm: ``|Z|``, ``(M,)``.
        update_norms: ``|U_i|``, ``(M, E)``.
        residuals: ``q_i(Z) / s_i^2``, ``(M, E)``; None for merging methods, whose experts have no residual.
        residuals_at_zero: The same of merging nothing, ``q_i(0) / s_i^2``, ``(M, E)``.
        sizes: ``<Z, P_i Z> / s_i^2``, ``(M, E)``: with the other two it gives the residual of any multiple of ``Z``.
    """

    experts: tuple[str, ...]
    kept: Tensor
    norm: Tensor
    update_norms: Tensor
    residuals: Tensor | None = None
    residuals_at_zero: Tensor | None = None
    sizes: Tensor | None = None

    def scaled(self, scaling: float) -> Retention:
        """Retention of ``λ Z``, the update that a merge with this scaling writes."""
        moved = replace(self, kept=scaling * self.kept, norm=abs(scaling) * self.norm)
        if self.residuals is None or self.residuals_at_zero is None or self.sizes is None:
            return moved
        along = (self.residuals_at_zero + self.sizes - self.residuals) / 2  # <Z, P U> / s^2
        residuals = self.residuals_at_zero - 2 * scaling * along + scaling**2 * self.sizes
        return replace(moved, residuals=residuals.clamp(min=0), sizes=scaling**2 * self.sizes)

    @property
    def residual_left(self) -> Tensor:
        """Share of every expert's squared residual that is left, ``q_i(Z) / q_i(0)``, ``(M, E)``; nan if unknown."""
        if self.residuals is None or self.residuals_at_zero is None:
            return torch.full_like(self.kept, torch.nan)
        return self.residuals / self.residuals_at_zero

    def record(self, module: int) -> dict[str, Any]:
        """One module's numbers, ready for JSON."""
        found: dict[str, Any] = {"norm": self.numbers["norm"][module]}
        for name in ("update_norms", "kept", "residuals", "residuals_at_zero"):
            if name in self.numbers:
                pairs = zip(self.experts, self.numbers[name][module], strict=True)
                found[name] = {expert: value for expert, value in pairs if math.isfinite(value)}
        return found

    @cached_property
    def numbers(self) -> dict[str, list[Any]]:
        """The tensors of all modules as lists, by their names: a record for each of many is then little work."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class ExpertRetention:
    """Retention of one expert by a whole merge.

    Attributes:
        name: Of the expert.
        kept: ``sum <λZ, U_i> / sum |U_i|^2`` over the modules that it changed; nan if it changed none.
        residual_left: Its scaled squared residuals over what merging nothing would leave, summed over modules; nan for
            merging methods.
        length: ``|λZ| / |U_i|`` over the same modules.
    """

    name: str
    kept: float
    residual_left: float
    length: float

    @property
    def kept_percent(self) -> str:
        """``kept`` in whole per cent; nothing is 0 and never -0.

        >>> ExpertRetention("a", -0.001, 1.0, 1.0).kept_percent
        '0%'
        """
        return f"{round(self.kept, 2) + 0.0:.0%}"

    def record(self) -> dict[str, str | float | None]:
        """The numbers, ready for JSON."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ExpertRetention:
        """The retention of an expert from the numbers that :meth:`record` gives."""
        kept, left, length = (math.nan if (v := record[k]) is None else v for k in ("kept", "residual_left", "length"))
        return cls(record["name"], kept, left, length)


def retention(posterior: Posterior, z: Tensor, q: Tensor) -> Retention:
    """Retention of a posterior's experts by merged updates ``(M, *event)`` with squared residuals ``(M, E)``."""
    experts = posterior.experts
    norm_squared = torch.stack([expert.norm_squared for expert in experts], -1)
    along, sizes = _along(experts, z, q)
    scales = torch.stack([expert.scale_squared for expert in experts], -1)
    return Retention(
        experts=tuple(expert.name for expert in experts),
        kept=along / norm_squared,
        norm=sum_of_squares(z).sqrt(),
        update_norms=norm_squared.sqrt(),
        residuals=q / scales,
        residuals_at_zero=torch.stack([expert.residual_at_zero for expert in experts], -1) / scales,
        sizes=sizes / scales,
    )


def _along(experts: Sequence[BoundExpert], z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``<Z, U_i>`` and ``<Z, P_i Z>`` of points with squared residuals ``q``, ``(M, E)`` float64 each.

    The latter is made of what is known, ``q_i(Z) - q_i(0) + 2 <Z, P_i U_i>``, where the pulls are at hand.
    """
    pulls = [expert.pull for expert in experts if expert.pull is not None]
    found = inner_each(z, [*(expert.update for expert in experts), *pulls])
    sizes, pulled = [], iter(found[..., len(experts) :].unbind(-1))
    for i, expert in enumerate(experts):
        if expert.pull is None:
            sizes.append(expert.operator.quadratic(z))
        else:
            sizes.append((q[..., i] - expert.residual_at_zero + 2 * next(pulled)).clamp(min=0))
    return found[..., : len(experts)], torch.stack(sizes, -1)


def retention_of_updates(names: Sequence[str], updates: Tensor, z: Tensor) -> Retention:
    """Retention of updates ``(M, N, d_out, d_in)`` by merged ones ``(M, d_out, d_in)`` that have no posterior."""
    norm_squared, along = torch.stack([inner_each(each, [each, z]) for each in updates.unbind(1)], 1).unbind(-1)
    return Retention(tuple(names), along / norm_squared, sum_of_squares(z).sqrt(), norm_squared.sqrt())


def totals(records: Iterable[Mapping[str, Any]]) -> tuple[ExpertRetention, ...]:
    """Sum up :meth:`Retention.record` of a merge's modules, expert by expert in order of first appearance."""
    sums: dict[str, dict[str, float]] = {}
    for record in records:
        for name, length in record["update_norms"].items():
            of = sums.setdefault(name, dict.fromkeys(("inner", "squared", "merged", "left", "zero"), 0.0))
            if name not in record["kept"]:  # a zero update
                continue
            squared = length * length  # a power that leaves float64 is an error, a product is infinite
            of["inner"] += record["kept"][name] * squared
            of["squared"] += squared
            of["merged"] += record["norm"] * record["norm"]
            if name in record.get("residuals_at_zero", {}):
                of["left"] += record["residuals"][name]
                of["zero"] += record["residuals_at_zero"][name]
    return tuple(
        ExpertRetention(
            name,
            kept=_ratio(of["inner"], of["squared"]),
            residual_left=_ratio(of["left"], of["zero"]),
            length=math.sqrt(_ratio(of["merged"], of["squared"])),
        )
        for name, of in sums.items()
    )


def totals_of(record: Mapping[str, Any]) -> tuple[ExpertRetention, ...]:
    """Sum up the modules in the contents of a merge's ``poe_merge.json``."""
    return totals(
        module["retention"]
        for tensor in record["tensors"]
        for module in tensor.get("modules", ())
        if "retention" in module
    )


def concerns(experts: Sequence[ExpertRetention]) -> list[str]:
    """Warnings about a merge from its :func:`totals`, the most general first.

    >>> mnist, emoji = (ExpertRetention(name, 0.9, 0.05, 1.0) for name in ("mnist", "emoji"))
    >>> concerns([mnist, emoji, ExpertRetention("sre", 0.03, 0.97, 1.0)])
    ["expert 'sre': 97 % of its squared residual left, 3 % of its update kept."]
    """
    known = [each for each in experts if not math.isnan(each.kept)]
    silent = without_update(each.name for each in experts if math.isnan(each.kept))
    return silent + (_concerns_of_known(known) if known else [])


def without_update(names: Iterable[str]) -> list[str]:
    """Warning, or none, about experts that change no merged tensor.

    >>> without_update(["mnist", "emoji"])
    ["'mnist', 'emoji' have no update in any merged tensor. Leave them out, or look for copies of the base."]
    """
    found = [repr(name) for name in names]
    if not found:
        return []
    has, them = ("have", "them") if len(found) > 1 else ("has", "it")
    return [
        f"{', '.join(found)} {has} no update in any merged tensor. Leave {them} out, or look for copies of the base."
    ]


def _concerns_of_known(known: Sequence[ExpertRetention]) -> list[str]:
    """Warnings about experts that change some merged tensor."""
    median = sorted(each.length for each in known)[len(known) // 2]
    if median < LEAST_LENGTH:
        return [_pale(known, median)]
    best = max(each.kept for each in known)
    passed_by = [each for each in known if each.residual_left >= MOST_LEFT or each.kept < LEAST_KEPT * best]
    if len(passed_by) == len(known) > 1:
        return ["no expert has its share: every one has most of its squared residual left. " + WAYS_OUT]
    found = [*_held_back(known, passed_by), *(_passed_by(each) for each in passed_by)]
    if len(passed_by) == len(known) - 1 > 0:
        (kept,) = (each for each in known if each not in passed_by)
        shorter = all(_is_shorter(kept, each) for each in passed_by) and not math.isnan(kept.residual_left)
        way_out = SHORTER if shorter else WAYS_OUT
        found.insert(0, f"the merge is little more than the expert {kept.name!r}. {way_out}")
    return found


def _held_back(known: Sequence[ExpertRetention], passed_by: Sequence[ExpertRetention]) -> list[str]:
    """Warning, or none, that the merge follows one expert while others, not passed by, kept a small share.

    An expert that is merely shorter than a merge near the others has a residual left that is large beside its update.
    """
    measured = [each for each in known if not math.isnan(each.residual_left)]
    if not measured:
        return []
    holder = min(measured, key=lambda each: each.residual_left)
    held = [each for each in measured if each not in passed_by and _is_held_back(each, holder)]
    if not held:
        return []
    shares = ", ".join(f"{each.name!r} {each.kept_percent}" for each in held).replace("%", " %")
    own = holder.kept_percent.replace("%", " %")
    way_out = SHORTER if all(_is_shorter(holder, each) for each in held) else WAYS_OUT
    return [f"the expert {holder.name!r} holds the merge: {own} of its update kept, of {shares}. {way_out}"]


def _is_held_back(expert: ExpertRetention, holder: ExpertRetention) -> bool:
    bounds = BY_A_SHORTER if _is_shorter(holder, expert) else HELD_BACK
    left = max(bounds.left, bounds.times * holder.residual_left)
    return expert.residual_left >= left and expert.kept < bounds.share * holder.kept


def _is_shorter(one: ExpertRetention, other: ExpertRetention) -> bool:
    """Whether one expert's update is much shorter; ``length`` is the merge's in units of the expert's."""
    return one.length > MUCH * other.length


def _pale(known: Sequence[ExpertRetention], length: float) -> str:
    nearest = max(known, key=lambda each: each.length)
    beside = f", as long as {nearest.name!r} is" if nearest.length > 5 * LEAST_LENGTH else ""
    return (
        f"the merge is little more than the base: its update has {length:.1%} of the experts' median length{beside}. "
        + (SHORTER if beside and not math.isnan(nearest.residual_left) else WAYS_OUT)
    ).replace("%", " %", 1)


def _passed_by(expert: ExpertRetention) -> str:
    left = ""
    if expert.residual_left > MOST_GROWN:
        left = f"its squared residual grew {expert.residual_left:.0f}-fold, "
    elif not math.isnan(expert.residual_left):
        left = f"{expert.residual_left:.0%} of its squared residual left, "
    return f"expert {expert.name!r}: {left}{expert.kept_percent} of its update kept.".replace("%", " %")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
