"""Settings that depend on the tensor: values by filter, and numbers over the layers of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

_LAYER = re.compile(r"(?P<stack>(?:|.*?\.)(?:layers?|h|blocks?))\.(?P<number>\d+)\.")


class Gradient(tuple[float, ...]):
    """Numbers over the layers of a model, between which those of each layer are interpolated, as in mergekit.

    >>> Gradient((0.0, 0.5, 2.0)).at(0.25), Gradient((0.0, 0.5, 2.0)).at(1.0)
    (0.25, 2.0)
    """

    def at(self, depth: float) -> float:
        """The number at a depth from 0, the first layer, to 1, the last."""
        place = depth * (len(self) - 1)
        low = int(place)
        return (1 - (place - low)) * self[low] + (place - low) * self[min(low + 1, len(self) - 1)]


@dataclass(frozen=True)
class Setting(Generic[T]):
    """Values by filter; the first case whose filter is part of the tensor's name decides, as in mergekit.

    Args:
        cases: Pairs of filter (None: every tensor) and value.

    >>> setting = Setting((("mlp", 1.0), (None, 0.5)))
    >>> setting.get("layers.0.mlp.weight"), setting.get("layers.0.attention.weight")
    (1.0, 0.5)
    """

    cases: tuple[tuple[str | None, T], ...]

    def get(self, tensor: str, depth: float = 0.0) -> T | None:
        """The value for one tensor, in a layer at a depth from 0 to 1, or None if no filter matches."""
        found = next((value for word, value in self.cases if word is None or word in tensor), None)
        return cast(T, found.at(depth)) if isinstance(found, Gradient) else found

    @property
    def varies(self) -> bool:
        """Whether tensors may have different values."""
        return any(word is not None or isinstance(value, Gradient) for word, value in self.cases[:1])

    def numbers(self) -> list[Any]:
        """All values, those of lists over the layers one by one."""
        return [each for _, case in self.cases for each in (case if isinstance(case, Gradient) else (case,))]

    @property
    def complete(self) -> bool:
        """Whether every tensor has a value."""
        return any(word is None for word, _ in self.cases)

    def otherwise(self, fallback: Setting[T]) -> Setting[T]:
        """These cases first, then those of ``fallback``."""
        return self if self.complete else Setting(self.cases + fallback.cases)

    def plain(self) -> Any:
        """The setting as it is written in YAML."""
        cases = [(word, list(value) if isinstance(value, tuple) else value) for word, value in self.cases]
        if len(cases) == 1 and self.complete:
            return cases[0][1]
        return [{**({} if word is None else {"filter": word}), "value": value} for word, value in cases]


class Layers:
    """The layers of a model, by the names of its tensors: ``layers.3.``, ``layer.3.``, ``h.3.`` or ``blocks.3.``.

    Every stack, such as the two of an encoder and a decoder, has layers of its own. The first is at depth 0, the last
    at 1, as mergekit has it: a single layer is at 1, and tensors outside of layers are at 0.

    Args:
        tensors: Names of all tensors.

    >>> layers = Layers(["embed.weight", *(f"layers.{i}.mlp.weight" for i in range(5)), "head.weight"])
    >>> [layers.depth(name) for name in ("embed.weight", "layers.3.mlp.weight", "head.weight")]
    [0.0, 0.75, 0.0]
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for name in tensors:
            if found := _LAYER.match(name):
                stack, number = found["stack"], int(found["number"])
                self._last[stack] = max(number, self._last.get(stack, 0))

    def __bool__(self) -> bool:
        """Whether there are any layers."""
        return bool(self._last)

    def depth(self, tensor: str) -> float:
        """Depth of a tensor's layer, from 0 to 1."""
        found = _LAYER.match(tensor)
        if found is None:
            return 0.0
        last = self._last[found["stack"]]
        return int(found["number"]) / last if last else 1.0
