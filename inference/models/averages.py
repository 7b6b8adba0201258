"""Averaged tensors of a merge: weights of the experts and scaling, from the designs of merged tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, runtime_checkable

from inference.models.method_design import AnyDesign, AnyDesigns, AnyDesignT, as_any_function
from poe_models.methods import MergingMethod
from poe_models.weights.task_vectors import TaskVectors


@dataclass(frozen=True)
class Average:
    """Weights ω of the experts and factor λ of an averaged tensor, ``W_0 + λ Σ ω_i U_i / Σ ω_i``.

    Attributes:
        importance: Weight of each expert.
        scaling: Factor of the mean update.
    """

    importance: tuple[float, ...]
    scaling: float = 1.0

    @classmethod
    def of(cls, design: AnyDesign, names: Sequence[str]) -> Average:
        """Importances and λ of a design, for experts of these names."""
        return cls(design.importance(names), design.scaling)


@runtime_checkable
class KnowsAverages(Protocol):
    """Designs of a whole model that say how tensors without one are averaged."""

    def average(self, tensor: str) -> Average:
        """The average of an averaged tensor."""


@dataclass(frozen=True)
class ModelDesigns(Generic[AnyDesignT]):
    """Designs of the merged tensors, and averages of the others.

    Attributes:
        merged: Name of a merged tensor to its design.
        averaged: Name of an averaged tensor to its average.
    """

    merged: Callable[[str], AnyDesignT]
    averaged: Callable[[str], Average]

    def __call__(self, tensor: str) -> AnyDesignT:
        """The design of a merged tensor."""
        return self.merged(tensor)

    def average(self, tensor: str) -> Average:
        """The average of an averaged tensor."""
        return self.averaged(tensor)


def with_averages(merged: Callable[[str], AnyDesignT], like: object) -> Callable[[str], AnyDesignT]:
    """Designs of the merged tensors with the averages of others, if these say what they are."""
    return ModelDesigns(merged, like.average) if isinstance(like, KnowsAverages) else merged


def averages_of(task_vectors: TaskVectors, designs: AnyDesigns) -> Callable[[str], Average]:
    """Averages of a merge's averaged tensors, by the importances and the λ of the merged ones.

    Args:
        task_vectors: Base and experts.
        designs: One product, method or design for all tensors, or a function from the name of a merged tensor. Where
            a function's designs differ in importances or λ, there is none to follow: the average is then the plain
            mean with λ = 1, which is warned about, unless the function has a method ``average`` that says what it is.

    Returns:
        A function from the name of an averaged tensor.
    """
    if isinstance(designs, KnowsAverages):
        return designs.average
    for_tensor, names = as_any_function(designs), task_vectors.names
    if isinstance(designs, MergingMethod) or not callable(designs):
        only = Average.of(for_tensor(""), names)
        return lambda tensor: only
    merged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
    found = {Average.of(design, names) for design in {id(d): d for d in map(for_tensor, merged)}.values()}
    plain = Average((1.0,) * len(names))
    if len(found) > 1:
        _warn_of_plain_mean(task_vectors)
    followed = found.pop() if len(found) == 1 else plain
    return lambda tensor: followed


def _warn_of_plain_mean(task_vectors: TaskVectors) -> None:
    """Warn of the share of the parameters that is averaged without weights of a design."""
    base = task_vectors.base
    sizes = {name: math.prod(base.tensors[name].shape) for name in task_vectors.treatments}
    averaged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "average"]
    if averaged:
        share = sum(sizes[name] for name in averaged) / (sum(sizes.values()) or 1)
        warnings.warn(
            f"the designs of merged tensors differ in importance or scaling, and {len(averaged)} averaged tensors "
            f"({share:.2g} of all parameters) follow none of them: they are the base plus the plain mean of the "
            "updates. Give `ModelDesigns(merged, averaged)` of `inference.models.averages` to say what they are.",
            stacklevel=4,
        )
