"""Design spaces: a design whose settings are ranges, tied over groups of modules.

>>> from poe_models import Anchor, Gaussian, InputGram, ProductOfExperts, RelativePrecision
>>> from inference.models.design import Design
>>> def make(eta: float, scaling: float) -> Design:
...     anchor = Anchor(precision=RelativePrecision(eta))
...     return Design(ProductOfExperts.of(["a", "b"], InputGram(), Gaussian(), anchor=anchor), scaling)
>>> groups = {"attention": ("h.0.attn",), "rest": ("h.0.mlp",)}
>>> space = DesignSpace(make, {"eta": Searched(Range(1e-4, 1, log=True), groups), "scaling": Searched(Range(1, 1.3))})
>>> list(space.parameters)
['eta/attention', 'eta/rest', 'scaling']
>>> space.designs({"eta/attention": 0.1, "eta/rest": 0.2, "scaling": 1.0})("h.0.mlp").poe.anchor.precision
RelativePrecision(eta=0.2)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from inference.models.method_design import AnyDesign, AnyDesigns, as_any_function
from inference.search.groups import OTHER, Groups
from poe_models.printing import Brief

Value = float | str


@dataclass(frozen=True)
class Range:
    """An interval of numbers, on a logarithmic scale if ``log``.

    Raises:
        ValueError: If it is empty, upside down, not finite, or logarithmic with a bound that is not positive.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"`{self!r}`: give finite bounds with low < high.")
        if self.log and self.low <= 0:
            raise ValueError(f"`{self!r}`: a logarithmic range needs a positive low.")

    def grid(self, count: int) -> list[Value]:
        """``count`` values with equal steps of the number or its logarithm, both bounds among them.

        >>> Range(1e-2, 1.0, log=True).grid(3)
        [0.01, 0.1, 1.0]
        """
        shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        if self.log:
            values = (self.low * (self.high / self.low) ** share for share in shares)
            return [min(max(float(f"{value:.12g}"), self.low), self.high) for value in values]
        return [self.low + (self.high - self.low) * share for share in shares]


@dataclass(frozen=True)
class Choice:
    """A few values, numbers or texts.

    Raises:
        ValueError: If there are fewer than two, or one is given twice.
    """

    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if len(self.options) < 2 or len(set(self.options)) < len(self.options):
            raise ValueError(f"`{self!r}`: give at least two values, each once.")

    def grid(self, count: int) -> list[Value]:
        """All options; a count of values has no meaning for them."""
        return list(self.options)


@dataclass(frozen=True, repr=False)
class Searched(Brief):
    """A setting that is searched.

    Attributes:
        values: What it may be.
        groups: Name of a group to its tensors, which share a value; empty for one value for all tensors.

    Raises:
        TypeError: If the values are no ``Range`` or ``Choice``.
        ValueError: If a group has no tensors, or a tensor is in two of them.
    """

    values: Range | Choice
    groups: Groups = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Range | Choice):
            raise TypeError(f"`Searched({self.values!r})`: give a Range(low, high) or a Choice((value, value, ...)).")
        owners: dict[str, str] = {}
        for group, tensors in self.groups.items():
            if not tensors:
                raise ValueError(f"group {group!r} has no tensors. Leave it out.")
            for tensor in tensors:
                if owners.setdefault(tensor, group) != group:
                    raise ValueError(f"groups {owners[tensor]!r} and {group!r} overlap: both have {tensor!r}.")

    def group_of(self, tensor: str) -> str | None:
        """Group of a tensor, None if all share one value; what is in no group goes with ``"other"`` or the last."""
        if not self.groups:
            return None
        known = next((group for group, tensors in self.groups.items() if tensor in tensors), None)
        return known or (OTHER if OTHER in self.groups else [*self.groups][-1])


@dataclass(frozen=True, eq=False, repr=False)
class DesignSpace(Brief):
    """Designs of a model with settings to be chosen.

    Attributes:
        make: Maps one value of every setting, given by its name, to a design (or to a function from the tensor's name).
        searched: Name of a setting to its values and the groups that share one.
    """

    make: Callable[..., AnyDesigns]
    searched: Mapping[str, Searched]

    def __post_init__(self) -> None:
        if not self.searched:
            raise ValueError("`DesignSpace(searched={})`: there is nothing to search. Give a `Searched` for a setting.")

    @property
    def parameters(self) -> dict[str, Range | Choice]:
        """Parameters of a search: the setting's name, with that of the group where there are groups."""
        found: dict[str, Range | Choice] = {}
        for name, each in self.searched.items():
            found |= {f"{name}/{group}": each.values for group in each.groups} or {name: each.values}
        return found

    def settings(self, values: Mapping[str, Value], tensor: str) -> dict[str, Value]:
        """The settings of one tensor, from a value for every parameter.

        Raises:
            ValueError: If a parameter has no value, or one is no parameter.
        """
        if set(values) != set(self.parameters):
            odd = sorted(set(values) ^ set(self.parameters))
            raise ValueError(f"`DesignSpace`: the parameters are {', '.join(self.parameters)}; not so {odd[0]!r}.")
        groups = {name: each.group_of(tensor) for name, each in self.searched.items()}
        return {name: values[name if group is None else f"{name}/{group}"] for name, group in groups.items()}

    def designs(self, values: Mapping[str, Value]) -> Callable[[str], AnyDesign]:
        """The design of every tensor, the same object for tensors of equal settings."""
        made: dict[tuple[tuple[str, Value], ...], Callable[[str], AnyDesign]] = {}

        def of(tensor: str) -> AnyDesign:
            settings = self.settings(values, tensor)
            key = tuple(settings.items())
            if key not in made:
                made[key] = as_any_function(self.make(**settings))
            return made[key](tensor)

        return of

    def shared(self) -> DesignSpace:
        """The space in which every setting has one value for all modules, the ablation of [BMM]."""
        return replace(self, searched={name: replace(each, groups={}) for name, each in self.searched.items()})

    def describe(self) -> dict[str, Any]:
        """Ranges and groups as plain data."""
        return {
            name: {"values": repr(each.values), "groups": {group: list(names) for group, names in each.groups.items()}}
            for name, each in self.searched.items()
        }

    def text(self) -> str:
        """The description as one line, the same for the same space."""
        return json.dumps(self.describe(), sort_keys=True)
