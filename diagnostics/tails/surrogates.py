"""Gaussian surrogates of real updates, merged and measured in the same way.

Whether residuals of a merge are heavy-tailed cannot be read off them: rows differ in size, and every residual shares
the merged update. ``surrogate_residuals`` makes Gaussian updates of the same sizes and correlation
(``diagnostics.tails.sizes``), merges them by the same design, method or function, and measures the residuals by the
same map; ``diagnostics.tails.null_control`` then compares the real residuals with these.

Base and experts are read once, one module at a time; a method that has to see the whole model first sees every
surrogate model in passes of its own. Surrogates are full-rank matrices of independent entries: besides tails they lack
a low rank or a few strong directions that real updates may have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diagnostics.residuals import ExpertResiduals, Experts, Residuals, module_residuals
from diagnostics.tails.sizes import Sizes, fit_sizes
from inference.models.design import Design
from inference.models.digest import Progress, Silent
from inference.models.method_design import AnyDesign, MethodDesign
from poe_models.experts import ProductOfExperts
from poe_models.methods import MergingMethod, ModuleBatch
from poe_models.printing import Brief
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors, block_names

MergeModule = Callable[[ModuleUpdates], Tensor]
"""From one module's updates to its merged update ``Z``, ``(d_out, d_in)``."""
Merge = ProductOfExperts | AnyDesign | MergingMethod | Mapping[str, AnyDesign] | MergeModule
"""A merge: one product, design or method for all tensors, a design for each by the tensor's name, or a
function of one module."""


@dataclass(frozen=True, eq=False, repr=False)
class Surrogates(Brief):
    """Residuals of the same merge of Gaussian updates.

    Attributes:
        residuals: Residuals of each surrogate model, entries in the order of the real ones; about 24 bytes for each row
            or column of each expert and surrogate.
        sizes: Row and column sizes: each expert's own, or shared.
        row_spread: Median over modules (and experts) of the standard deviation of their log row sizes.
        notes: Other known differences between surrogates and real updates.
    """

    residuals: tuple[Residuals, ...]
    sizes: Sizes
    row_spread: float
    notes: tuple[str, ...] = ()

    def of(self, part: Residuals) -> Surrogates:
        """The surrogates of some of the real residuals, as ``Residuals.split`` and ``Residuals.where`` give them.

        Raises:
            ValueError: If a surrogate lacks one of them.
        """
        wanted = [(entry.module, entry.expert) for entry in part.entries]
        return replace(self, residuals=tuple(_selected(each, wanted) for each in self.residuals))


def surrogate_residuals(
    task_vectors: TaskVectors,
    merge: Merge,
    experts: Experts | Callable[[str], Experts] | None = None,
    *,
    num_surrogates: int = 19,
    sizes: Sizes = "own",
    seed: int = 0,
    progress: Progress | None = None,
) -> Surrogates:
    """Merge Gaussian surrogates of the updates, and measure their residuals.

    Args:
        task_vectors: Base and experts.
        merge: The merge.
        experts: Residual map or product that measures, or a function from the tensor's name, as for ``residuals``; by
            default the experts of the product that merges.
        num_surrogates: Number K of surrogates; p-values are ``1 / (K + 1)`` or above.
        sizes: ``"own"``: every expert has row and column sizes of its own. ``"shared"``: all have the same up to a
            factor, so that a row that sticks out in one expert is no longer null.
        seed: Seed of the surrogates.
        progress: Callback for progress bars.

    Returns:
        The residuals of each surrogate.

    Raises:
        ValueError: If there are none to make, nothing is merged, the merge needs data, or nobody measures.
    """
    if num_surrogates < 1:
        raise ValueError(f"`surrogate_residuals(num_surrogates={num_surrogates})`: at least one is needed; 19 are few.")
    measured_by = _measured_by(merge, experts)
    progress = progress or Silent()
    models = [_Model(task_vectors, sizes, seed, index) for index in range(num_surrogates)]
    merges = [_merge_module(task_vectors, merge, model, progress) for model in models]
    entries: list[list[ExpertResiduals]] = [[] for _ in models]
    spreads, adapters = [], False
    for module in _watched(task_vectors, progress, f"{num_surrogates} Gaussian surrogates"):
        fitted = fit_sizes(module.updates, sizes)
        spreads += [spread for spread in fitted.row_spread.tolist() if np.isfinite(spread)]
        adapters |= module.low_rank is not None
        for model, merged, found in zip(models, merges, entries, strict=True):
            made = replace(module, updates=fitted.surrogate(model.generator(module)), low_rank=None)
            found += module_residuals(merged(made), made, measured_by(module.tensor))
    if not entries[0]:
        raise ValueError("`surrogate_residuals(...)`: the rules merge no tensor. Look at `task_vectors.treatments`.")
    spread = float(np.median(spreads)) if spreads else 0.0
    notes = ("the updates are adapters' and of low rank, their surrogates are not",) if adapters else ()
    return Surrogates(tuple(Residuals(tuple(found)) for found in entries), sizes, spread, notes)


@dataclass(frozen=True, eq=False)
class _Model:
    """One surrogate model; iterating makes the same modules again in every pass."""

    task_vectors: TaskVectors
    sizes: Sizes
    seed: int
    index: int

    def generator(self, module: ModuleUpdates) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.index}/{module.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # seeds of torch have 63 bits

    def __iter__(self) -> Iterator[ModuleUpdates]:
        for module in self.task_vectors:
            made = fit_sizes(module.updates, self.sizes).surrogate(self.generator(module))
            yield replace(module, updates=made, low_rank=None)


@dataclass(frozen=True, eq=False)
class _Part:
    """The modules of some tensors, of the experts that a design is about."""

    model: _Model
    tensors: frozenset[str]
    order: list[int]

    def __iter__(self) -> Iterator[ModuleUpdates]:
        for module in self.model:
            if module.tensor in self.tensors:
                names = tuple(module.names[index] for index in self.order)
                yield replace(module, names=names, updates=module.updates[self.order])


def _measured_by(merge: Merge, experts: Experts | Callable[[str], Experts] | None) -> Callable[[str], Experts]:
    found = experts
    if found is None:
        found = merge.poe if isinstance(merge, Design) else merge if isinstance(merge, ProductOfExperts) else None
    if found is None:
        raise ValueError(
            f"`surrogate_residuals(merge={type(merge).__name__})`: it has no experts to measure residuals. Give "
            "`experts=InputGram()`, or what the real residuals were measured by."
        )
    if isinstance(found, ProductOfExperts) or not callable(found):
        given = found
        return lambda tensor: given
    return found


def _merge_module(task_vectors: TaskVectors, merge: Merge, model: _Model, progress: Progress) -> MergeModule:
    """The merge as a function of one module, once its methods have seen the model that they are to merge."""
    designs = _designs(task_vectors, merge)
    if designs is None:
        assert callable(merge)
        return merge  # type: ignore[return-value]
    ready = _ready(designs, model, progress)
    return lambda module: _solve(task_vectors, ready[module.tensor], module)


def _designs(task_vectors: TaskVectors, merge: Merge) -> Mapping[str, AnyDesign] | None:
    """The design of every merged tensor; None for a function."""
    if isinstance(merge, Mapping):
        return merge
    design: AnyDesign
    if isinstance(merge, ProductOfExperts):
        design = Design(merge)
    elif isinstance(merge, MergingMethod):
        design = MethodDesign(merge)
    elif isinstance(merge, Design | MethodDesign):
        design = merge
    else:
        return None
    return {name: design for name, each in task_vectors.treatments.items() if each.action == "merge"}


def _ready(designs: Mapping[str, AnyDesign], model: _Model, progress: Progress) -> Mapping[str, AnyDesign]:
    """Designs whose methods have seen the model."""
    ready: dict[int, AnyDesign] = {}
    for design in {id(each): each for each in designs.values()}.values():
        method = design.method
        ready[id(design)] = design
        _require_unseen(method)
        if method is not None and not method.ready:
            tensors = frozenset(name for name, each in designs.items() if each is design)
            progress.begin(f"surrogate {model.index + 1} as a whole", len(tensors), 0)
            part = _Part(model, tensors, design.order(model.task_vectors.names))
            ready[id(design)] = design.with_method(method.prepare(part))
    return {name: ready[id(design)] for name, design in designs.items()}


def _require_unseen(method: MergingMethod | None) -> None:
    """Refuse a method that holds quantities of the real model, or would need data of surrogates."""
    if method is None:
        return
    given: list[str] = [item.name for item in fields(method) if item.default is None] if is_dataclass(method) else []
    seen = method.about.scope == "model" and any(getattr(method, name) is not None for name in given)
    if method.needs_loaders or seen:
        why = "it learns from data" if method.needs_loaders else "it has seen it"
        raise ValueError(
            f"`surrogate_residuals(merge={method!r})`: what it knows of the real model would go into the merges of "
            f"surrogates ({why}). Give the method as it was before `.prepare(...)`, or a merge of another kind."
        )


def _solve(task_vectors: TaskVectors, design: AnyDesign, module: ModuleUpdates) -> Tensor:
    order = design.order(module.names)
    updates = module.updates[order].unsqueeze(0)
    if isinstance(design, MethodDesign):
        return design.solve(ModuleBatch.of(updates, [module.name], module.names)).value.squeeze(0)
    center = _center(task_vectors, design, module)
    return design.for_modules([module.name]).solve(updates, None, center).value.squeeze(0)


def _center(task_vectors: TaskVectors, design: Design, module: ModuleUpdates) -> Tensor | None:
    """Update of the anchor's checkpoint, which surrogates keep; None without one."""
    view = task_vectors.treatments[module.tensor].view
    if design.center is None or view is None:
        return None
    blocks = view.split(design.center.read(module.tensor).to(task_vectors.dtype))
    index = block_names(module.tensor, len(blocks)).index(module.name)
    return (blocks[index].to(module.base.device) - module.base).unsqueeze(0)


def _watched(task_vectors: TaskVectors, progress: Progress, stage: str) -> Iterator[ModuleUpdates]:
    sizes = {n: task_vectors.base.tensors[n].nbytes for n, t in task_vectors.treatments.items() if t.action == "merge"}
    progress.begin(stage, len(sizes), sum(sizes.values()))
    for tensor, size in sizes.items():
        yield from task_vectors.modules(tensor)
        progress.advance(1, size)


def _selected(residuals: Residuals, wanted: Iterable[tuple[str, str]]) -> Residuals:
    by_name = {(entry.module, entry.expert): entry for entry in residuals.entries}
    try:
        return Residuals(tuple(by_name[name] for name in wanted))
    except KeyError as error:
        raise ValueError(
            f"`Surrogates.of(...)`: the surrogates have no residuals of {error.args[0]}. Give a part of the residuals "
            "of the same merge."
        ) from None
