"""Alignment of the experts' updates with the inputs of their tasks: may a merge without data be trusted?

[BMM] Theorem 1 lets the Gram matrix of an update stand for the second moments of its task's inputs, because a step of
gradient descent adds outer products with inputs: the rows of ``U_i`` lie where the inputs of task ``i`` do. Where that
holds, ``U_i^T U_i`` is more like the moments of its own task than like those of the others ([BMM] Figure 2); shuffling
the tasks says how much of the likeness is of the layer rather than of the task.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diagnostics.verdicts import Level, Verdict
from poe_models.printing import Brief
from poe_models.weights.moments import ModuleMoments, MomentsFolder
from poe_models.weights.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

Side = Literal["input", "output"]

LEVEL = 0.05
"""Share of shuffled tasks that may be as alike before the likeness is called one of the layer."""

MOST_SHUFFLES = 5040


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Brief):
    """Frobenius cosines between Gram matrices of updates and second moments of tasks.

    Attributes:
        modules: Names of the modules.
        experts: Names of the experts, whose tasks go by the same names.
        side: ``"input"``: ``U^T U`` and the inputs' moments ``M``; ``"output"``: ``U U^T`` and the outputs'
            ``W M W^T``.
        cosines: ``(modules, experts, tasks)`` float64; nan where an update or a moment is zero.
        p_values: Share of shuffles of the tasks in which updates are at least as much like their tasks' moments,
            ``(modules,)``; nan where no update or moment is.
        p_value: The same of the mean over modules.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    side: Side
    cosines: Tensor
    p_values: Tensor
    p_value: float

    @property
    def own(self) -> Tensor:
        """Cosines with the own task, ``(modules, experts)``."""
        return self.cosines.diagonal(dim1=-2, dim2=-1)

    @property
    def others(self) -> Tensor:
        """Mean cosine with the other tasks, ``(modules, experts)``; nan for one expert."""
        without = torch.where(torch.eye(len(self.experts), dtype=torch.bool), torch.nan, self.cosines)
        return without.nanmean(-1)

    def verdict(self) -> Verdict:
        """Whether updates may stand for data, in words."""
        own, others = float(self.own.nanmean()), float(self.others.nanmean())
        numbers = f"mean cosine {own:.2f} with the own task's {self.side}s, {others:.2f} with other tasks'"
        if math.isnan(self.p_value) or 1 / math.factorial(len(self.experts)) > LEVEL:
            text = f"Too few tasks to tell by shuffling them: {numbers}. Four experts at least can be judged."
            return Verdict("alignment", Level.UNKNOWN, text)
        if self.p_value <= LEVEL:
            return Verdict(
                "alignment", Level.GOOD, f"Updates are aligned with their tasks: {numbers} (p = {self.p_value:.2g})."
            )
        return Verdict(
            "alignment",
            Level.CAUTION,
            f"Updates are no more like their own task than like others: {numbers} (p = {self.p_value:.2g}). Merging "
            "without data is not to be trusted here; give `Activation` or `Mixed` experts a few inputs.",
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each module and expert: own and other tasks' cosine, p-value of the module."""
        import pandas as pd

        rows = [
            {
                "module": module,
                "expert": expert,
                "own": float(self.own[m, e]),
                "others": float(self.others[m, e]),
                "p_value": float(self.p_values[m]),
            }
            for m, module in enumerate(self.modules)
            for e, expert in enumerate(self.experts)
        ]
        return pd.DataFrame(rows)


def gram_alignment(
    task_vectors: TaskVectors, activations: ModuleMoments | MomentsFolder, side: Side = "input", seed: int = 0
) -> Alignment:
    """Alignment of every update's Gram matrix with the second moments of every task, on one side of the matrices.

    Args:
        task_vectors: Base and experts; read a module at a time.
        activations: Second moments of the inputs of each module, of ``collect_activations``.
        side: Side of the matrices.
        seed: Of the shuffles, where there are too many to try all.

    Returns:
        Cosines, and how shuffled tasks do.

    Raises:
        ValueError: If the moments are of another kind, or there is no module.
        CheckpointError: If the moments lack an expert or module.

    [BMM] Theorem 1, Figure 2.
    """
    if side not in ("input", "output"):
        raise ValueError(f"`gram_alignment(side={side!r})`: 'input' or 'output'.")
    names, given, tables = (
        task_vectors.names,
        activations.opened("activations", task_vectors.names),
        dict[str, Tensor](),
    )
    for module in task_vectors:
        shape = (int(module.base.shape[0]), int(module.base.shape[1]))
        moments = [given.read(name, [module.name], shape)[0].double() for name in names]
        updates = module.updates.double().cpu()
        if side == "input":
            grams = [update.mT @ update for update in updates]
        else:
            grams = [update @ update.mT for update in updates]
            weights = module.base.double().cpu() + updates
            moments = [weight @ moment @ weight.mT for weight, moment in zip(weights, moments, strict=True)]
        tables[module.name] = torch.stack([torch.stack([_cosine(g, m) for m in moments]) for g in grams])
    if not tables:
        raise ValueError("`gram_alignment(...)`: no tensor is merged as a matrix. Look at `task_vectors.treatments`.")
    cosines = torch.stack([*tables.values()])
    p_values = torch.tensor([_shuffled(table.unsqueeze(0), seed) for table in cosines], dtype=torch.float64)
    return Alignment(tuple(tables), names, side, cosines, p_values, _shuffled(cosines, seed))


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    lengths = one.norm() * other.norm()
    return (one * other).sum() / torch.where(lengths > 0, lengths, torch.nan)


def _shuffled(cosines: Tensor, seed: int) -> float:
    """Share of the orders of the tasks, the true one among them, whose cosines are as large in the mean."""
    mean = cosines.nanmean(0)
    size = len(mean)
    own = float(mean.diagonal().nanmean())
    if math.isnan(own):
        return math.nan
    orders = _orders(size, seed)
    found = [float(mean[range(size), list(order)].nanmean()) for order in orders]
    return sum(value >= own - 1e-12 for value in found) / len(found)


def _orders(size: int, seed: int) -> list[Sequence[int]]:
    if math.factorial(size) <= MOST_SHUFFLES:
        return list(itertools.permutations(range(size)))
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randperm(size, generator=generator).tolist() for _ in range(MOST_SHUFFLES - 1))
    return [list(range(size)), *drawn]
