"""Sensitivity of a merge to the scale of its experts: the same design over a grid of gamma."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from diagnostics.verdicts import Level, Verdict
from inference.map import fixed_point
from poe_models.experts import ProductOfExperts
from poe_models.printing import Brief
from poe_models.scales import Scale
from poe_models.weights.task_vectors import ModuleUpdates

if TYPE_CHECKING:
    import pandas as pd


LARGE_MOVE = 0.1
"""Relative move of the merge over the grid from which gamma is worth choosing with care."""


@dataclass(frozen=True, eq=False, repr=False)
class GammaSensitivity(Brief):
    """A merge at ``G`` values of gamma in ``M`` modules; arrays are float64 unless said otherwise.

    Attributes:
        gammas: Ascending grid, ``(G,)``.
        reference: Position in the grid of the merge that the others are compared with.
        modules: Names of the modules.
        distance: ``|Z - Z_ref| / |Z_ref|``, ``(G, M)``; nan where the reference is zero.
        from_twin: ``|Z - Z_twin| / |Z_twin|`` with the Gaussian twin at the same gamma, ``(G, M)``: the effect of the
            tails.
        weight_spread: Largest over smallest relative expert weight, ``(G, M)``.
        converged: ``(G, M)`` bool.
        scores: Score of each merge, ``(G,)``; None without one.
    """

    gammas: np.ndarray
    reference: int
    modules: tuple[str, ...]
    distance: np.ndarray
    from_twin: np.ndarray
    weight_spread: np.ndarray
    converged: np.ndarray
    scores: np.ndarray | None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per gamma and module; the score, if there is one, is the same for all modules of a gamma."""
        import pandas as pd

        places = pd.MultiIndex.from_product([self.gammas, self.modules], names=["gamma", "module"])
        names = ("distance", "from_twin", "weight_spread", "converged")
        table = pd.DataFrame({name: getattr(self, name).ravel() for name in names}, places).reset_index()
        return table if self.scores is None else table.assign(score=np.repeat(self.scores, len(self.modules)))

    @property
    def verdict(self) -> Verdict:
        """Verdict on the moves of the merge and its score over the grid."""
        known = ~np.isnan(self.distance).any(0)
        if not known.any():
            return Verdict("gamma", Level.UNKNOWN, "the merge at the reference gamma is zero in every module.")
        moves = self.distance[:, known].max(0)
        text = (
            f"over gamma from {self.gammas[0]:.3g} to {self.gammas[-1]:.3g} the merge moves by {np.median(moves):.1%} "
            f"of its norm in the median module, {moves.max():.1%} at most"
        )
        if not known.all():
            text += f"; {int((~known).sum())} modules whose merge is zero at the reference gamma are left out"
        if self.scores is not None:
            best = int(self.scores.argmax())
            text += f"; the score lies between {self.scores.min():.4g} and {self.scores.max():.4g}"
            text += f", best at {self.gammas[best]:.3g}"
        failed = int((~self.converged).sum())
        if failed:
            return Verdict("gamma", Level.CAUTION, f"{text}; {failed} solves did not converge: raise max_steps.")
        if moves.max() > LARGE_MOVE:
            return Verdict("gamma", Level.CAUTION, f"{text}: choose gamma on held-out data, or compare evidence.")
        return Verdict("gamma", Level.GOOD, f"{text}.")


def gamma_sensitivity(
    poe: ProductOfExperts,
    modules: Iterable[ModuleUpdates],
    gammas: Sequence[float],
    score: Callable[[Mapping[str, Tensor]], float] | None = None,
    *,
    reference: int | None = None,
    max_steps: int = 100,
) -> GammaSensitivity:
    """Solve the same product at several gammas ([PoE] Figure 7).

    One merge beside the reference is in memory at a time; the modules are read again for each gamma. A relative
    precision of the anchor follows the scales, as the design has it.

    Args:
        poe: The design; every scale must have a ``gamma``.
        modules: A ``TaskVectors``, or a list of modules.
        gammas: Two or more positive values.
        score: Maps merged updates by the modules' names to a number, such as validation accuracy; higher is better.
        reference: Position in the ascending grid; the middle one by default.
        max_steps: Reweighted solves per start.

    Raises:
        ValueError: If there are too few gammas, no modules, a scale without gamma, or a score that is not finite.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> updates = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    >>> module = ModuleUpdates("fc.weight", "fc.weight", ("a", "b"), torch.zeros(3, 4), updates)
    >>> found = gamma_sensitivity(ProductOfExperts.of(["a", "b"]), [module], [0.3, 1.0, 3.0])
    >>> found.distance.shape, bool(found.from_twin[0, 0] > found.from_twin[2, 0])
    ((3, 1), True)
    """
    grid = np.array(sorted(set(gammas)), dtype=np.float64)
    middle = len(grid) // 2 if reference is None else reference
    if len(grid) < 2 or not 0 <= middle < len(grid):
        raise ValueError(
            f"`gamma_sensitivity(gammas={list(gammas)}, reference={reference})`: give two or more different values, "
            "and a reference among them by its position."
        )
    if isinstance(modules, Iterator):
        raise ValueError(
            "`gamma_sensitivity(modules=...)`: got an iterator, which gives its modules once, and every gamma needs "
            "them. Give a `TaskVectors` or a list."
        )
    central = dict(_merges(with_gamma(poe, float(grid[middle])), modules, max_steps))
    if not central:
        raise ValueError("`gamma_sensitivity(modules=[])`: nothing to merge. Give at least one module.")
    rows = [_row(with_gamma(poe, float(gamma)), modules, central, score, max_steps) for gamma in grid]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    scores = columns.pop("score")
    if score is not None and not np.isfinite(scores).all():
        raise ValueError(
            f"`gamma_sensitivity(score=...)`: the scores are {scores.tolist()} at gamma {grid.tolist()}. Give a score "
            "that is a finite number for every merge."
        )
    return GammaSensitivity(grid, middle, tuple(central), **columns, scores=None if score is None else scores)


def with_gamma(poe: ProductOfExperts, gamma: float) -> ProductOfExperts:
    """The product with another gamma in every scale.

    Raises:
        ValueError: If a scale has no ``gamma``.

    >>> with_gamma(ProductOfExperts.of(["a"]), 0.5).experts[0].scale
    Balanced(gamma=0.5)
    """
    return replace(poe, experts=tuple(replace(each, scale=_rescaled(each.scale, gamma)) for each in poe.experts))


def _rescaled(scale: Scale, gamma: float) -> Scale:
    if "gamma" not in {item.name for item in fields(scale)}:  # type: ignore[arg-type]
        raise ValueError(
            f"`with_gamma(...)`: the scale {scale!r} has no gamma. Give the experts `Balanced`, `Relative`, "
            "`NormScaled` or `Absolute` scales."
        )
    return replace(scale, gamma=gamma)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class _Merged:
    """Merged update of one module, its Gaussian twin's, the weight spread, and whether both converged."""

    value: Tensor
    twin: Tensor
    spread: float
    converged: bool


def _merges(poe: ProductOfExperts, modules: Iterable[ModuleUpdates], max_steps: int) -> Iterator[tuple[str, _Merged]]:
    for module in modules:
        solution = fixed_point(poe.bind(module), max_steps=max_steps)
        twin = fixed_point(poe.twin().bind(module), max_steps=max_steps)
        spread = float(solution.info.weight_spread[0])
        yield module.name, _Merged(solution.value[0], twin.value[0], spread, solution.converged and twin.converged)


def _row(
    poe: ProductOfExperts,
    modules: Iterable[ModuleUpdates],
    central: Mapping[str, _Merged],
    score: Callable[[Mapping[str, Tensor]], float] | None,
    max_steps: int,
) -> dict[str, list[float] | float]:
    """Columns of one gamma; the merge itself is kept only for the score."""
    merged: dict[str, Tensor] = {}
    columns: dict[str, list[float]] = {"distance": [], "from_twin": [], "weight_spread": [], "converged": []}
    for name, each in _merges(poe, modules, max_steps):
        distances = _relative(each.value, central[name].value), _relative(each.value, each.twin)
        for column, number in zip(columns.values(), (*distances, each.spread, each.converged), strict=True):
            column.append(number)
        if score is not None:
            merged[name] = each.value
    return {**columns, "score": np.nan if score is None else float(score(merged))}


def _relative(value: Tensor, other: Tensor) -> float:
    size = float(other.double().norm())
    return float((value.double() - other.double()).norm()) / size if size > 0 else np.nan
