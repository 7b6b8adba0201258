"""Residuals of a merge as data: of every expert in every module, in tables, pooled, and in groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["ExpertResiduals", "Residuals", "Unit"]

Array = npt.NDArray[np.float64]
Unit = Literal["raw", "scale", "own"]
"""Of a residual: its own; the expert's scale ``s``; the length of the expert's own part, which it has at Z = 0."""


@dataclass(frozen=True, eq=False)
class ExpertResiduals:
    """Residuals of one expert in one module at a merge.

    Attributes:
        module: Name of the matrix.
        tensor: Name of the tensor it is of.
        expert: Name of the expert.
        along: What the parts are.
        lengths: ``(n,)`` float64 ``|r_j|``; their squares sum to ``q``.
        signed: ``(n,)`` float64, see ``diagnostics.residuals``; nan where the expert's own part is zero.
        own: ``(n,)`` float64 ``|u_j|``.
        scale: ``s``.
        weight: The expert's effective weight relative to its Gaussian twin's, ``rho'(q / s^2) / rho'(0)``.
        active: Whether the expert says anything here; false if its update is zero.
    """

    module: str
    tensor: str
    expert: str
    along: Literal["whole", "rows", "columns"]
    lengths: Array
    signed: Array
    own: Array
    scale: float
    weight: float
    active: bool

    @property
    def squared(self) -> float:
        """The squared residual ``q``."""
        return float(np.square(self.lengths).sum())

    def values(self, unit: Unit = "scale") -> Array:
        """Signed residuals that are defined, of all parts whose own part is not zero.

        Args:
            unit: In which they are given.

        Returns:
            At most ``(n,)`` float64.

        Raises:
            ValueError: If there is no such unit.
        """
        if unit not in ("raw", "scale", "own"):
            raise ValueError(f"`values(unit={unit!r})`: the units are 'raw', 'scale' and 'own'.")
        defined = ~np.isnan(self.signed)
        divisor = {"raw": np.ones(1), "scale": np.full(1, self.scale), "own": self.own}[unit]
        return self.signed[defined] / np.broadcast_to(divisor, self.signed.shape)[defined]


@dataclass(frozen=True, eq=False)
class Residuals:
    """Residuals of a merge, of every expert in every module.

    Attributes:
        entries: In the order of the checkpoint, and of the experts within a module; about 24 bytes for each row or
            column of each expert.
    """

    entries: tuple[ExpertResiduals, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(dict.fromkeys(entry.module for entry in self.entries))

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(dict.fromkeys(entry.expert for entry in self.entries))

    def where(self, *, module: str | None = None, tensor: str | None = None, expert: str | None = None) -> Residuals:
        """Those of one module, tensor or expert.

        Args:
            module: Name of a module.
            tensor: Name of a tensor.
            expert: Name of an expert.

        Returns:
            The rest of the residuals left out.

        Raises:
            ValueError: If none is left.
        """
        wanted = {"module": module, "tensor": tensor, "expert": expert}
        asked = {field: name for field, name in wanted.items() if name is not None}
        kept = tuple(e for e in self.entries if all(getattr(e, field) == name for field, name in asked.items()))
        if not kept:
            raise ValueError(
                f"`where({', '.join(f'{field}={name!r}' for field, name in asked.items())})`: there are none. Experts: "
                f"{', '.join(self.experts)}; `modules` lists the modules."
            )
        return Residuals(kept)

    def split(self, by: Literal["module", "tensor", "expert"]) -> dict[str, Residuals]:
        """Residuals of each module, tensor or expert.

        Args:
            by: Which of them.

        Returns:
            Name to residuals.

        Raises:
            ValueError: If it is something else.
        """
        if by not in ("module", "tensor", "expert"):
            raise ValueError(f"`split({by!r})`: residuals are split by 'module', 'tensor' or 'expert'.")
        names = dict.fromkeys(getattr(entry, by) for entry in self.entries)
        return {name: Residuals(tuple(e for e in self.entries if getattr(e, by) == name)) for name in names}

    def values(self, unit: Unit = "scale") -> Array:
        """Signed residuals of all active experts, pooled.

        Args:
            unit: In which they are given.

        Returns:
            ``(n,)`` float64.
        """
        pooled = [entry.values(unit) for entry in self.entries if entry.active]
        return np.concatenate(pooled) if pooled else np.zeros(0)

    def groups(self, unit: Unit = "scale") -> dict[str, Array]:
        """Signed residuals that share a scale: of each expert in each module; of a module, if experts have one each.

        Args:
            unit: In which they are given; for maps with one number per expert, take one that is free of units.

        Returns:
            Name of the group to its residuals.
        """
        found: dict[str, list[Array]] = {}
        for entry in self.entries:
            if entry.active:
                name = entry.module if entry.along == "whole" else f"{entry.module} / {entry.expert}"
                found.setdefault(name, []).append(entry.values(unit))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def squared(self) -> Array:
        """Squared residuals ``q``, ``(M, E)``; nan for experts that are not active in a module."""
        return self._table(lambda entry: entry.squared)

    def mean_squared(self, unit: Unit = "scale") -> Array:
        """Squared residual of every module, the mean over its experts: [PoE] Figure 2.

        Args:
            unit: "raw" for ``q``, "scale" for ``q / s^2``, "own" for ``q / q(0)``.

        Returns:
            ``(M,)``; nan where no expert is active.
        """
        divisors = {
            "raw": lambda _: 1.0,
            "scale": lambda entry: entry.scale**2,
            "own": lambda entry: float(np.square(entry.own).sum()),
        }
        table = self._table(lambda entry: entry.squared / divisors[unit](entry))
        counts = (~np.isnan(table)).sum(1)
        return np.where(counts > 0, np.nansum(table, 1) / np.maximum(counts, 1), np.nan)

    def weights(self) -> Array:
        """Effective weights relative to the Gaussian twins', ``(M, E)``; nan for experts that are not active."""
        return self._table(lambda entry: entry.weight)

    def weight_spread(self) -> Array:
        """Largest over smallest relative weight of every module, ``(M,)``; 1 where a tail did nothing."""
        table = self.weights()
        empty = np.isnan(table).all(1)
        high, low = (np.where(np.isnan(table), fill, table) for fill in (-np.inf, np.inf))
        return np.where(empty, 1.0, high.max(1) / np.where(empty, 1.0, low.min(1)))

    def _table(self, number: Callable[[ExpertResiduals], float]) -> Array:
        rows, columns = ({name: i for i, name in enumerate(names)} for names in (self.modules, self.experts))
        table = np.full((len(rows), len(columns)), math.nan)
        for entry in self.entries:
            if entry.active:
                table[rows[entry.module], columns[entry.expert]] = number(entry)
        return table
