"""Passes over the whole model for merging methods that need them before they merge its first tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from inference.models.averages import with_averages
from inference.models.digest import Progress
from inference.models.method_design import AnyDesignT
from inference.models.modules import selected
from poe_models.methods import MergingMethod
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors
from poe_models.weights.together import modules_of


class Modules:
    """The matrices that one design merges, read again in every pass.

    Args:
        task_vectors: Base and experts.
        tensors: Names of the tensors.
        order: Positions of the experts that the design is about.
        progress: Told about every pass.
    """

    def __init__(
        self, task_vectors: TaskVectors, tensors: Sequence[str], order: Sequence[int], progress: Progress
    ) -> None:
        self._task_vectors = task_vectors
        self._tensors = tensors
        self._order = list(order)
        self._progress = progress
        self._passes = 0

    def __iter__(self) -> Iterator[ModuleUpdates]:
        self._passes += 1
        sizes = {name: self._task_vectors.base.tensors[name].nbytes for name in self._tensors}
        self._progress.begin(f"preparing, pass {self._passes}", len(self._tensors), sum(sizes.values()))
        for size, modules in zip(sizes.values(), modules_of(self._task_vectors, self._tensors), strict=True):
            while modules:  # each is let go of when it is done
                yield selected(modules.pop(0), self._order)
            self._progress.advance(1, size)


Prepared = tuple[MergingMethod, list[int], list[str], MergingMethod]
"""A method, the positions of the experts and the tensors that it merges, and the method once it has seen these."""


def prepare_designs(
    task_vectors: TaskVectors,
    designs: Callable[[str], AnyDesignT],
    progress: Progress,
    known: list[Prepared] | None = None,
) -> Callable[[str], AnyDesignT]:
    """Prepare every method that looks at the whole model, by a pass or a few over the tensors that it merges.

    Designs that differ in something else than the method, such as λ, are one model to it. The result gives the ready
    design of each merged tensor by its name, the same object where it was the same; averages are as they were.

    Args:
        task_vectors: Base and experts.
        designs: The design of each merged tensor.
        progress: Told about every pass.
        known: Methods that have seen this model before, which those that see it now are added to.
    """
    merged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
    given = {name: designs(name) for name in merged}
    ready: dict[int, AnyDesignT] = {id(design): design for design in given.values()}
    known = [] if known is None else known
    for design in list(ready.values()):
        method, order = design.method, design.order(task_vectors.names)
        if method is None or method.ready:
            continue
        same = [n for n in merged if (given[n].method, given[n].order(task_vectors.names)) == (method, order)]
        seen = (method, order, same)
        found = next((after for *before, after in known if tuple(before) == seen), None)
        if found is None:
            found = method.prepare(Modules(task_vectors, same, order, progress))
            known.append((*seen, found))
        ready[id(design)] = cast(AnyDesignT, design.with_method(found))
    return with_averages(lambda tensor: ready[id(given[tensor])], designs)
