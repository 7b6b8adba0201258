"""Merging methods: functions from the experts' updates of a module to one merged update.

A method is a frozen dataclass of plain numbers, so that its ``repr`` builds it again. A new one is one method:

>>> class Largest(MergingMethod):
...     "The expert with the largest update wins."
...     about = About("largest update", "made up for this example")
...     def merged(self, batch):
...         norms = batch.updates.square().sum((-2, -1))
...         return batch.updates[torch.arange(len(norms)), norms.argmax(-1)]
>>> Largest()(torch.stack([torch.ones(2, 2), 3 * torch.eye(2)]))
tensor([[3., 0.],
        [0., 3.]])

Numbers that depend on the whole model (a quantile of all entries, a norm) or on data are gathered by ``prepare``, which
gives a method that is ready to merge any module.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.residual_maps import MomentKind
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors

_LOADED = ("inputs", "labels")
Factors = tuple[Tensor, Tensor]
Forward = Callable[[Mapping[str, Tensor], Any], Tensor]
"""From the floating tensors of a whole model, by name, and a batch to logits ``(B, K)``; differentiable in both."""


@dataclass(frozen=True)
class About:
    """Description of a method: its source and its needs.

    Attributes:
        title: Name in the literature.
        citation: Authors, year and place.
        scope: Part that has to be known before a module can be merged: the module alone, or the whole model.
        data: Needs besides the updates: ``"inputs"`` or ``"labels"`` of the tasks are given to ``prepare``;
            ``"fisher"`` or ``"activations"`` are a field ``moments``, collected before.
        streaming: True if memory stays at a few tensors of each model.
        random: True if it draws; it then has a field ``seed``.
        matrices: True if it reads the two sides of a matrix (its singular vectors, its rows), which vectors lack.
        exceptions: Properties of :data:`poe_models.methods.checking.PROPERTIES` that it does not promise, with reasons.
    """

    title: str
    citation: str
    scope: Literal["module", "model"] = "module"
    data: Literal["none", "inputs", "labels", "fisher", "activations"] = "none"
    streaming: bool = True
    random: bool = False
    matrices: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Data and model for a method that learns.

    Attributes:
        loaders: Batches of each expert's task, by the expert's name; iterated once for each pass.
        forward: Logits of a model on a batch.
        progress: Called with the number of finished steps and their total.
    """

    loaders: Mapping[str, Iterable[Any]] = field(repr=False)
    forward: Forward
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, eq=False)
class ModuleBatch:
    """Modules of equal shape that are merged together.

    Attributes:
        updates: Updates ``U_i``, ``(M, N, d_out, d_in)``.
        names: Names of the ``M`` modules; their positions if they are not known.
        experts: Names of the ``N`` experts; their positions if they are not known.
        low_rank: Factors ``(M, N, d_out, r)`` and ``(M, N, r, d_in)`` of the updates, if all are adapters'.
    """

    updates: Tensor
    names: tuple[str, ...]
    experts: tuple[str, ...]
    low_rank: Factors | None = None

    @classmethod
    def of(
        cls,
        updates: Tensor,
        names: Sequence[str] | None = None,
        experts: Sequence[str] | None = None,
        low_rank: Factors | None = None,
    ) -> ModuleBatch:
        """A batch, with positions for names that are not given; a ``ValueError`` if updates and names do not fit."""
        if updates.ndim != 4 or 0 in updates.shape:
            raise ValueError(
                f"`ModuleBatch.of(updates)`: shape {tuple(updates.shape)}, but (M, N, d_out, d_in) with nothing empty "
                "is wanted. Stack the updates of M modules; `method(updates)` takes any leading dimensions."
            )
        modules, count = updates.shape[:2]
        names = tuple(map(str, range(modules))) if names is None else tuple(names)
        experts = tuple(map(str, range(count))) if experts is None else tuple(experts)
        if (len(names), len(experts)) != (modules, count):
            raise ValueError(
                f"`ModuleBatch.of(updates, names, experts)`: {modules} modules of {count} experts, but {len(names)} "
                f"and {len(experts)} names. Give one name for each."
            )
        return cls(updates, names, experts, low_rank)

    @override
    def __repr__(self) -> str:
        return f"ModuleBatch({', '.join(self.names)} of {', '.join(self.experts)}, {tuple(self.updates.shape)})"

    @classmethod
    def of_module(cls, module: ModuleUpdates) -> ModuleBatch:
        """One module of a checkpoint as a batch."""
        factors = module.low_rank
        low_rank = None if factors is None else (factors[0].unsqueeze(0), factors[1].unsqueeze(0))
        return cls.of(module.updates.unsqueeze(0), [module.name], module.names, low_rank)


class MergingMethod(ABC):
    """A rule from the updates of the experts to one merged update.

    An instance is an anchor's centre as it is: ``Anchor(center=TaskArithmetic(0.3))``. Methods never write to their
    inputs.

    Attributes:
        about: Description, for the registry.
    """

    about: ClassVar[About]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse a method that says nothing of itself.

        Raises:
            ValueError: If ``about`` is missing, or no ``About``.
        """
        about = getattr(cls, "about", None)
        if not isinstance(about, About):
            has = "no `about`" if about is None else f"`about = {about!r}`"
            raise ValueError(
                f"`{cls.__name__}`: a merging method with {has}. Say what it is in the class: "
                '`about = About("title", "Author, year, title, arXiv ...")`, from `poe_models.methods`.'
            )
        return super().__new__(cls)

    @abstractmethod
    def merged(self, batch: ModuleBatch) -> Tensor:
        """The merged updates ``(M, d_out, d_in)``; called with finite float32 or float64 updates, once prepared."""

    @property
    def needs_loaders(self) -> bool:
        """Return whether ``prepare`` has to be given ``TaskData``."""
        return self.about.data in _LOADED

    @property
    def ready(self) -> bool:
        """Return whether modules can be merged; a method that needs the whole model first has to be prepared."""
        return self.about.scope == "module" and not self.needs_loaders

    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> MergingMethod:
        """The method with the numbers of the whole model filled in, so that it is ready; itself by default.

        Args:
            modules: Modules that can be iterated several times; peak memory should stay at a few of them.
            data: Loaders and forward function, exactly if ``about.data`` is ``"inputs"`` or ``"labels"``.

        Returns:
            A method that is ready.
        """
        return self

    def inputs(self, experts: Sequence[str], modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Checkpoint]:
        """Checkpoints that decide the merge besides the updates and the ``repr``, after a check of their headers.

        Args:
            experts: Names of the experts.
            modules: Names and shapes ``(d_out, d_in)`` of all modules it will merge.

        Returns:
            Checkpoints by their role; none, but for given moments and learned masks.
        """
        return {}

    def importance(self, experts: int) -> tuple[float, ...]:
        """Weight of each expert in the mean of tensors that are averaged: the same for all by default."""
        return (1.0,) * experts

    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        """Numbers that merging ``modules`` of one shape holds at its peak, beside the updates and the result.

        ``plan`` predicts memory by it, in units of the compute dtype; the default is enough for sums.
        """
        return 4 * modules * shape[0] * shape[1]

    @final
    def prepare(self, modules: TaskVectors | Iterable[ModuleUpdates], data: TaskData | None = None) -> MergingMethod:
        """Gather from the whole model what the method needs of it.

        Args:
            modules: The ``TaskVectors``, or modules that can be iterated several times, with the experts in one order.
            data: For methods that need it.

        Returns:
            A method that is ready; itself if it already was.

        Raises:
            ValueError: If data is missing, or given in vain, or the modules are none or can be iterated only once.
        """
        name = type(self).__name__
        wants = self.about.data
        if (data is not None) != self.needs_loaders:
            missing = f"it needs data ({wants})" if data is None else "it needs no data"
            elsewhere = "Its moments are a field" if wants in get_args(MomentKind) else "Leave `data` out"
            way_out = "Give `data=TaskData(loaders, forward)`" if data is None else elsewhere
            raise ValueError(f"`{name}.prepare(modules, data)`: {missing}. {way_out}.")
        if isinstance(modules, Iterator):
            raise ValueError(
                f"`{name}.prepare({type(modules).__name__})`: it may look at the modules several times. Give "
                "`TaskVectors` or a list."
            )
        if self.ready:
            return self
        if not isinstance(modules, TaskVectors):
            return self.gathered(_Passes(name, modules), data)
        if not modules.views:
            raise ValueError(_no_modules(name))
        return self.gathered(modules, data)

    @final
    def merge(self, batch: ModuleBatch) -> Tensor:
        """Merge modules of equal shape.

        Args:
            batch: Their updates, names and factors.

        Returns:
            The merged updates ``(M, d_out, d_in)`` in the dtype of the updates; half precision is computed in float32.

        Raises:
            ValueError: If the method is not prepared, or the updates are not finite numbers.
        """
        updates = batch.updates
        if not self.ready:
            wanted = "task_vectors" if self.about.data == "none" else "task_vectors, data"
            raise ValueError(
                f"`{self!r}`: it has to see the whole model before a module can be merged. Call `.prepare({wanted})` "
                "and use the result; `merge_checkpoint` does so itself."
            )
        if not updates.is_floating_point():
            raise ValueError(f"`{self!r}`: the updates are {updates.dtype}. Give floating-point updates, W_i - W_0.")
        if not bool(torch.stack(updates.aminmax()).isfinite().all()):
            raise ValueError(
                f"`{self!r}`: the updates have NaN or infinite values. Leave that expert out, or look at the "
                "checkpoint it came from."
            )
        if updates.dtype in (torch.float32, torch.float64):
            return self._checked(self.merged(batch), batch)
        factors = None if batch.low_rank is None else (batch.low_rank[0].float(), batch.low_rank[1].float())
        single = replace(batch, updates=updates.float(), low_rank=factors)
        return self._checked(self.merged(single), single).to(updates.dtype)

    def _checked(self, merged: Any, batch: ModuleBatch) -> Tensor:
        modules, _, *shape = batch.updates.shape
        if isinstance(merged, Tensor) and merged.shape == (modules, *shape):
            return merged
        got = f"a tensor {tuple(merged.shape)}" if isinstance(merged, Tensor) else type(merged).__name__
        raise ValueError(
            f"`{type(self).__name__}.merged(batch)`: it returned {got}, but the updates are "
            f"{tuple(batch.updates.shape)}. Return one merged update for each module, (M, d_out, d_in) = "
            f"{(modules, *shape)}."
        )

    @final
    def __call__(self, updates: Tensor, low_rank: Factors | None = None) -> Tensor:
        """Merge modules without names: ``(..., N, d_out, d_in)``, with factors or not, to ``(..., d_out, d_in)``."""
        if updates.ndim < 3:
            raise ValueError(
                f"`{self!r}(updates)`: shape {tuple(updates.shape)}, but (..., N, d_out, d_in) is wanted. Stack the "
                "updates of the experts."
            )
        leading = updates.shape[:-3]

        def flat(x: Tensor) -> Tensor:
            return x.reshape(math.prod(leading), *x.shape[-3:])

        factors = None if low_rank is None else (flat(low_rank[0]), flat(low_rank[1]))
        merged = self.merge(ModuleBatch.of(flat(updates), low_rank=factors))
        return merged.reshape(*leading, *merged.shape[1:])

    def for_modules(self, modules: Sequence[str], experts: Sequence[str]) -> NamedMethod:
        """The method as a function of the updates ``(M, N, d_out, d_in)`` of named modules of named experts."""
        return NamedMethod(self, tuple(modules), tuple(experts))

    @override
    def __repr__(self) -> str:
        """The method and its settings; this one for classes that are no dataclass."""
        return f"{type(self).__qualname__}()"


@dataclass(frozen=True)
class NamedMethod:
    """A method in named modules of named experts, as an anchor's centre in them.

    Attributes:
        method: The method.
        modules: Names of the modules.
        experts: Names of the experts.
    """

    method: MergingMethod
    modules: tuple[str, ...]
    experts: tuple[str, ...]

    def __call__(self, updates: Tensor, low_rank: Factors | None = None) -> Tensor:
        """The merged updates ``(M, d_out, d_in)`` of ``(M, N, d_out, d_in)``, with their factors or not."""
        return self.method.merge(ModuleBatch.of(updates, self.modules, self.experts, low_rank))

    def for_modules(self, modules: Sequence[str], experts: Sequence[str]) -> NamedMethod:
        """The same method in other modules."""
        return self.method.for_modules(modules, experts)

    @override
    def __repr__(self) -> str:
        """The text of the method, by which designs are told apart, whatever the modules."""
        return repr(self.method)


def named_generator(seed: int, *names: str) -> torch.Generator:
    """A new generator on the CPU that depends on a seed and on names, not on the order in which anything is merged.

    >>> [float(torch.rand(1, generator=named_generator(0, "fc.weight", "mnist"))) for _ in range(2)]
    [0.3436172604560852, 0.3436172604560852]
    """
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@dataclass(frozen=True)
class _Passes:
    """Modules for any number of passes: at least one, and half precision as float32."""

    method: str
    modules: Iterable[ModuleUpdates]

    def __iter__(self) -> Iterator[ModuleUpdates]:
        empty = True
        for module in self.modules:
            empty = False
            factors = module.low_rank
            low_rank = None if factors is None else (_computed(factors[0]), _computed(factors[1]))
            yield replace(module, updates=_computed(module.updates), low_rank=low_rank)
            del module, factors, low_rank  # memory is one module's, not two
        if empty:
            raise ValueError(_no_modules(self.method))


def _no_modules(method: str) -> str:
    return f"`{method}.prepare(modules)`: there are no modules. Give those of the whole model."


def _computed(x: Tensor) -> Tensor:
    """Updates in a dtype to compute in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
