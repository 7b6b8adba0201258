"""Merging methods in the place of a product of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from inference.models.design import Design, Designs, as_function, require_usable
from inference.retention import retention_of_updates
from inference.solution import MethodInfo, Solution, Status
from poe_models.methods import MergingMethod, ModuleBatch


@dataclass(frozen=True, eq=False)
class MethodDesign:
    """The matrices of a tensor are merged by a method, of all task vectors; what ``Design`` is for products of experts.

    Args:
        method: The method; where it has to see the whole model first, ``merge_checkpoint`` shows it.
        scaling: Factor λ in ``W = W_0 + λ Z``, beside a coefficient of the method's own.
    """

    method: MergingMethod
    scaling: float = 1.0

    def order(self, names: Sequence[str]) -> list[int]:
        """Positions of the task vectors that are merged: all of them."""
        return list(range(len(names)))

    def importance(self, names: Sequence[str]) -> tuple[float, ...]:
        """Importance of each task vector, by which tensors that the method does not see are averaged."""
        return self.method.importance(len(names))

    def solve(self, batch: ModuleBatch) -> Solution[MethodInfo]:
        """Merge a batch of modules; ``value`` of the solution is ``(M, d_out, d_in)``."""
        value = self.method.merge(batch)
        kept = retention_of_updates(batch.experts, batch.updates, value)
        return Solution(value, (Status.COMPUTED,) * len(value), MethodInfo(kept))

    def describe(self) -> dict[str, Any]:
        """The design as plain data, for the record of a merge."""
        about = self.method.about
        return {
            "method": repr(self.method),
            "title": about.title,
            "citation": about.citation,
            "matrices": about.matrices,
            "scaling": self.scaling,
        }

    def check(self, names: Sequence[str]) -> None:
        """Refuse a method that lacks data or fails on random updates, before anything is read.

        Raises:
            ValueError: If it needs data, or fails on random updates.
        """
        require_usable(self.method, len(names))

    def with_method(self, method: MergingMethod) -> MethodDesign:
        """The design with another method."""
        return replace(self, method=method)

    def at_seed(self, seed: int) -> MethodDesign:
        """The design at another seed, which may have to look at the model anew; itself if its method does not draw.

        Raises:
            ValueError: If the method draws and has no field ``seed``, or was made ready at a seed of its own.
        """
        method = self.method
        if not method.about.random:
            return self
        if not is_dataclass(method) or "seed" not in {item.name for item in fields(method)}:
            raise ValueError(
                f"`{method!r}`: its `about` says that it draws, but it is no dataclass with a field `seed`, so that it "
                "cannot be drawn again at another one. Give it one."
            )
        if method.ready and method.about.scope == "model" and not method.needs_loaders:
            raise ValueError(
                f"`{method!r}`: it has seen the model at the seed {method.seed}, and at another one it would see "
                "something else. Give it as it was before `.prepare(...)`; each seed's is done on the way."
            )
        return replace(self, method=replace(method, seed=seed))


AnyDesign = Design | MethodDesign
AnyDesignT = TypeVar("AnyDesignT", bound=AnyDesign)
AnyDesigns = Designs | MergingMethod | MethodDesign | Callable[[str], AnyDesign]
"""One product, method or design for all tensors, or a function from the name of a merged tensor."""


def as_any_function(designs: AnyDesigns) -> Callable[[str], AnyDesign]:
    """Designs as a function from the tensor's name, the same object for every tensor if there is one design.

    Raises:
        TypeError: If it is no design.
    """
    design = MethodDesign(designs) if isinstance(designs, MergingMethod) else designs
    if isinstance(design, MethodDesign):
        return lambda tensor: design
    return as_function(design)  # type: ignore[arg-type]
