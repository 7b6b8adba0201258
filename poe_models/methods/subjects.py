"""Subjects of property checks: updates of a few modules, and a way to merge variants of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.method import MergingMethod, ModuleBatch, TaskData, named_generator
from poe_models.weights.moments import ModuleMoments
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors

Updates = dict[str, Tensor]
"""By name of the module, ``(N, d_out, d_in)``."""
_SHAPES = ((12, 8), (6, 10), (8, 8))
_REAL_SHAPES = 3
_EXAMPLES, _CLASSES = 16, 4


class Subject(ABC):
    """A method, and updates to try it on.

    Args:
        method: The method, not prepared.

    Attributes:
        kind: Origin of the updates.
        updates: Float64 updates of all experts, never written to.
        experts: Names of the experts.
    """

    kind: ClassVar[Literal["random", "real"]]
    updates: Updates
    experts: tuple[str, ...]

    def __init__(self, method: MergingMethod) -> None:
        self.method = method

    @abstractmethod
    def prepared(self, updates: Updates, experts: Sequence[str]) -> MergingMethod:
        """The method, ready for these float32 or float64 updates of named experts."""

    def merge(self, updates: Updates, experts: Sequence[str] | None = None) -> Updates:
        """Merge variants of the updates, as a user would: prepare the method on all, then merge each module.

        Args:
            updates: Updates in any floating dtype.
            experts: Their names; those of the subject by default.

        Returns:
            The merged update of each module, ``(d_out, d_in)``.
        """
        names = tuple(self.experts if experts is None else experts)
        exact = {name: u if u.dtype in (torch.float32, torch.float64) else u.float() for name, u in updates.items()}
        ready = self.prepared(exact, names)
        return {n: ready.merge(ModuleBatch.of(u.unsqueeze(0), [n], names)).squeeze(0) for n, u in updates.items()}


class RandomModules(Subject):
    """Three modules of different shapes with four experts that share some directions and differ in size.

    Args:
        method: The method; given moments are replaced by random ones.
        seed: Seed of everything.
    """

    kind = "random"

    def __init__(self, method: MergingMethod, seed: int) -> None:
        super().__init__(method)
        self.seed = seed
        sizes = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)[:, None, None]
        self.experts = ("a", "b", "c", "d")
        self.updates = {
            f"layers.{i}.weight": (sizes * self._shared_and_own(str(i), shape)).float().double()
            for i, shape in enumerate(_SHAPES)
        }

    @override
    def prepared(self, updates: Updates, experts: Sequence[str]) -> MergingMethod:
        base = {name: torch.zeros_like(values[0]) for name, values in updates.items()}
        tuned = {expert: {n: u[i].clone() for n, u in updates.items()} for i, expert in enumerate(experts)}
        dtype = next(iter(updates.values())).dtype
        vectors = TaskVectors(base, tuned, dtype=dtype)
        method = self._with_moments(updates, experts)
        return method.prepare(vectors, self._data(vectors) if method.needs_loaders else None)

    def vectors(self) -> TaskVectors:
        """A small model with an integer buffer, a bias and tied matrices, around the first module."""
        name, updates = next(iter(self.updates.items()))
        states: dict[str, dict[str, Tensor]] = {}
        for i in range(len(updates) + 1):
            weight = torch.zeros_like(updates[0]) if i == 0 else updates[i - 1].clone()
            states[("base", *self.experts)[i]] = {
                name: weight,
                "tied.weight": weight,
                "bias": torch.full((3,), float(i), dtype=torch.float64),
                "steps": torch.tensor(i),
            }
        return TaskVectors(states.pop("base"), states, dtype=torch.float64)

    def _random(self, *names: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=named_generator(self.seed, *names), dtype=torch.float64)

    def _shared_and_own(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self._random(name, shape=shape) + self._random("update", name, shape=(4, *shape))

    def _with_moments(self, updates: Updates, experts: Sequence[str]) -> MergingMethod:
        kind = self.method.about.data
        if kind not in ("fisher", "activations"):
            return self.method

        def moments(expert: str, name: str, d_out: int, d_in: int) -> Tensor:
            if kind == "fisher":
                return self._random("fisher", expert, name, shape=(d_out, d_in)).square()
            rows = self._random("inputs", expert, name, shape=(3 * d_in, d_in))
            return rows.mT @ rows / len(rows)

        made = {each: {name: moments(each, name, *u.shape[1:]) for name, u in updates.items()} for each in experts}
        return replace(self.method, moments=ModuleMoments(kind, made))  # type: ignore[type-var]

    def _data(self, vectors: TaskVectors) -> TaskData:
        """Loaders and forward function of a model whose logits are the sum of its modules' outputs."""
        widest = max(info.shape[1] for info in vectors.base.tensors.values())
        loaders = {
            name: [self._random("batch", name, shape=(_EXAMPLES, widest)).to(vectors.dtype)] for name in vectors.names
        }
        return TaskData(loaders, _forward)


class RealModules(Subject):
    """The first real module of each shape, a few at most.

    Args:
        method: The method; not one that learns from data.
        modules: Real modules.

    Raises:
        ValueError: If there are none.
    """

    kind = "real"

    def __init__(self, method: MergingMethod, modules: Iterable[ModuleUpdates]) -> None:
        super().__init__(method)
        chosen: dict[tuple[int, ...], ModuleUpdates] = {}
        for module in _one_of_each_shape(modules) if isinstance(modules, TaskVectors) else modules:
            chosen.setdefault(tuple(module.base.shape), module)
        if not chosen:
            raise ValueError("`check(..., modules)`: there are no modules. Give `TaskVectors` that merge something.")
        taken = list(islice(chosen.values(), _REAL_SHAPES))
        self.updates = {module.name: module.updates.double() for module in taken}
        self.experts = taken[0].names

    @override
    def prepared(self, updates: Updates, experts: Sequence[str]) -> MergingMethod:
        return self.method.prepare(
            [ModuleUpdates(name, name, tuple(experts), torch.zeros_like(u[0]), u) for name, u in updates.items()]
        )


def _one_of_each_shape(vectors: TaskVectors) -> Iterator[ModuleUpdates]:
    # Modules of every shape, the first tensor of a shape at least, without reading all tensors.
    seen: set[tuple[int, int]] = set()
    for name, view in vectors.views.items():
        shapes = set(view.block_shapes(vectors.base.tensors[name].shape))
        if not shapes <= seen:
            seen |= shapes
            yield from vectors.modules(name)


def _forward(weights: Mapping[str, Tensor], batch: Any) -> Tensor:
    """Logits ``(B, 4)`` of a sum of one-layer networks."""
    outputs = [torch.tanh(batch[:, : weight.shape[1]] @ weight.mT)[:, :_CLASSES] for weight in weights.values()]
    return torch.stack(outputs).sum(0)
