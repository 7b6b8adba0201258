"""Scales of experts and precisions of the anchor: the units in which residuals and distances are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.limits import require_not_negative, require_positive
from poe_models.records import with_tensors


@dataclass(frozen=True, eq=False)
class ExpertSizes:
    """Sizes of the ``n`` experts of a module that share a residual map, from which scales are computed.

    Residuals of one map have the same units, so a rule may compare these experts with each other.

    Attributes:
        norm_squared: ``|U_i|^2``, shape ``(..., n)``.
        residual_at_zero: ``q_i(0)``, the squared residual of merging nothing, ``(..., n)``.
        mean_curvature: ``tr(P_i) / d``, ``(..., n)``.
        importance: ``a_i``, ``(n,)``.
        active: Experts whose operator is not zero, ``(..., n)``.
        common_units: Whether ``P_i`` is in units that all experts share, so that a smaller one is information; false
            for maps made from the update itself, whose ``P_i`` grows with its length.
    """

    norm_squared: Tensor
    residual_at_zero: Tensor
    mean_curvature: Tensor
    importance: Tensor
    active: Tensor
    common_units: bool = False

    def among(self, experts: Sequence[int], common_units: bool) -> ExpertSizes:
        """The sizes of the experts at some positions, which share a map of these units."""
        some = list(experts)
        return replace(with_tensors(lambda value: value[..., some], self), common_units=common_units)


class Scale(ABC):
    """The squared scales ``s_i**2`` of experts, computed once from their updates."""

    @abstractmethod
    def squared(self, sizes: ExpertSizes) -> Tensor:
        """``s_i**2`` of experts that share a map, ``(..., n)`` in units of ``q_i``; zero where the rule gives none."""


@dataclass(frozen=True)
class GammaScale(Scale):
    """A scale that is proportional to a number ``gamma > 0`` or its square."""

    gamma: float

    def __post_init__(self) -> None:
        require_positive(f"{type(self).__name__}(", gamma=self.gamma)


@dataclass(frozen=True)
class Absolute(GammaScale):
    """``s^2 = gamma^2`` ([PoE] Eq. 18): the same for every module, in the units of the residual."""

    @override
    def squared(self, sizes: ExpertSizes) -> Tensor:
        return torch.full_like(sizes.residual_at_zero, self.gamma**2)


@dataclass(frozen=True)
class NormScaled(GammaScale):
    """``s^2 = gamma * |U_i|^2`` ([PoE] Algorithm 1, Table 5 and released code).

    It compares a fourth power of the update (``q`` under the Gram maps) with a second power: where
    ``q << gamma |U_i|^2`` every energy is a Gaussian in disguise. Report the spread of the weights.
    """

    @override
    def squared(self, sizes: ExpertSizes) -> Tensor:
        return self.gamma * sizes.norm_squared


LONGEST = 4.0
"""Largest ``q_j(0) / t_j`` in units of the ``m`` of :class:`Balanced`: the square of twice the typical length."""


@dataclass(frozen=True)
class Balanced(GammaScale):
    """``s_i^2 = gamma^2 t_i m``: free of units, and no weight that an expert's length gives it.

    ``t_i`` is ``tr(P_i) / d`` for maps made from the update itself (Directional and the Grams), so that every expert
    has the same mean precision ``tr(P_i) / (d s_i^2)`` however long its update is; for maps in units that all experts
    share (Identity, Fisher, Activation, Mixed) it is 1, since there a smaller ``P_i`` is information. ``m`` is the
    median of ``q_j(0) / t_j`` over the module's experts of the same map, weighted by their importance (an expert given
    twice is one of importance 2), and a quarter of the largest at least: a quarter in squares, so that an expert more
    than twice as long as most is no outlier by its length. For experts of equal length it is :class:`Relative`.

    Weights at rest are meant. A heavy tail then weighs what is near to the merge, and under Identity a short update is
    near to the base, as the merge of few experts is: heavy tails, and :class:`~poe_models.Huber` below 1, may follow it
    there. The Gram maps and Directional measure an update in its own directions: beside one shorter expert others keep
    at least .85 of their shares (powers below 1 and Huber far below 1 apart), and .7 where the shorter ones are two of
    three or three of four. Where most of many are much shorter, a heavy tail may follow them; a larger ``gamma`` makes
    it less heavy.
    """

    gamma: float = 1.0

    @override
    def squared(self, sizes: ExpertSizes) -> Tensor:
        strength = torch.ones_like(sizes.mean_curvature) if sizes.common_units else sizes.mean_curvature
        known = sizes.active & (sizes.residual_at_zero > 0)
        ratio = torch.where(known, sizes.residual_at_zero / torch.where(known, strength, 1.0), torch.inf)
        median = weighted_median(ratio, torch.where(known, sizes.importance.to(ratio), 0.0))
        typical = torch.maximum(median, torch.where(known, ratio, 0.0).amax(-1) / LONGEST)
        return self.gamma**2 * strength * typical.unsqueeze(-1)


@dataclass(frozen=True)
class Relative(GammaScale):
    """``s^2 = gamma^2 * q_i(0)``: each expert in units of its own residual, so that the shortest update decides.

    An expert that is not merged at all has ``q / s^2 = 1 / gamma^2``. Under a map made from the update the precision
    ``P_i / s_i^2`` grows as ``|U_i|^-2``: of four experts one a tenth as long holds the merge at itself, and the others
    keep .39 of their updates instead of .92. Use :class:`Balanced` where lengths differ; for equal lengths they agree.
    """

    gamma: float = 1.0

    @override
    def squared(self, sizes: ExpertSizes) -> Tensor:
        return self.gamma**2 * sizes.residual_at_zero


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Median over the last dimension of values that count ``weights >= 0`` times; zero where all weights are zero.

    Where half of the weight is at or below one value and half at or above the next, it is their mean.

    Args:
        values: ``(..., n)``; those of weight zero do not matter and may be infinite.
        weights: ``(..., n)``.

    >>> weighted_median(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0]))
    tensor(2.)
    >>> weighted_median(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 1.0]))
    tensor(2.5000)
    """
    order = torch.where(weights > 0, values, torch.inf).argsort(-1)
    values, cumulative = values.gather(-1, order), weights.gather(-1, order).cumsum(-1)
    half = cumulative[..., -1:] / 2
    rounding = 8 * torch.finfo(values.dtype).eps * half  # importances are sums of decimals: a tie is a tie
    last = (weights > 0).sum(-1, keepdim=True).clamp(min=1) - 1
    low = torch.minimum((cumulative < half - rounding).sum(-1, keepdim=True), last)
    high = torch.minimum((cumulative <= half + rounding).sum(-1, keepdim=True), last)
    middle = ((values.gather(-1, low) + values.gather(-1, high)) / 2).squeeze(-1)
    return torch.where(half.squeeze(-1) > 0, middle, 0.0)


class AnchorPrecision(ABC):
    """The anchor's ``eta`` in ``eta * |Z - Z_0|^2``; the anchor's Gaussian has precision ``2 eta``."""

    @abstractmethod
    def value(self, mean_curvature: Tensor) -> Tensor:
        """``eta`` per module, shape ``(...,)``.

        Args:
            mean_curvature: ``sum_i 2 a_i rho_i'(0) tr(P_i) / (d_i s_i^2)``, shape ``(...,)``: of the experts' Gaussian
                twins.
        """


@dataclass(frozen=True)
class EtaPrecision(AnchorPrecision):
    """A precision that is proportional to a number ``eta >= 0``."""

    eta: float

    def __post_init__(self) -> None:
        require_not_negative(f"{type(self).__name__}(", eta=self.eta)


@dataclass(frozen=True)
class AbsolutePrecision(EtaPrecision):
    """``eta`` as it stands, as in [PoE] Table 5."""

    @override
    def value(self, mean_curvature: Tensor) -> Tensor:
        return torch.full_like(mean_curvature, self.eta)


@dataclass(frozen=True)
class RidgePrecision(AnchorPrecision):
    """``eta = ridge / 2``: the ridge of the regression behind Gaussian experts of scale ``Absolute(1.0)``.

    The MAP is then ``(sum_i U_i P_i + ridge Z_0) (sum_i P_i + ridge I)^-1``: ``ridge`` is [BMM]'s ``λ̃`` (Eq. 8 and 15)
    for ``InputGram``. For ``Activation`` it is ``λ̃ / n``, as [BMM] does not divide by the number of inputs ``n``.
    """

    ridge: float

    def __post_init__(self) -> None:
        require_not_negative("RidgePrecision(", ridge=self.ridge)

    @override
    def value(self, mean_curvature: Tensor) -> Tensor:
        return torch.full_like(mean_curvature, self.ridge / 2)


@dataclass(frozen=True)
class RelativePrecision(EtaPrecision):
    """``eta`` times the summed mean curvature of the experts' Gaussian twins.

    One number then suits modules of every size and shrinks identical experts alike whatever their energy, but for
    :class:`~poe_models.GeneralizedGaussian`: its weight at rest has no bound, its weight at ``q = s^2`` counts, and
    identical experts are not shrunk. It is computed once from the updates and not from the current weights: the
    posterior is one fixed density. With :class:`Balanced` or :class:`Relative` scales the merge of ``c U_i`` is ``c``
    times the merge of ``U_i``. With ``Balanced`` every expert counts alike in the sum; with ``Relative`` an expert
    counts as one over its squared length, and one that hardly changed a module strengthens the anchor there and draws
    the others' merge to the centre.
    """

    eta: float = 0.1

    @override
    def value(self, mean_curvature: Tensor) -> Tensor:
        return self.eta * mean_curvature


SCALES: dict[str, type[Scale]] = {cls.__name__: cls for cls in (Balanced, Absolute, NormScaled, Relative)}
PRECISIONS: dict[str, type[AnchorPrecision]] = {
    cls.__name__: cls for cls in (RelativePrecision, AbsolutePrecision, RidgePrecision)
}
