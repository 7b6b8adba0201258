"""Batches that torch's pytree does not open: ``BatchEncoding``, dataclasses, model outputs, read-only mappings."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.models.predictor import Runner
from poe_models.weights.batches import fingerprint, mapped, tensors_of

transformers = pytest.importorskip("transformers")
Pair = namedtuple("Pair", ["inputs", "mask"])


@dataclass(frozen=True)
class Example:
    inputs: Tensor
    note: str = "text"


@dataclass
class Slotted:
    __slots__ = ("inputs",)
    inputs: Any


KINDS = {
    "encoding": lambda x: transformers.BatchEncoding({"inputs": x}),
    "output": lambda x: transformers.modeling_outputs.SequenceClassifierOutput(logits=x),
    "userdict": lambda x: UserDict(inputs=x),
    "proxy": lambda x: MappingProxyType({"inputs": x}),
    "named tuple": lambda x: Pair(x, None),
    "frozen": lambda x: Example(x),
    "slots": lambda x: Slotted(x),
    "nested": lambda x: [{"a": (Example(x), "text")}, 3],
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@every_kind
def test_every_container_is_opened(make: Any) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    batch = make(x)
    before = [each.clone() for each in tensors_of(batch)]
    doubled = mapped(lambda t: 2 * t, batch)
    for one, two, old in zip(tensors_of(doubled), tensors_of(batch), before, strict=True):
        assert torch.equal(one, 2 * old)
        assert torch.equal(two, old)  # the loader's own batch stays
    assert isinstance(doubled, dict if isinstance(batch, MappingProxyType) else type(batch))
    assert fingerprint(batch) == fingerprint(make(x.clone())) != fingerprint(make(x.flip(0)))


def run_twice(batches: Any, model: nn.Module, forward: Any) -> list[Tensor]:
    weight = {"weight": model.weight}
    runner = Runner(model, batches, {}, {"weight": model.weight.shape}, forward, None)
    return [runner(weight), runner(weight)]


class Shuffled:
    """A loader that gives its batches in another order in each pass."""

    def __init__(self, make: Any) -> None:
        self._make, self._passes = make, 0

    def __iter__(self) -> Any:
        self._passes += 1
        x = torch.arange(6.0).reshape(3, 2)
        return iter([self._make(x if self._passes == 1 else x.flip(0))])


@every_kind
def test_a_loader_that_changes_is_refused(make: Any) -> None:
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="batch 0 differs"):
        run_twice(Shuffled(make), model, lambda model, batch: model(next(tensors_of(batch)).reshape(-1, 2)))


@every_kind
def test_tensors_are_moved_to_the_device(make: Any) -> None:
    seen: list[torch.device] = []
    model = nn.Linear(2, 2, bias=False, device="meta")

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(each.device for each in tensors_of(batch) if each.ndim == 2)
        raise ZeroDivisionError

    runner = Runner(model, [make(torch.ones(3, 2))], {}, {"weight": (2, 2)}, forward, None)
    with pytest.raises(ZeroDivisionError):
        runner({"weight": model.weight})
    assert {device.type for device in seen} == {"meta"}


def test_packed_sequences_keep_their_sizes_on_the_cpu() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    moved = mapped(lambda x: x.to("meta"), packed)
    assert type(moved) is type(packed)
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


def test_a_batch_without_tensors_is_refused() -> None:
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"batch 0: no tensor is found in a batch of type dict"):
        run_twice([{"text": ["one", "two"]}], model, lambda model, batch: model(torch.ones(2, 2)))


def test_a_change_behind_the_first_thousands_is_seen() -> None:
    x = torch.zeros(3, 4096)
    y = x.clone()
    y[2, -1] = 1
    assert fingerprint(x) != fingerprint(y)
    assert fingerprint(x) != fingerprint(x.bfloat16())
    assert fingerprint({"x": torch.zeros(0)}) != fingerprint(torch.zeros(0, 2))
