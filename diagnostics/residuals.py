r"""Residuals of any merged checkpoint under each expert's map.

An expert's squared residual is ``q = |L (Z - U)|^2`` with ``P = L^T L``. Under a Gram map it is a sum over the rows
(``InputGram``, ``Activation``) or columns (``OutputGram``) of the merged update, ``q = sum_j |r_j|^2``; ``Directional``
is one number. A part's *signed* residual is its component along the expert's own part ``u_j = (L U)_j``,

    signed_j = <r_j, u_j> / |u_j|,

between plus and minus the part's length: negative where the merge falls short of the expert, positive where it
overshoots, and ``<Z - U, U>`` under ``Directional``. Fits of tails take these. Real merges shrink, so that they lie
around an offset below zero, which ``diagnostics.tails.pooled_tails`` takes out group by group.

Merges may come from anywhere: a folder, a file, a state dict, another tool's output. One module is in memory at a time.

>>> from poe_models.residual_maps import Directional
>>> base, one, two = ({"fc.weight": torch.tensor(w)} for w in ([[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]))
>>> vectors = TaskVectors(base, {"one": one, "two": two})
>>> found = residuals({"fc.weight": torch.tensor([[0.5, 0.5]])}, vectors, Directional())
>>> [(entry.expert, entry.signed.tolist()) for entry in found.entries]
[('one', [-0.5]), ('two', [-0.5])]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poe_models.energies import Gaussian
from poe_models.experts import Anchor, ProductOfExperts
from poe_models.operators import Gram, Operator, RankOne
from poe_models.posterior import BoundExpert
from poe_models.printing import Brief
from poe_models.residual_maps import ResidualMap
from poe_models.weights.loading import open_checkpoint, same_weights
from poe_models.weights.task_vectors import ModuleUpdates, Source, TaskVectors

if TYPE_CHECKING:
    import pandas as pd


Array = npt.NDArray[np.float64]
Unit = Literal["raw", "scale", "own"]
"""Unit of a residual: its own; the expert's scale ``s``; the length of the expert's own part, which it has at Z = 0."""
Experts = ResidualMap | ProductOfExperts
"""Measure of residuals: a residual map for every task vector, at the scale ``q(0)``, or a product of experts."""


@dataclass(frozen=True, eq=False, repr=False)
class ExpertResiduals(Brief):
    """Residuals of one expert in one module at a merge.

    Attributes:
        module: Name of the matrix.
        tensor: Name of the tensor it is a part of.
        expert: Name of the expert.
        along: Parts of the residual: all of it, or its rows or columns.
        lengths: Lengths ``|r_j|`` of the parts, ``(n,)``; their squares sum to ``q``.
        signed: Signed residuals of the parts, ``(n,)``; nan where the expert's own part is zero.
        own: Lengths ``|u_j|`` of the expert's own parts, ``(n,)``.
        scale: The expert's scale ``s``.
        weight: The expert's effective weight relative to its Gaussian twin's, ``rho'(q / s^2) / rho'(0)``.
        active: False if the expert's update is zero, so that it has no say here.
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

    @property
    def squared_at_zero(self) -> float:
        """The squared residual of merging nothing, ``q(0)``."""
        return float(np.square(self.own).sum())

    def values(self, unit: Unit = "scale") -> Array:
        """Signed residuals of all parts whose own part is not zero, at most ``(n,)``.

        Raises:
            ValueError: If there is no such unit.
        """
        if unit not in ("raw", "scale", "own"):
            raise ValueError(f"`values(unit={unit!r})`: the units are 'raw', 'scale' and 'own'.")
        defined = ~np.isnan(self.signed)
        divisor = {"raw": np.ones(1), "scale": np.full(1, self.scale), "own": self.own}[unit]
        return self.signed[defined] / np.broadcast_to(divisor, self.signed.shape)[defined]


@dataclass(frozen=True, eq=False, repr=False)
class Residuals(Brief):
    """Residuals of a merge, of every expert in every module.

    Attributes:
        entries: Residuals in the order of the checkpoint, and of the experts within a module; about 24 bytes for each
            row or column of each expert.
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
        """The residuals of one module, tensor or expert, by name.

        Raises:
            ValueError: If there are none.
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
        """Residuals of each module, tensor or expert, by name.

        Raises:
            ValueError: If ``by`` is something else.
        """
        if by not in ("module", "tensor", "expert"):
            raise ValueError(f"`split({by!r})`: residuals are split by 'module', 'tensor' or 'expert'.")
        names = dict.fromkeys(getattr(entry, by) for entry in self.entries)
        return {name: Residuals(tuple(e for e in self.entries if getattr(e, by) == name)) for name in names}

    def values(self, unit: Unit = "scale") -> Array:
        """Signed residuals of all active experts, pooled, ``(n,)``."""
        pooled = [entry.values(unit) for entry in self.entries if entry.active]
        return np.concatenate(pooled) if pooled else np.zeros(0)

    def groups(self, unit: Unit = "scale") -> dict[str, Array]:
        """Signed residuals that share a scale, by name: of each expert in each module.

        Where every expert of a module has one number, they are one group, and the unit should be ``"scale"`` or
        ``"own"``.
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
            "own": lambda entry: entry.squared_at_zero,
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per module and expert: squared residual, share of it that is left, scale, weight; nan if inactive."""
        import pandas as pd

        rows = [
            {
                "module": e.module,
                "tensor": e.tensor,
                "expert": e.expert,
                "squared": e.squared if e.active else math.nan,
                "left": e.squared / e.squared_at_zero if e.active else math.nan,
                "scale": e.scale,
                "weight": e.weight if e.active else math.nan,
                "active": e.active,
            }
            for e in self.entries
        ]
        return pd.DataFrame(rows)

    def _table(self, number: Callable[[ExpertResiduals], float]) -> Array:
        rows, columns = ({name: i for i, name in enumerate(names)} for names in (self.modules, self.experts))
        table = np.full((len(rows), len(columns)), math.nan)
        for entry in self.entries:
            if entry.active:
                table[rows[entry.module], columns[entry.expert]] = number(entry)
        return table


def residuals(
    merged: Source,
    task_vectors: TaskVectors,
    experts: Experts | Callable[[str], Experts],
    *,
    scaling: float | Callable[[str], float] = 1.0,
) -> Residuals:
    """Residuals of a merged checkpoint, one tensor at a time.

    A merge that was saved in half precision has its rounding in ``Z``, too: compare residuals with that, where updates
    are small.

    Args:
        merged: A folder, a file, a state dict or an open checkpoint; its tensors are those of the base.
        task_vectors: Base and experts; their rules define the modules.
        experts: A residual map or a product, or a function that gives one by the tensor's name. Energies matter for
            the effective weights only.
        scaling: ``λ`` in ``W_merged = W_0 + λ Z``, or a function from the tensor's name.

    Returns:
        The residuals of all modules that are merged.

    Raises:
        ValueError: If nothing is merged, or λ is not a positive finite number.
    """
    found = list(_streamed(merged, task_vectors, experts, scaling))
    if not found:
        raise ValueError(
            "`residuals(...)`: the rules merge no tensor, so that there are no modules. Look at `task_vectors."
            "treatments`."
        )
    return Residuals(tuple(found))


def module_residuals(
    merged: Tensor, updates: ModuleUpdates, experts: Experts, *, scaling: float = 1.0
) -> tuple[ExpertResiduals, ...]:
    """Residuals of one module that is in memory, one per expert.

    Args:
        merged: The update times λ, ``W_merged - W_0``, ``(d_out, d_in)``.
        updates: The experts' updates.
        experts: A residual map or a product.
        scaling: ``λ``.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or λ is not a positive finite number.

    >>> from poe_models.residual_maps import Directional
    >>> one = ModuleUpdates("fc", "fc", ("one",), torch.zeros(2, 2), torch.eye(2).unsqueeze(0))
    >>> module_residuals(torch.zeros(2, 2), one, Directional())[0].signed
    array([-2.])
    """
    if not 0 < scaling < math.inf:
        raise ValueError(f"`residuals(scaling={scaling})`: λ must be a positive finite number.")
    if merged.shape != updates.base.shape or not bool(merged.isfinite().all()):
        raise ValueError(
            f"`residuals(...)`: the merged update of {updates.name!r} is {tuple(merged.shape)}, the module "
            f"{tuple(updates.base.shape)}, and every value must be finite. Give `W_merged - W_0`."
        )
    if isinstance(experts, ResidualMap):
        experts = ProductOfExperts.of(updates.names, experts, Gaussian())
    posterior = replace(experts, anchor=Anchor()).bind(updates)
    z = (merged.double() / scaling).to(posterior.dtype).unsqueeze(0)
    return tuple(_of_expert(expert, z, updates) for expert in posterior.experts)


def _streamed(
    merged: Source,
    task_vectors: TaskVectors,
    experts: Experts | Callable[[str], Experts],
    scaling: float | Callable[[str], float],
) -> Iterator[ExpertResiduals]:
    merge = _as_expert(merged, task_vectors)
    for tensor, treatment in task_vectors.treatments.items():
        if treatment.action == "merge":
            here = experts if isinstance(experts, ResidualMap | ProductOfExperts) else experts(tensor)
            factor = scaling(tensor) if callable(scaling) else scaling
            for module, z in _pairs(task_vectors, merge, tensor):
                yield from module_residuals(z, module, here, scaling=factor)


def _as_expert(merged: Source, task_vectors: TaskVectors) -> TaskVectors | None:
    """The merge as a fine-tune of the base, which it is read and checked like; None if it is the base itself."""
    checkpoint = open_checkpoint(merged, base=task_vectors.base)
    if same_weights(checkpoint, task_vectors.base):
        return None
    return TaskVectors(
        task_vectors.base, {"merged": checkpoint}, task_vectors.rules, task_vectors.dtype, task_vectors.device
    )


def _pairs(task_vectors: TaskVectors, merge: TaskVectors | None, tensor: str) -> Iterable[tuple[ModuleUpdates, Tensor]]:
    """Modules of a tensor and what the merge added to them; an adapter that leaves the tensor alone added nothing."""
    modules = task_vectors.modules(tensor)
    if merge is None or merge.treatments[tensor].action != "merge":
        return [(module, torch.zeros_like(module.updates[0])) for module in modules]
    return [(m, added.updates[0]) for m, added in zip(modules, merge.modules(tensor), strict=True)]


def _of_expert(expert: BoundExpert, z: Tensor, module: ModuleUpdates) -> ExpertResiduals:
    root = expert.operator.root(z - expert.update).squeeze(0).double()
    own = expert.operator.root(expert.update).squeeze(0).double()
    along, axis = _parts(expert.operator)
    lengths, own_lengths = root.square().sum(axis).sqrt(), own.square().sum(axis).sqrt()
    signed = torch.where(own_lengths > 0, (root * own).sum(axis) / own_lengths, math.nan)
    if not all(bool(each.isfinite().all()) for each in (lengths, own_lengths, expert.scale_squared)):
        raise ValueError(
            f"the residual of expert {expert.name!r} at {module.name!r} is beyond float64: its update is too large to "
            "be measured. Divide base, experts and merge by one number before."
        )
    q = expert.residual(z)
    relative = expert.weight(q) / expert.weight(torch.zeros_like(q))
    return ExpertResiduals(
        module=module.name,
        tensor=module.tensor,
        expert=expert.name,
        along=along,
        lengths=lengths.cpu().numpy(),
        signed=signed.cpu().numpy(),
        own=own_lengths.cpu().numpy(),
        scale=math.sqrt(float(expert.scale_squared)),
        weight=float(relative),
        active=bool(expert.active),
    )


def _parts(operator: Operator) -> tuple[Literal["whole", "rows", "columns"], int]:
    """Parts of a residual under this operator, and the dimension of ``L x`` to sum over."""
    if isinstance(operator, RankOne):
        return "whole", -1
    if isinstance(operator, Gram) and operator.side == "left":
        return "columns", -2
    return "rows", -1
