"""Run a model many times with changing weights behind a cut, computing what is before the cut once.

The first pass records the inputs of the module at the cut. Later passes give it those inputs again, and modules called
before it are not computed: they return NaN of the right shape. Whatever uses something from before the cut by another
way than the cut's own inputs (a skip connection across it, say) therefore shows as NaN, and is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poe_models.weights.batches import mapped


class CutError(ValueError):
    """Features before a cut cannot be reused; the message says why."""


def structural_cut(model: nn.Module, changing: Collection[str]) -> str | None:
    """Find a cut that the model's containers give.

    That is the first element with changing weights of an ``nn.Sequential`` or ``nn.ModuleList``; inside that element
    the search goes on only through containers, because a module's own code may use its input twice.

    Args:
        model: The model.
        changing: Names of tensors that differ between runs.

    Returns:
        The name of a submodule, or None if nothing comes before the first changing one.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2))
    >>> structural_cut(model, ["1.1.weight", "2.weight"])
    '1.1'
    """
    path, module, best = "", model, None
    while True:
        children = [name for name, _ in module.named_children()]
        owners = {name.removeprefix(path).split(".")[0] for name in changing if name.startswith(path)}
        touched = [name for name in children if name in owners]
        is_container = isinstance(module, nn.Sequential | nn.ModuleList)
        if not touched or not owners <= set(children) or (best is not None and not is_container):
            return best
        if is_container and touched[0] != children[0]:
            best = path + touched[0]
        module = module.get_submodule(touched[0])
        path += touched[0] + "."


class Cut:
    """Features at one submodule of a model, for every batch of a loader.

    Args:
        model: The model.
        name: The submodule; what comes before its first call is the same in every run.
        changing: Names of tensors that differ between runs.

    Raises:
        CutError: If the model has no such submodule.
    """

    def __init__(self, model: nn.Module, name: str, changing: Collection[str]) -> None:
        modules = dict(model.named_modules())
        if not name or name not in modules:
            raise CutError(f"the model has no submodule {name!r}; `model.named_modules()` lists them")
        self.name = name
        self._target = modules[name]
        self._modules = modules
        self._ancestors = {parent for parent in modules if parent == "" or f"{name}.".startswith(f"{parent}.")}
        self._changing = {owner for tensor in changing for owner in modules if _owns(owner, tensor)}
        self._features: list[tuple[Any, Any]] = []
        self._stubs: list[dict[str, list[Any]]] = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self._features.clear()
        self._stubs.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one batch while the model runs in full.

        Yields:
            Nothing.

        Raises:
            CutError: If the submodule was not called, or a changing module was called before it.
        """
        called: dict[str, list[Any]] = {}
        features: list[tuple[Any, Any]] = []
        handles = [handle for name in self._modules for handle in self._watch(name, called, features)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not features:
            raise CutError(f"{self.name!r} is not called when the model runs")
        early = [name for name in called if name not in self._ancestors and name in self._changing]
        if early:
            raise CutError(f"{early[0]!r}, which is sampled, is called before {self.name!r}")
        outputs = {name: given for name, given in called.items() if name not in self._ancestors}
        self._features.append(features[0])
        self._stubs.append({name: given for name, given in outputs.items() if not _inside(name, outputs)})

    def _watch(
        self, name: str, called: dict[str, list[Any]], features: list[tuple[Any, Any]]
    ) -> tuple[RemovableHandle, RemovableHandle]:
        """A hook that records the outputs of one submodule before the cut, and the inputs of the cut."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not features and name == self.name:
                features.append(mapped(_kept, (args, kwargs)))
            elif not features:
                called.setdefault(name, [])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not features:
                called[name].append(mapped(_outlined, output))

        module = self._modules[name]
        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    @contextmanager
    def replaying(self, batch: int, device: torch.device) -> Iterator[None]:
        """Run one batch from the cut on.

        Args:
            batch: Its number.
            device: Where the model is.

        Yields:
            Nothing.
        """
        reached: list[bool] = []

        def substitute(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if reached:
                return None
            reached.append(True)
            given: tuple[Any, Any] = mapped(lambda x: x.to(device, copy=True), self._features[batch])
            return given

        replaced = {}
        for name, outputs in self._stubs[batch].items():
            module = self._modules[name]
            replaced[name] = module.__dict__.get("forward")
            module.forward = _stub(module.forward, outputs, reached, device)
        handle = self._target.register_forward_pre_hook(substitute, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for name, own in replaced.items():
                if own is None:
                    del self._modules[name].forward
                else:
                    self._modules[name].forward = own


def _stub(
    original: Callable[..., Any], outputs: list[Any], reached: list[bool], device: torch.device
) -> Callable[..., Any]:
    """A forward method in the place of a submodule's before the cut: it gives NaN of the recorded shapes."""
    remaining = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if reached:
            return original(*args, **kwargs)
        return mapped(lambda x: x.filled(device), next(remaining), _Outline)

    return forward


class _Outline:
    """Shape, dtype and layout of a floating tensor that is not computed again."""

    def __init__(self, tensor: Tensor) -> None:
        self.like = torch.empty_like(tensor, device="meta")  # keeps the strides: functions between modules stay fast

    def filled(self, device: torch.device) -> Tensor:
        return torch.full_like(self.like, torch.nan, device=device)


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _outlined(value: Tensor) -> Tensor | _Outline:
    """The outline of a floating tensor; other tensors, such as masks and indices, as they are."""
    return _Outline(value) if value.is_floating_point() else value


def _owns(module: str, tensor: str) -> bool:
    return module == "" or tensor.startswith(f"{module}.")


def _inside(name: str, others: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in others for depth in range(1, len(parts)))
