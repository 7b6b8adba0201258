"""Outputs of a model under changing weights, batch by batch, reduced to what is kept of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from inference.models.cut import Cut, CutError, structural_cut
from inference.models.outputs import Forward, Rows, called, class_rows, tensor_of
from poe_models.weights.batches import fingerprint, mapped
from poe_models.weights.collecting import evaluating

_log = logging.getLogger("inference.models.ensemble")
Read = Callable[[nn.Module, Tensor, Any, int], Rows]
"""From a model, its output for a batch, the batch and its number to the rows that count."""
Reduce = Callable[[Tensor, Tensor | None], Tensor]
"""From the rows of a batch, ``(n, ...)``, and their labels to what is kept of them, ``(n, ...)``."""


class Runner:
    """A model that is run over a loader again and again, with some of its tensors replaced; it is never written to.

    Args:
        model: The model; put into evaluation mode while it runs.
        loader: The batches; the same ones in every pass.
        fixed: Tensors that replace the model's in every pass, by the model's names.
        changing: Names and shapes of those that each pass brings.
        forward: Logits of a batch; by default the model is called with the batch, or with its first element.
        cut: A submodule whose inputs do not depend on the changing tensors.
        read: Makes rows of an output.
        reduce: Makes of each batch's rows what is kept; all of them by default.
        around: Values of the changing tensors at which the model is linearised; it is run as it is by default.

    Raises:
        ValueError: If the model lacks a tensor or has it in another shape, or the loader can be used only once.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        fixed: Mapping[str, Tensor],
        changing: Mapping[str, Sequence[int]],
        forward: Forward | None,
        cut: str | None,
        read: Read = class_rows,
        reduce: Reduce | None = None,
        around: Mapping[str, Tensor] | None = None,
    ) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                "`predict(loader=...)`: got an iterator, which gives its batches once, and every member needs them. "
                "Give a DataLoader or a list of batches."
            )
        self._model, self._loader = model, loader
        self._caller = _Caller(model, called if forward is None else forward)
        self._read, self._reduce = read, reduce
        self._labels: list[Tensor | None] = []
        self._examples: list[Tensor] = []
        self._own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        first = next(iter(self._own.values()), torch.empty(0))
        self._device = first.device
        self._check({name: tensor.shape for name, tensor in fixed.items()} | dict(changing))
        self._fixed = self._fitted(fixed)
        self._fingerprint: list[str] | None = None
        self._passes = 0
        self._named = cut is not None
        self._changing = tuple(changing)
        if around is not None and cut is not None:
            raise ValueError(
                f"`predict(cut={cut!r}, around=...)`: nothing is reused of a linearised model. Give one of both."
            )
        self._around = None if around is None else {f"model.{n}": v for n, v in self._fitted(around).items()}
        self._cut = None if around is not None else self._first_cut(cut, self._with_ties(changing))
        self._announce()

    @property
    def reused(self) -> str | None:
        """The submodule before which features are computed once; None where every pass is a full one."""
        return None if self._cut is None else self._cut.name

    @property
    def labels(self) -> Tensor | None:
        """Labels of all rows of the last pass, ``(n,)``; None where a batch has none."""
        known = [each for each in self._labels if each is not None]
        return torch.cat(known) if known and len(known) == len(self._labels) else None

    @property
    def examples(self) -> Tensor:
        """Number of the example that each row of the last pass belongs to, ``(n,)``, counted over all batches."""
        return torch.cat(self._examples)

    @torch.no_grad()
    def __call__(self, changing: Mapping[str, Tensor]) -> Tensor:
        """Rows of all batches, or what is kept of them.

        Args:
            changing: Tensors by the model's names.

        Returns:
            ``(n, classes)`` log probabilities, or whatever is read and kept; float64 on the CPU.

        Raises:
            ValueError: If the output cannot be read, the loader gives other batches than before, or a cut that was
                asked for cannot be used.
        """
        state = {f"model.{name}": value for name, value in {**self._fixed, **self._fitted(changing)}.items()}
        results: list[Tensor] = []
        seen: list[str] = []
        self._labels, self._examples, count = [], [], 0
        if self._cut is not None and self._passes == 0:
            self._cut.clear()
        with evaluating(self._model):
            for index, batch in enumerate(self._loader):
                seen.append(_fingerprint(batch, index))
                if self._fingerprint is not None and seen[-1:] != self._fingerprint[index : index + 1]:
                    raise _other_batches(index)
                moved = mapped(lambda x: x.to(self._device), batch)
                rows = self._read(self._model, self._run(state, moved, index), moved, index)
                self._labels.append(rows.labels)
                self._examples.append(rows.examples + count)
                count += rows.num_examples
                results.append(self._kept(rows, index))
        if self._fingerprint is not None and len(seen) != len(self._fingerprint):
            raise _other_batches(len(seen))
        self._fingerprint = seen
        self._passes += 1
        if not results:
            raise ValueError("`predict(loader=...)`: the loader has no batches. Give it some data.")
        return torch.cat(results)

    def _kept(self, rows: Rows, index: int) -> Tensor:
        """The rows of a batch reduced, one entry each; what is refused is that batch's."""
        if self._reduce is None:
            return rows.values
        try:
            found: Any = self._reduce(rows.values, rows.labels)
        except ValueError as error:
            raise ValueError(f"batch {index}: {error}") from error
        if not isinstance(found, Tensor) or found.shape[:1] != rows.values.shape[:1]:
            got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"`score(reduce=...)`: it gave {got} for {len(rows.values)} rows. Return a tensor, one entry for each."
            )
        return found.detach().cpu()

    def _run(self, state: Mapping[str, Tensor], batch: Any, index: int) -> Tensor:
        if self._cut is None:
            return self._full(state, batch)
        if self._passes == 0:
            try:
                with self._cut.recording():
                    output = self._full(state, batch)
            except CutError as error:
                self._give_up(str(error))
                output = self._full(state, batch)
            return output
        if self._passes == 1 and index == 0:
            return self._verified(state, batch)
        with self._cut.replaying(index, self._device):
            return self._full(state, batch)

    def _full(self, state: Mapping[str, Tensor], batch: Any) -> Tensor:
        if self._around is not None:
            return self._linearised(self._around, state, batch)
        output: Tensor = functional_call(self._caller, dict(state), (batch,))
        return output

    def _linearised(self, around: Mapping[str, Tensor], state: Mapping[str, Tensor], batch: Any) -> Tensor:
        """``f(W_*) + J (W - W_*)`` by one forward-mode product."""

        def outputs(changing: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self._caller, {**state, **changing}, (batch,))
            return found

        away = {name: state[name] - value for name, value in around.items()}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            value, moved = torch.func.jvp(outputs, (dict(around),), (away,))[:2]
        return value + moved

    def _verified(self, state: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The first batch both ways: what a member gives must not depend on whether features are reused.

        Members at a low temperature hardly differ, so this is tried with changing tensors that certainly do.
        """
        assert self._cut is not None
        shaken = _shaken(state, {f"model.{name}" for name in self._changing})
        try:
            full = self._full(shaken, batch)
            with self._cut.replaying(0, self._device):
                reused = self._full(shaken, batch)
            same = torch.allclose(full, reused, rtol=1e-3, atol=1e-4)
            why = (
                f"the model uses what comes before {self._cut.name!r} by another way than its inputs, or a sampled "
                "tensor before it"
            )
        except Exception as error:  # whatever a model does with NaN in the place of what it needs
            same, why = False, f"without what comes before {self._cut.name!r} the model fails: {error}"
        if not same:
            self._give_up(why)
            return self._full(state, batch)
        with self._cut.replaying(0, self._device):
            return self._full(state, batch)

    def _give_up(self, why: str) -> None:
        """Raise for a cut that was asked for, run in full instead of one that the structure suggested."""
        if self._named:
            assert self._cut is not None
            raise ValueError(
                f"`predict(cut={self._cut.name!r})`: features cannot be reused: {why}. Name a submodule that "
                "everything flows through and that comes before all sampled modules, or leave `cut` out."
            )
        self._cut = None
        _log.info("full forward for every member: %s", why)

    def _first_cut(self, name: str | None, changing: set[str]) -> Cut | None:
        found = structural_cut(self._model, changing) if name is None else name
        try:
            return None if found is None else Cut(self._model, found, changing)
        except CutError as error:
            raise ValueError(f"`predict(cut={name!r})`: {error}.") from None

    def _announce(self) -> None:
        if self._cut is None:
            _log.info("full forward for every member: no cut named, and no Sequential or ModuleList gives one")
        else:
            _log.info("features before %r are computed once", self._cut.name)

    def _with_ties(self, names: Iterable[str]) -> set[str]:
        """Names of the model's tensors that are, or share memory with, the named ones."""
        given = {id(self._own[name]) for name in names}
        return {name for name, tensor in self._own.items() if id(tensor) in given}

    def _check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        for name, shape in shapes.items():
            own = self._own.get(name)
            if own is None or tuple(own.shape) != tuple(shape):
                has = "has no such tensor" if own is None else f"has {tuple(own.shape)}"
                places = [each.removesuffix(f".{name}") for each in self._own if each.endswith(f".{name}")]
                where = f"{places[0]!r}" if own is None and len(places) == 1 else ""
                raise ValueError(
                    f"`predict(model=...)`: the members have {name!r} of shape {tuple(shape)}, the model {has}. Give a "
                    f"model of the base's architecture, or say where in it the checkpoint is: `submodule={where}`."
                )

    def _fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the dtype and on the device of the model's own."""
        fitted: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            own = self._own[name]
            fitted[name] = tensor.to(device=own.device, dtype=own.dtype)
            twin = first.setdefault(id(own), name)  # the model may tie what the files hold twice
            if twin != name and torch.equal(fitted[twin], fitted[name]):
                fitted[name] = fitted[twin]
        return fitted


def _shaken(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A copy of a state dict with noise added to some tensors, of their own size and equal for tied ones."""
    made: dict[int, Tensor] = {}
    for name in names:
        value = state[name]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        made.setdefault(id(value), value + noise * value.float().square().mean().sqrt().to(value))
    return {name: made[id(value)] if name in names else value for name, value in state.items()}


class _Caller(nn.Module):
    """A function of a model as a module, for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = function

    @override
    def forward(self, batch: Any) -> Tensor:
        return tensor_of(self.function(self.model, batch))


def _fingerprint(batch: Any, index: int) -> str:
    try:
        return fingerprint(batch)
    except ValueError as error:
        raise ValueError(f"`predict(loader=...)`: batch {index}: {error}") from error


def _other_batches(index: int) -> ValueError:
    return ValueError(
        f"`predict(loader=...)`: batch {index} differs from the one in the first pass, and members are averaged "
        "example by example. Turn shuffling and random augmentation off."
    )
