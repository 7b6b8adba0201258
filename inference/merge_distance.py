r"""Distance of the centre of draws from the merge that they are to surround, in units of the draws' own spread.

The members of an ensemble stand beside one merged model, and what is said of the one is believed of the other. So for
every module the mean of the draws is compared with the merged update ``Z_*``. With ``D = E Z - Z_*``, ``u = D / |D|``,

    distance = |D| / sd(<Z, u>),

the displacement in standard deviations of the draws *along the displacement*. Unlike ``|D|`` over the draws' length
this is the same in ten and in ten million dimensions. What is known not to be displacement is taken off ``|D|^2``
first: the squared Monte Carlo error of the mean, the rounding of the merged weights, and a thousandth of the merge's
length, which is where solvers in float32 stop. Draws that surround the merge are at about 0, skewed posteriors at a
fraction of 1; beyond ``FAR`` the merge is no place that the draws come near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.records import joined, with_tensors
from poe_models.span import SpanStatistics

FAR = 3.0
"""Standard deviations between the centre of the draws and the merge that are worth a warning."""
RESOLUTION = 1e-3
"""Displacements below this share of the merge's length are rounding."""
FEWEST = 10
"""Draws below which their spread is not known."""


@dataclass(frozen=True, eq=False)
class MergeDistance:
    """Distance of draws from the merge, module by module; float64.

    Attributes:
        modules: Names.
        displacement: ``|E Z - Z_*|`` less what is Monte Carlo error or rounding, ``(M,)``.
        spread: Standard deviation of the draws along the displacement, ``(M,)``; nan if there are too few to tell, or
            no displacement.
        length: ``|Z_*|``, ``(M,)``.

    >>> far = MergeDistance(("a", "b"), *torch.tensor([[0.1, 4.0], [1.0, 1.0], [2.0, 4.0]], dtype=torch.float64))
    >>> far.worst, far.where, far.beyond
    (4.0, 'b', ('b',))
    """

    modules: tuple[str, ...]
    displacement: Tensor
    spread: Tensor
    length: Tensor

    @property
    def distance(self) -> Tensor:
        """Displacements in standard deviations of the draws, ``(M,)``; nan where the spread is not known."""
        return torch.where(self.displacement <= 0, 0.0, self.displacement / self.spread)  # nan stays nan

    @property
    def typical(self) -> float:
        """Mean over modules; nan if it is not known for one."""
        return float(self.distance.mean())

    @property
    def worst(self) -> float:
        """The largest of all modules whose distance is known; nan if it is known for none."""
        return float(self._known.max()) if len(self.unknown) < len(self.modules) else math.nan

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the modules whose distance is not known: too few draws, or values that are not finite."""
        return self._named(self.distance.isnan())

    @property
    def where(self) -> str:
        """Name of the module that is farthest."""
        return self.modules[int(self._known.argmax())]

    @property
    def beyond(self) -> tuple[str, ...]:
        """Names of the modules whose draws are known to be farther from the merge than ``FAR``."""
        return self._named(self._known > FAR)

    def _named(self, chosen: Tensor) -> tuple[str, ...]:
        return tuple(name for name, each in zip(self.modules, chosen.tolist(), strict=True) if each)

    @property
    def share(self) -> float:
        """Length of the displacement of all modules together over that of the merge."""
        return float(self.displacement.norm() / self.length.norm().clamp(min=torch.finfo(torch.float64).tiny))

    @property
    def _known(self) -> Tensor:
        return self.distance.nan_to_num(nan=-1.0, posinf=math.inf)

    def select(self, kept: Sequence[int]) -> MergeDistance:
        """The distances of the modules at some positions."""
        places = list(kept)
        some = with_tensors(lambda value: value[places], self)
        return replace(some, modules=tuple(self.modules[place] for place in places))

    @classmethod
    def zero(cls, modules: Sequence[str], length: Tensor) -> MergeDistance:
        """The distances of draws whose mean is the merge by construction, from its length ``(M,)``."""
        return cls(tuple(modules), torch.zeros_like(length), torch.full_like(length, torch.nan), length)

    @classmethod
    def joined(cls, parts: Sequence[MergeDistance]) -> MergeDistance:
        """The distances of several groups of modules as one."""
        return replace(joined(*parts), modules=tuple(name for part in parts for name in part.modules))

    @override
    def __str__(self) -> str:
        """A sentence without its end.

        >>> said = str(MergeDistance(("a",), *torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)))
        >>> print(said[:107])
        their mean is 0.5 standard deviations of the draws from the merge in a, the farthest module (0.5 on average
        >>> print(said[109:])
        there one standard deviation is 50 % of the merge's length)
        """
        if math.isnan(self.worst):
            return "they are too few to measure their distance from the merge"
        more = f"; too few to tell in {', '.join(self.unknown[:3])}" if self.unknown else ""
        more += f" and {len(self.unknown) - 3} more" if len(self.unknown) > 3 else ""
        return (
            f"their mean is {self.worst:.2g} standard deviations of the draws from the merge in {self.where}, the "
            f"farthest module ({float(self.distance.nanmean()):.2g} on average{self._wide}{more})"
        )

    @property
    def _wide(self) -> str:
        """Spread of the draws relative to the merge, in words: a wide spread makes any distance look small."""
        place = int(self._known.argmax())
        share = float(self.spread[place] / self.length[place])
        if not math.isfinite(share):
            return ""
        return f"; there one standard deviation is {_percent(share)} % of the merge's length"


def span_distance(
    statistics: SpanStatistics, coefficients: Tensor, merge: Tensor | None = None
) -> MergeDistance | None:
    """Distance of draws ``(C, S, M, K)`` from a merge ``(M, K)`` in the span of statistics, all in coefficients.

    By default it is the merge that the span goes through; None if there is none.
    """
    if merge is None and statistics.through is None:
        return None
    gram = statistics.gram
    if merge is None:
        merge = gram.new_zeros(gram.shape[:2])
        merge[:, -1] = 1.0
    mean = coefficients.mean((0, 1))
    away = mean - merge
    squared = torch.einsum("mj,mjk,mk->m", away, gram, away)
    along = torch.einsum("mjk,mk->mj", gram, away) / squared.sqrt()[:, None]
    length = torch.einsum("mj,mjk,mk->m", merge, gram, merge).clamp(min=0).sqrt()
    return MergeDistance(
        statistics.modules,
        displacement_of(squared, squared_error(coefficients, gram), length),
        spread_along(coefficients, along),
        length,
    )


def displacement_of(squared: Tensor, error: Tensor, length: Tensor) -> Tensor:
    """``|D|`` less Monte Carlo error and rounding, from ``|D|^2``, the error's mean square and ``|Z_*|``, ``(M,)``."""
    return (squared - error - (RESOLUTION * length).square()).clamp(min=0).sqrt()


def squared_error(coefficients: Tensor, gram: Tensor) -> Tensor:
    """Expected ``|mean - E Z|^2``, ``(M,)``, of coefficients ``(C, S, M, K)`` under a Gram matrix ``(M, K, K)``.

    From the chains' means where there are several, since the draws of one depend on each other.
    """
    groups = coefficients.mean(1) if len(coefficients) > 1 else coefficients[0]
    count = len(groups)
    if count < 2:
        return torch.zeros(len(gram), dtype=torch.float64, device=gram.device)
    away = groups - groups.mean(0)
    return torch.einsum("nmj,mjk,nmk->m", away, gram, away) / (count * (count - 1))


def spread_along(coefficients: Tensor, along: Tensor) -> Tensor:
    """Standard deviation of the draws ``(C, S, M, K)`` along a direction, ``(M,)``; nan of fewer than ``FEWEST``.

    The direction is given by its inner products with the basis, ``(M, K)``.
    """
    projected = torch.einsum("csmj,mj->csm", coefficients, along).flatten(0, 1)
    return projected.std(0) if len(projected) >= FEWEST else torch.full_like(projected[0], torch.nan)


def _percent(share: float) -> str:
    """A share in per cent with two digits, never in powers of ten."""
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 100 else f"{percent:.2g}"
