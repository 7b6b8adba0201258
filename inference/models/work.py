"""Work of merging modules, counted on small modules of the same proportions.

A design is tried on made-up updates whose sides are shrunk by one factor, with as many experts, and what torch does is
counted: operations of matrix products grow with the third power of the factor, bytes of everything else with the
second. So a user's energy, map or method is counted like the ones that are here, and so are the steps that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from time import thread_time
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from inference.models.design import Design
from inference.models.method_design import AnyDesign, MethodDesign
from poe_models.methods import ModuleBatch
from poe_models.weights.task_vectors import ModuleUpdates

SHORT, LONG = 96, 1024
"""Sides that a module is shrunk to, the shorter and the longer one; smaller ones stay."""
DIRECTIONS = 2
"""Rank of the made-up updates beside noise of the same size, as of those in ``benchmarks/speed_models.py``.

The tails of Cauchy experts then take 3 to 5 steps from one start, as in ``benchmarks/results/speed.md``; experts that
contradict each other more need more starts, and more time.
"""
CACHED = 0.1
"""Time of a pass over what is made in float64, a few rows at a time in the cache, beside one over memory."""
IN_PLACE = 0.25
"""Time of a pass that writes where something was before, beside one into new memory."""
_PRODUCTS = {"matmul", "mm", "bmm"}
_SOLVES = {"solve_triangular", "cholesky_solve", "solve_ex", "solve"}
_EFFORT = {
    "cholesky": 1 / 3,
    "cholesky_ex": 1 / 3,
    "qr": 1.5,
    "eigh": 12.0,
    "eigvalsh": 4.0,
    "svd": 25.0,
    "svdvals": 8.0,
}
"""Operations ``m n min(m, n)`` times this, of a decomposition, at the rate of a Cholesky factorisation."""
_SORTED = {"sort": 60.0, "argsort": 60.0, "topk": 20.0, "kthvalue": 20.0, "quantile": 60.0, "median": 20.0}
"""Bytes of a pass that take as long as ordering one byte of a tensor."""


@dataclass(frozen=True)
class Work:
    """Amounts of work of each kind.

    Attributes:
        products: Floating-point operations of matrix products.
        solves: Those of decompositions and triangular solves.
        passes: Bytes read and written by everything else.
        calls: Seconds that a batch takes whatever its size.
    """

    products: float = 0.0
    solves: float = 0.0
    passes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class _Counts(TorchFunctionMode):
    """Counts what torch does within a block, as work of modules of the size that they have there."""

    def __init__(self, dtype: torch.dtype, few_rows: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.few_rows = few_rows  # whether products in a wider dtype are of a number of rows that does not grow
        self.found, self.rows = Work(), 0.0

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(func.__name__.removeprefix("linalg_"), [*_tensors((args, kwargs or {}))], [*_tensors(result)])
        return result

    def _count(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        written = name.endswith("_") and not name.endswith("__")
        if not made or not given or (not written and _same_memory(given[0], made[0])):
            return
        first, width = given[0], max(each.itemsize for each in (given[0], made[0])) / 4
        if name in _PRODUCTS and len(given) > 1 and min(*made[0].shape[-2:], first.shape[-1], 2) > 1:
            operations = 2.0 * made[0].numel() * first.shape[-1] * width
            if self.few_rows and made[0].itemsize > self.dtype.itemsize:
                self.rows += operations
            else:
                self.found += Work(products=operations)
        elif name in _SOLVES:
            self.found += Work(products=2.0 * width * made[0].numel() * first.shape[-1])
        elif name in _EFFORT:
            self.found += Work(solves=width * _EFFORT[name] * first.numel() * min(first.shape[-2:]))
        else:
            slow = CACHED if made[0].itemsize > self.dtype.itemsize else IN_PLACE if written else 1.0
            nbytes = sum(each.numel() * each.itemsize for each in (*given, *made))
            self.found += Work(passes=nbytes * _SORTED.get(name, slow))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, which may be nested.

    Yields:
        Each of them.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Made:
    """Made-up modules for a method that looks at the whole model first; counts the passes."""

    def __init__(self, updates: Tensor, names: Sequence[str]) -> None:
        self.updates, self.names, self.passes = updates, tuple(names), 0

    def __iter__(self) -> Iterator[ModuleUpdates]:
        self.passes += 1
        for index, each in enumerate(self.updates):
            yield ModuleUpdates(str(index), str(index), self.names, torch.zeros_like(each[0]), each.clone())


def shrunk(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the same proportions with sides of at most ``SHORT`` and ``LONG``.

    >>> shrunk((768, 2048)), shrunk((64, 100)), shrunk((32000, 4096))
    ((96, 256), (64, 100), (750, 96))
    """
    factor = max(1.0, min(shape) / SHORT, max(shape) / LONG)
    return max(1, round(shape[0] / factor)), max(1, round(shape[1] / factor))


@dataclass(frozen=True)
class Tried:
    """A design that was tried on a small module.

    Attributes:
        shape: ``(d_out, d_in)`` of the module.
        work: Work on it, and ``calls`` of a batch.
        rows: Operations of products of a number of rows that does not grow with the module.
        reads: Passes over the whole model before its first tensor is merged.
    """

    shape: tuple[int, int]
    work: Work
    rows: float
    reads: int

    def on(self, shape: tuple[int, int]) -> Work:
        """Work on a module of another shape, of about the same proportions."""
        entries = math.prod(shape) / math.prod(self.shape)
        sides = entries * min(shape) / min(self.shape)
        grown = Work(sides * self.work.products, sides * self.work.solves, entries * self.work.passes, self.work.calls)
        return grown + Work(products=entries * self.rows)


def tried(design: AnyDesign, names: Sequence[str], shape: tuple[int, int], dtype: torch.dtype) -> Tried | None:
    """Try a design on two small modules.

    Args:
        design: How they are merged.
        names: Names of the task vectors.
        shape: ``(d_out, d_in)`` of the modules.
        dtype: Dtype that is computed in.

    Returns:
        What it takes; None if it needs data, or is bound to modules of another shape. Adapters are taken as if they had
        full rank: an upper bound.
    """
    updates = _updates(shape, len(names), dtype)
    with torch.random.fork_rng(devices=[]):  # a design may draw
        torch.manual_seed(0)
        try:
            with _Counts(dtype, few_rows=False) as preparing:
                design, reads = _ready(design, updates, names)
            solve = _solving(design, updates, names)
            solve()  # with whatever is made once
            began = thread_time()
            solve()
            calls = thread_time() - began
            with _Counts(dtype, few_rows=isinstance(design, Design)) as solving:
                solve()
        except (ValueError, RuntimeError):
            return None
    seen, modules = preparing.found, len(updates)
    both = solving.found + replace(seen, passes=IN_PLACE * seen.passes)  # a few rows at a time
    each = Work(both.products / modules, both.solves / modules, both.passes / modules, calls)
    return Tried(shape, each, solving.rows / modules, reads)


def _updates(shape: tuple[int, int], experts: int, dtype: torch.dtype) -> Tensor:
    """Updates of two modules, noise and a few directions, ``(2, N, d_out, d_in)``."""
    generator, rank = torch.Generator().manual_seed(0), min(DIRECTIONS, *shape)
    noise = torch.randn(2, experts, *shape, generator=generator)
    left, right = (torch.randn(2, experts, side, rank, generator=generator) for side in shape)
    return (1e-3 * (noise + left @ right.mT / rank**0.5)).to(dtype)


def _ready(design: AnyDesign, updates: Tensor, names: Sequence[str]) -> tuple[AnyDesign, int]:
    """The design with a method that has seen the updates, where it has one, and the passes that this took."""
    method = design.method
    if isinstance(design, Design):
        experts = tuple(replace(each, residual_map=each.residual_map.stand_in()) for each in design.poe.experts)
        design = replace(design, poe=replace(design.poe, experts=experts))
    if method is None or method.ready:
        return design, 0
    order = design.order(names)
    made = _Made(updates[:, order], [names[place] for place in order])
    return design.with_method(method.prepare(made)), made.passes


def _solving(design: AnyDesign, updates: Tensor, names: Sequence[str]) -> Callable[[], Any]:
    """The call that merges the updates."""
    given = updates[:, design.order(names)].contiguous()
    if isinstance(design, MethodDesign):
        return lambda: design.solve(ModuleBatch.of(given, experts=names))
    center = None if design.center is None else torch.zeros_like(given[:, 0])
    return lambda: design.solve(given, None, center)
