"""The design of a merge: which product of experts is solved for a tensor, how, and by how much its MAP is added."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from inference.gradient_check import judged
from inference.map import fixed_point
from inference.reweighting import SolverOptions
from inference.solution import FixedPointInfo, Solution
from inference.units import COMFORTABLE, in_given_units, powers_of_two
from poe_models.experts import ProductOfExperts
from poe_models.methods import MergingMethod
from poe_models.span_labels import stored_center
from poe_models.sums import largest_entry
from poe_models.updates import over_units
from poe_models.weights.loading import Checkpoint, CheckpointError
from poe_models.weights.renamed import other_names

_LARGEST_SPREAD = 1e60


@dataclass(frozen=True, eq=False, repr=False)
class Design:
    """Settings of a merge by a product of experts; tensors that share one ``Design`` object are solved as a batch.

    Args:
        poe: The product of experts; ``update_names`` are names of task vectors.
        scaling: Factor λ in ``W = W_0 + λ Z``.
        coordinates: Solve for the merged update (``"full"``) or its coefficients on the experts' (``"span"``).
        options: Settings of the solver.
        center: A checkpoint as the anchor's centre, ``Z_0 = W_center - W_0``; None leaves the centre to ``poe.anchor``.
    """

    poe: ProductOfExperts
    scaling: float = 1.0
    coordinates: Literal["full", "span"] = "full"
    options: SolverOptions = field(default_factory=SolverOptions)
    center: Checkpoint | None = None

    @override
    def __repr__(self) -> str:
        told = self.describe()
        experts = [f"  {e['name']}: {e['residual_map']}, {e['energy']}, {e['scale']}" for e in told["experts"]]
        anchor = f"anchor {told['anchor']['precision']} around {told['anchor']['center'] or 'the base'}"
        return "\n".join([f"Design(λ = {self.scaling:g}, {self.coordinates} coordinates, {anchor}", *experts]) + ")"

    @property
    def span_product(self) -> ProductOfExperts:
        """The product for ``bind`` and whatever else runs from statistics alone.

        There a checkpoint as the centre is what the statistics carry.
        """
        if self.center is None:
            return self.poe
        return replace(self.poe, anchor=replace(self.poe.anchor, center=stored_center))

    def solve(
        self, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None, center: Tensor | None = None
    ) -> Solution[FixedPointInfo]:
        """Solve a batch of modules.

        Args:
            updates: ``(M, N, d_out, d_in)`` in the order of ``poe.update_names``.
            low_rank: Factors ``(M, N, d_out, r)`` and ``(M, N, r, d_in)``, if they are adapters.
            center: ``Z_0``, ``(M, d_out, d_in)``, where the centre is a checkpoint.

        Returns:
            The MAP, ``value`` of shape ``(M, d_out, d_in)`` in the dtype of the updates. Updates of extreme size are
            solved for in units of their own, and in float64 where experts differ by orders of magnitude.
        """
        sizes = largest_entry(updates)  # largest entries, (M, N)
        spread = _spread(sizes)
        if updates.dtype == torch.float32 and bool((spread > COMFORTABLE).any()):
            wide = None if low_rank is None else (low_rank[0].double(), low_rank[1].double())
            found = self.solve(updates.double(), wide, None if center is None else center.double())
            return replace(found, value=found.value.to(updates.dtype))
        units = self._units(sizes.amax(-1))
        if units is not None:
            return self._solve_in_units(units, updates, low_rank, center)
        return self._solve(updates, low_rank, center)

    def _solve(
        self, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None, center: Tensor | None
    ) -> Solution[FixedPointInfo]:
        poe = self.poe if center is None else replace(self.poe, anchor=replace(self.poe.anchor, center=center))
        posterior = poe.bind(updates, self.coordinates, low_rank=low_rank if self.coordinates == "full" else None)
        solution = judged(posterior, fixed_point(posterior, **vars(self.options)))
        return replace(solution, value=posterior.update(solution.value).to(updates.dtype))

    def _units(self, sizes: Tensor) -> Tensor | None:
        """Powers of two that bring the updates of each module to a size of about one, ``(M,)``; None if all are near.

        Fourth powers of updates leave the range of float32 below 1e-9 and above 1e9, where the merge itself does not.
        """
        odd = (sizes > 0) & ((sizes < 1 / COMFORTABLE) | (sizes > COMFORTABLE))
        given = any(isinstance(start, Tensor) for start in self.options.starts)
        measured = any(each.residual_map.stand_in() is not each.residual_map for each in self.poe.experts)
        if not bool(odd.any()) or given or measured:
            return None
        return powers_of_two(sizes, odd)

    def _solve_in_units(
        self, units: Tensor, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None, center: Tensor | None
    ) -> Solution[FixedPointInfo]:
        """Solve for ``U / c`` and multiply the merge by ``c``, if the design does not mind (is equivariant)."""
        degrees = self._degrees(center is not None)
        if degrees is None:
            return self._solve(updates, low_rank, center)

        factors = None if low_rank is None else (over_units(low_rank[0], units), low_rank[1])
        found = self._solve(over_units(updates, units), factors, None if center is None else over_units(center, units))
        column = units.unsqueeze(-1)
        weights = column.to(found.info.weights).pow(degrees[:-1].to(found.info.weights))
        precision = units.to(found.info.anchor_precision).pow(float(degrees[-1]))
        value = (found.value.double() * units.reshape(-1, 1, 1)).to(updates.dtype)
        return in_given_units(replace(found, value=value), units, weights, precision)

    def _degrees(self, centered: bool) -> Tensor | None:
        """Degree in the updates of each expert's weight and of the anchor's precision, ``(E + 1,)``.

        None unless twice the updates give twice the merge, as relative scales and precisions do and absolute ones
        do not: found out by solving a small problem at two sizes.
        """
        try:
            one, eight = (self._probe(size, centered) for size in (1.0, 8.0))
        except ValueError:  # bound to modules of other shapes
            return None
        if not torch.allclose(eight.value, 8 * one.value, rtol=1e-9, atol=0.0):
            return None
        numbers = [torch.cat([each.info.weights[0], each.info.anchor_precision]) for each in (one, eight)]
        return torch.nan_to_num((numbers[1] / numbers[0]).log2() / 3, posinf=0.0, neginf=0.0).round()

    def _probe(self, size: float, centered: bool) -> Solution[FixedPointInfo]:
        """One step on a small problem of updates and centre of some size, float64."""
        generator = torch.Generator().manual_seed(0)
        count = len(self.poe.update_names)
        probe = size * torch.randn(1, count + 1, 3, 3, generator=generator, dtype=torch.float64)
        given = isinstance(self.poe.anchor.center, Tensor) or centered or self.method is not None
        experts = tuple(replace(each, residual_map=each.residual_map.stand_in()) for each in self.poe.experts)
        once = replace(
            self, poe=replace(self.poe, experts=experts), options=replace(self.options, max_steps=1), center=None
        )
        with torch.random.fork_rng(devices=[]):  # a centre may draw
            return once._solve(probe[:, :count], None, probe[:, count] if given else None)

    def order(self, names: Sequence[str]) -> list[int]:
        """Positions of the task vectors that the product is about, in the order of its updates."""
        return [names.index(name) for name in self.poe.update_names]

    def importance(self, names: Sequence[str]) -> tuple[float, ...]:
        """Importance of each task vector, by which tensors without a product of their own are averaged.

        It is 0 for one that the product is not about, and the mean of its experts' where several share an update.
        """
        own = [[each.importance for each in self.poe.experts if each.update_name == name] for name in names]
        return tuple(sum(values) / len(values) if values else 0.0 for values in own)

    @property
    def method(self) -> MergingMethod | None:
        """The merging method that is the anchor's centre, if it is one."""
        center = self.poe.anchor.center
        return center if isinstance(center, MergingMethod) else None

    def with_method(self, method: MergingMethod) -> Design:
        """The design with another method as the anchor's centre."""
        return replace(self, poe=replace(self.poe, anchor=replace(self.poe.anchor, center=method)))

    def for_modules(self, modules: Sequence[str]) -> Design:
        """The design bound to the named modules of a batch, for maps on given statistics and centres that draw."""
        return replace(self, poe=self.poe.for_modules(modules))

    def describe(self) -> dict[str, Any]:
        """The design as plain data, for the record of a merge."""
        anchor = self.poe.anchor
        center = shown(anchor.center) if self.center is None else self.center.source
        experts = [
            {item.name: shown(getattr(expert, item.name)) for item in fields(expert)} for expert in self.poe.experts
        ]
        return {
            "experts": experts,
            "anchor": {"center": center, "precision": shown(anchor.precision)},
            "temperature": self.poe.temperature,
            "scaling": self.scaling,
            "coordinates": self.coordinates,
            "solver": {item.name: shown(getattr(self.options, item.name)) for item in fields(self.options)},
        }

    def check(self, names: Sequence[str]) -> None:
        """Refuse a design that cannot be solved, before anything is read.

        Raises:
            ValueError: If it is about other task vectors, or cannot be solved in these coordinates.
        """
        missing = [name for name in self.poe.update_names if name not in names]
        if missing:
            raise ValueError(
                f"`Design(...)`: the product is about {missing[0]!r}, but the task vectors are {', '.join(names)}. "
                "Give the experts these names, or set `update=`."
            )
        if self.poe.factors:
            raise ValueError(
                f"`Design(...)`: {self.poe.factors[0].name!r} is a FactorExpert, which whole checkpoints cannot be "
                "merged with. Use `minimize` on the modules it is about."
            )
        if self.method is not None:
            require_usable(self.method, len(names))
        try:
            self._probe(1.0, self.center is not None)
        except ValueError as error:
            where = "a module of random updates, on which the design was tried,"
            if "module 0 of the batch" not in str(error):
                raise
            raise type(error)(str(error).replace("module 0 of the batch", where)) from error


def _spread(sizes: Tensor) -> Tensor:
    """Largest over smallest size of the updates of each module, ``(M, N)`` to ``(M,)``; those of zero do not count.

    Raises:
        ValueError: If fourth powers of such updates do not fit into float64 together.
    """
    spread = sizes.amax(-1) / torch.where(sizes > 0, sizes, torch.inf).amin(-1)
    if bool((spread > _LARGEST_SPREAD).any()):
        raise ValueError(
            f"module {int(spread.argmax())} of the batch has updates that differ by a factor of "
            f"{float(spread.max()):.0e} in size, which float64 cannot compare. Leave one of these experts out, or keep "
            "the base's tensor with a rule."
        )
    return spread


def require_usable(method: MergingMethod, experts: int) -> None:
    """Refuse a method that cannot be made ready by the updates alone, or fails on random ones.

    Raises:
        ValueError: If it needs data and has not seen any, or gives no merged updates.
    """
    if method.needs_loaders and not method.ready:
        raise ValueError(
            f"`{method!r}`: it needs data ({method.about.data}). Give what `.prepare(task_vectors, data)` returns."
        )
    if method.ready and method.about.scope == "module" and method.about.data == "none":
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):  # one of the user's own may draw
            method(torch.randn(experts, 3, 3, generator=generator, dtype=torch.float64))


def design_text(design: Design, *, solver: bool) -> str:
    """Describe as JSON what decides a Full draw besides its temperature: experts, anchor and perhaps the solver.

    A checkpoint as the centre is left to the draws' norms, because its path may differ.
    """
    described = design.describe()
    if design.center is not None:
        described["anchor"] = {**described["anchor"], "center": "checkpoint"}
    keys = ("experts", "anchor", "solver") if solver else ("experts", "anchor")
    return json.dumps({key: described[key] for key in keys}, sort_keys=True)


Designs = ProductOfExperts | Design | Callable[[str], Design]
"""One design for all tensors, or a function from the name of a merged tensor."""


def as_function(designs: Designs) -> Callable[[str], Design]:
    """Designs as a function from the tensor's name, the same object for every tensor if there is one design.

    Raises:
        TypeError: If it is no design.
    """
    if isinstance(designs, ProductOfExperts | Design):
        design = designs if isinstance(designs, Design) else Design(designs)
        return lambda tensor: design
    if callable(designs) and not isinstance(designs, type | MergingMethod):
        return designs
    what = f"the class {designs.__name__}" if isinstance(designs, type) else textwrap.shorten(repr(designs), 60)
    raise TypeError(
        f"`design`: {what} is no design here. Give a product of experts (`ProductOfExperts.of(vectors.names, "
        "InputGram())`), a `Design`, or a function from the name of a tensor to one of them; a merge also takes a "
        "merging method, such as `Ties()`."
    )


def require_alike(checkpoint: Checkpoint, role: str, base: Checkpoint, tensor: str) -> None:
    """Check from headers that a checkpoint in some role has a tensor of the base's shape.

    Raises:
        CheckpointError: If it has none, or another shape.
    """
    found = checkpoint.tensors.get(checkpoint.aliases.get(tensor, tensor))
    if found is None or found.shape != base.tensors[tensor].shape:
        what = "is missing" if found is None else f"is {found.shape}, the base's {base.tensors[tensor].shape}"
        others = other_names(base, checkpoint) if found is None else None
        way = "Give a checkpoint of the base's architecture." if others is None else f"In all, {others}"
        raise CheckpointError(f"{role} {checkpoint.source}: tensor {tensor!r} {what}. {way}")


def shown(value: Any) -> Any:
    """A setting as plain data that does not change from run to run."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    text = repr(value) if is_dataclass(value) else getattr(value, "__qualname__", f"{type(value).__qualname__}()")
    return re.sub(r" at 0x[0-9a-f]+", "", text)
