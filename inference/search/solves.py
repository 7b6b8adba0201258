"""Merges of a model under many designs, which share spectra and solved updates.

A trial of a search then costs what changed: nothing for another λ, a product or two for another anchor precision of
Gaussian experts, a solve for anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from inference.models.averages import Average, KnowsAverages, ModelDesigns
from inference.models.design import Design
from inference.models.digest import Silent
from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.modules import read_modules, selected
from inference.models.preparing import Prepared, prepare_designs
from inference.search.ridge import Ridge
from poe_models.experts import ProductOfExperts
from poe_models.methods import MergingMethod, ModuleBatch
from poe_models.scales import AnchorPrecision, RelativePrecision
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors

KEPT = 8
"""Merged updates and spectra of a module that are kept, the latest of each."""


@dataclass(eq=False)
class _Known:
    """Results for one module: spectra by product, merged updates by design."""

    spectra: list[tuple[ProductOfExperts, Ridge | None]] = field(default_factory=list)
    solved: list[tuple[AnyDesign, Tensor]] = field(default_factory=list)


class ModelMerges:
    """Merged state dicts of a model under any designs. Holds the base and all updates in memory.

    Args:
        task_vectors: Base and experts.

    >>> import torch
    >>> from poe_models import Gaussian, InputGram
    >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.eye(2)}
    >>> merges = ModelMerges(TaskVectors(base, {"tuned": tuned}))
    >>> design = Design(ProductOfExperts.of(["tuned"], InputGram(), Gaussian()))
    >>> merges.state(lambda tensor: design)["fc.weight"].diagonal()
    tensor([0.8333, 0.8333])
    """

    def __init__(self, task_vectors: TaskVectors) -> None:
        self.task_vectors = task_vectors
        self.modules: dict[str, list[ModuleUpdates]] = {n: task_vectors.modules(n) for n in task_vectors.views}
        self._known: dict[str, _Known] = {}
        self._averages: dict[tuple[str, Average], Tensor] = {}
        self._prepared: list[Prepared] = []
        treatments = task_vectors.treatments.items()
        self._kept = {name: task_vectors.base.read(name) for name, each in treatments if each.action == "base"}

    def state(self, designs: Callable[[str], AnyDesign]) -> dict[str, Tensor]:
        """Merged model as a state dict on the CPU, as ``merge_checkpoint`` writes it before rounding.

        Args:
            designs: The design of each merged tensor, by its name; :meth:`complete` says what becomes of averaged ones.

        Raises:
            ValueError: If a design cannot be solved.
        """
        found = dict(self._kept)
        ready = prepare_designs(self.task_vectors, designs, Silent(), self._prepared)
        chosen = {tensor: ready(tensor) for tensor in self.modules}
        for tensor, design in chosen.items():
            view, shape = self.task_vectors.treatments[tensor].view, self.task_vectors.base.tensors[tensor].shape
            assert view is not None
            blocks = [m.base + design.scaling * self._merged(m, i, design) for i, m in enumerate(self.modules[tensor])]
            found[tensor] = view.join(blocks, shape).cpu()
        average = self.complete(designs).average
        for name, treatment in self.task_vectors.treatments.items():
            if treatment.action == "average":
                found[name] = self._averaged(name, average(name))
        return found

    def complete(self, designs: Callable[[str], AnyDesign]) -> ModelDesigns[AnyDesign]:
        """Designs with the averages that follow them: by the importances and λ that the tensor would be merged with."""
        if isinstance(designs, KnowsAverages):
            return ModelDesigns(designs, designs.average)
        return ModelDesigns(designs, lambda tensor: Average.of(designs(tensor), self.task_vectors.names))

    def _averaged(self, name: str, average: Average) -> Tensor:
        key = (name, replace(average, scaling=1.0))
        if key not in self._averages:
            self._averages[key] = self.task_vectors.average(name, average.importance)
        base = self.task_vectors.base.read(name).to(self._averages[key])
        return (base + average.scaling * (self._averages[key] - base)).cpu()

    def _merged(self, module: ModuleUpdates, block: int, design: AnyDesign) -> Tensor:
        """Merged update ``(d_out, d_in)`` of a module, from what is known of it."""
        known = self._known.setdefault(module.name, _Known())
        for other, value in known.solved:
            if _alike(other, design):
                return value
        value = self._solved(module, block, design, known)
        known.solved = [(design, value), *known.solved][:KEPT]
        return value

    def _solved(self, module: ModuleUpdates, block: int, design: AnyDesign, known: _Known) -> Tensor:
        if isinstance(design, MethodDesign):
            factors = None if module.low_rank is None else tuple(part.unsqueeze(0) for part in module.low_rank)
            batch = ModuleBatch.of(module.updates.unsqueeze(0), [module.name], module.names, factors)  # type: ignore[arg-type]
            return design.method.merge(batch)[0]
        if design.center is not None:
            met = read_modules(self.task_vectors, module.tensor, design)[block]
            return replace(design, poe=met.poe, center=None).solve(met.updates.unsqueeze(0)).value[0]
        ours = selected(module, design.order(self.task_vectors.names))
        spectrum = self._spectrum(ours, design, known)
        if spectrum is not None:
            return spectrum.at(design.poe.anchor.precision.value(spectrum.curvature))[0]
        return design.for_modules([module.name]).solve(ours.updates.unsqueeze(0)).value[0]

    def _spectrum(self, module: ModuleUpdates, design: Design, known: _Known) -> Ridge | None:
        """The spectrum of a module's Gaussian experts; None if they have none, or the design solves in the span."""
        if design.coordinates != "full":
            return None
        poe = _with_precision(design.poe, RelativePrecision(1.0))
        for other, spectrum in known.spectra:
            if _same(other, poe):
                return spectrum
        spectrum = Ridge.of(poe.for_modules([module.name]), module.updates.unsqueeze(0))
        known.spectra = [(poe, spectrum), *known.spectra][:KEPT]
        return spectrum


def _with_precision(poe: ProductOfExperts, precision: AnchorPrecision) -> ProductOfExperts:
    return replace(poe, anchor=replace(poe.anchor, precision=precision))


def _alike(one: AnyDesign, other: AnyDesign) -> bool:
    """Whether two designs have the same merged updates before λ."""
    if isinstance(one, MethodDesign) or isinstance(other, MethodDesign):
        return isinstance(one, MethodDesign) and isinstance(other, MethodDesign) and _same(one.method, other.method)
    same = (one.coordinates, one.options, one.center) == (other.coordinates, other.options, other.center)
    return same and _same(one.poe, other.poe)


def _same(one: object, other: object) -> bool:
    """Whether two products or methods are equal; of those that hold arrays or were trained, whether they are one."""
    if isinstance(one, MergingMethod) and one.needs_loaders:
        return one is other
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # tensors and arrays have no truth value
        return one is other
