"""The merges that the demo compares, each as one function of the updates, on one table of tensor treatments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness.parallel import run_all
from inference.map import fixed_point
from inference.solution import FixedPointInfo, Solution
from poe_models import (
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    InputGram,
    ModuleUpdates,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
    StudentT,
    TaskArithmetic,
    TaskVectors,
    average,
)
from poe_models.methods import TSVM, DareTies, IsoC, MergingMethod, ModuleBatch, Ties, WudiAdam


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Args:
        name: Row of the table.
        family: Methods that differ in the energy alone share it.
        rule: A merging method; or
        residual_map: the experts' map, or several for several sides, with
        energy: their energy.
        tuned: Which settings the search chooses.
    """

    name: str
    family: str
    rule: MergingMethod | None = None
    residual_map: ResidualMap | tuple[ResidualMap, ...] | None = None
    energy: Energy | None = None
    tuned: tuple[str, ...] = ("scaling", "eta")

    def design(self, names: Sequence[str], eta: float, center: Tensor | None = None) -> ProductOfExperts:
        """The product of experts with a relative anchor precision `eta`.

        Args:
            names: Names of the task vectors.
            eta: The precision.
            center: Of the anchor, (M, d_out, d_in); None for the base.

        Returns:
            The product.

        Raises:
            ValueError: If the method is no product of experts.
        """
        if self.residual_map is None or self.energy is None:
            raise ValueError(f"`Method.design`: {self.name} has no experts. Call its `rule` on the updates.")
        anchor = Anchor(center, RelativePrecision(eta))
        return ProductOfExperts.of(names, self.residual_map, self.energy, anchor=anchor)

    @property
    def energy_name(self) -> str:
        """The part of the name that says the energy; empty without one."""
        return self.name.removeprefix(f"{self.family}, ") if self.energy is not None else ""

    @property
    def heavy_tailed(self) -> bool:
        """Whether the energy is another than a Gaussian."""
        return self.energy is not None and not isinstance(self.energy, Gaussian)

    def twin(self) -> Method:
        """The same method with the Gaussian of equal weight at a zero residual.

        Raises:
            ValueError: If the method has no energy.
        """
        if self.energy is None:
            raise ValueError(f"`Method.twin`: {self.name} has no energy, so it has no Gaussian twin.")
        return Method(
            f"{self.family}, twin of {self.energy_name}", self.family, None, self.residual_map, self.energy.twin()
        )


_MAPS: dict[str, ResidualMap | tuple[ResidualMap, ...]] = {
    "Directional": Directional(),
    "OutputGram": OutputGram(),
    "InputGram": InputGram(),
    "both sides": (InputGram(), OutputGram()),
}
# The Gaussian is Cauchy's twin. Student-t's differs from it by a factor that the tuned eta absorbs.
ENERGIES: dict[str, Energy] = {"Gaussian": Cauchy().twin(), "Cauchy": Cauchy(), "Student-t(4)": StudentT(4.0)}

BASELINES = (
    Method("average", "average", average, tuned=()),
    Method("task arithmetic", "task arithmetic", TaskArithmetic(1.0), tuned=("scaling",)),
)
RULES = tuple(
    Method(name, name, rule, tuned=("scaling",))
    for name, rule in {
        "TIES": Ties(),
        "DARE-TIES": DareTies(),
        "TSV-M": TSVM(),
        "ISO-C": IsoC(),
        "WUDI": WudiAdam(),
    }.items()
)
"""The best-known rules that need no data, with the settings of their papers; λ is their coefficient.

WUDI's iteration is taken as published: the minimiser that it stops short of follows the smallest singular values.
"""
MAPS = tuple(
    Method(f"{map_name}, {energy_name}", map_name, None, residual_map, energy)
    for map_name, residual_map in _MAPS.items()
    for energy_name, energy in ENERGIES.items()
)
METHODS = (*BASELINES, *RULES, *MAPS)


@dataclass(frozen=True)
class Merge:
    """A solved merge, before its scaling is chosen.

    Args:
        base: Base tensors of the updates, by name.
        updates: Merged updates in the tensors' own shapes, and the mean updates of tensors that are averaged.
        matrices: The merged ones by module, (d_out, d_in).
        others: Tensors that stay the base's.
        weight_spread: Largest over smallest effective expert weight, one entry a module; empty without experts.
        unconverged: Modules whose solve did not converge.
        other_starts: Modules in which another start than the twin found a lower energy.
    """

    base: dict[str, Tensor]
    updates: dict[str, Tensor]
    matrices: dict[str, Tensor]
    others: dict[str, Tensor]
    weight_spread: tuple[float, ...] = ()
    unconverged: tuple[str, ...] = ()
    other_starts: tuple[str, ...] = ()

    def state(self, scaling: float) -> dict[str, Tensor]:
        """State dict with `W_0 + λ Z`, as `merge_checkpoint` has it; Z of averaged tensors is the mean update."""
        merged = {name: self.base[name] + scaling * update for name, update in self.updates.items()}
        return {name: value.cpu() for name, value in (merged | self.others).items()}


@dataclass(frozen=True, eq=False)
class Loaded:
    """Task vectors that are read once and held, for many merges.

    Args:
        vectors: The task vectors.
    """

    vectors: TaskVectors

    @cached_property
    def modules(self) -> list[ModuleUpdates]:
        """Updates of every module."""
        return list(self.vectors)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Base tensors that are merged or averaged, on the updates' device and in their dtype."""
        treatments = self.vectors.treatments.items()
        device, dtype = self.vectors.device, self.vectors.dtype
        return {n: self.vectors.base.read(n).to(device, dtype) for n, each in treatments if each.action != "base"}

    @cached_property
    def averages(self) -> dict[str, Tensor]:
        """Mean updates of the tensors that are averaged."""
        names = [name for name, each in self.vectors.treatments.items() if each.action == "average"]
        return {name: self.vectors.average(name) - self.base[name] for name in names}

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """Tensors that stay the base's."""
        treatments = self.vectors.treatments.items()
        return {name: self.vectors.base.read(name) for name, each in treatments if each.action == "base"}


def solve(
    method: Method,
    vectors: TaskVectors | Loaded,
    eta: float,
    centers: Mapping[str, Tensor] | None = None,
) -> Merge:
    """Merge every tensor; matrices of one shape are solved as one batch.

    Args:
        method: What to do.
        vectors: The task vectors; `Loaded` ones are not read again.
        eta: Relative precision of the anchor; methods without experts have none and must be given 0.
        centers: Of the anchor by module, (d_out, d_in); None for the base.

    Returns:
        The merge.

    Raises:
        ValueError: If `eta` or `centers` are given to a method that has no anchor.
    """
    if method.rule is not None and (eta != 0 or centers is not None):
        raise ValueError(f"`solve({method.name!r}, eta={eta})`: it has no anchor. Give eta=0 and no centers.")
    loaded = vectors if isinstance(vectors, Loaded) else Loaded(vectors)
    names = loaded.vectors.names
    rule = method.rule if method.rule is None or method.rule.ready else method.rule.prepare(loaded.vectors)
    batches: dict[torch.Size, list[ModuleUpdates]] = defaultdict(list)
    for module in loaded.modules:
        batches[module.updates.shape].append(module)
    largest_first = sorted(batches.values(), key=lambda batch: -len(batch) * batch[0].updates.numel())

    def solved(batch: list[ModuleUpdates]) -> Solved:
        updates, labels = torch.stack([module.updates for module in batch]), [module.name for module in batch]
        if rule is not None:
            return batch, rule.merge(ModuleBatch.of(updates, labels, names)), None
        center = None if centers is None else torch.stack([centers[label] for label in labels])
        solution = fixed_point(method.design(names, eta, center).for_modules(labels).bind(updates))
        return batch, solution.value, solution

    return _assemble(loaded, run_all(solved, largest_first))


Solved = tuple[list[ModuleUpdates], Tensor, Solution[FixedPointInfo] | None]
"""Modules of one shape, their merged updates (M, d_out, d_in), and the solution these are from."""


def _assemble(loaded: Loaded, solved: list[Solved]) -> Merge:
    values = {m.name: value for batch, merged, _ in solved for m, value in zip(batch, merged, strict=True)}
    updates = dict(loaded.averages)
    for tensor, treatment in loaded.vectors.treatments.items():
        if treatment.view is not None:
            parts = [values[module.name] for module in loaded.modules if module.tensor == tensor]
            updates[tensor] = treatment.view.join(parts, loaded.base[tensor].shape)
    spread: dict[str, float] = {}
    unconverged, moved = [], []
    for batch, _, solution in solved:
        if solution is not None:
            spread |= dict(zip((m.name for m in batch), solution.info.weight_spread.tolist(), strict=True))
            unconverged += [m.name for m, status in zip(batch, solution.status, strict=True) if not status.converged]
            moved += [m.name for m, start in zip(batch, solution.info.start, strict=True) if start != "twin"]
    in_order = tuple(spread[module.name] for module in loaded.modules if module.name in spread)
    return Merge(loaded.base, updates, values, loaded.others, in_order, tuple(unconverged), tuple(moved))
