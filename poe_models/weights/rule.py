"""One rule for parameters: which tensors it is about, and whether they are merged, averaged, or kept."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from poe_models.weights.checkpoint import TensorInfo
from poe_models.weights.patterns import PatternError, pattern
from poe_models.weights.views import View

Action = Literal["merge", "average", "base"]
Shape = Literal[
    "any",
    "vector",
    "matrix",
    "stack",
    "kernel",
    "depthwise",
    "square_mask",
    "three_in_rows",
    "three_in_columns",
    "even_rows",
    "even_stack",
]

SHAPES: dict[str, Callable[[tuple[int, ...]], bool]] = {
    "any": lambda shape: True,
    "vector": lambda shape: len(shape) < 2 or (len(shape) > 2 and sum(axis > 1 for axis in shape) < 2),
    "matrix": lambda shape: len(shape) == 2,
    "stack": lambda shape: len(shape) == 3,
    "kernel": lambda shape: 3 <= len(shape) <= 5,
    "depthwise": lambda shape: 3 <= len(shape) <= 5 and shape[1] == 1 and shape[0] > 1,
    "square_mask": lambda shape: len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3],
    "three_in_rows": lambda shape: len(shape) == 2 and shape[0] == 3 * shape[1],
    "three_in_columns": lambda shape: len(shape) == 2 and shape[1] == 3 * shape[0],
    "even_rows": lambda shape: len(shape) == 2 and shape[0] % 2 == 0,
    "even_stack": lambda shape: len(shape) == 3 and shape[1] % 2 == 0,
}
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # of a layer, or of whatever else a list of modules holds
_VIEW_KEYS = tuple(field.name for field in dataclasses.fields(View) if field.name != "flatten")


@dataclass(frozen=True)
class Rule:
    """An action for the tensors whose name, shape and model type fit.

    Args:
        match: Regular expression, searched for anywhere in the tensor's name.
        action: Either ``"merge"`` by the product of experts, ``"average"`` the updates, or keep the ``"base"``.
        view: View of a merged tensor as matrices; None leaves it to the first later rule that has one.
        model_types: Values of ``model_type``; empty for any. A model without a config fits too, unless ``known``.
        shape: Condition on the shape. ``"vector"`` has fewer than two axes (or all but one of length 1, from three axes
            on); ``"matrix"`` two axes; ``"stack"`` three; ``"kernel"`` three to five; ``"depthwise"`` is a kernel with
            one input channel and several outputs; ``"square_mask"`` (1, 1, n, n); ``"three_in_rows"`` d_out = 3 d_in;
            ``"three_in_columns"`` the transpose of it; ``"even_rows"`` an even d_out; ``"even_stack"`` the same of a
            stack.
        known: The model type must be known to be one of ``model_types``.
        note: Description of the tensors, for the reason that ``plan`` prints.

    >>> Rule.from_dict({"match": "lm_head", "action": "base"}).action
    'base'
    """

    match: str = ""
    action: Action = "merge"
    view: View | None = None
    model_types: tuple[str, ...] = ()
    shape: Shape = "any"
    known: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.match, str):
            raise ValueError(f"`Rule(match={self.match!r})`: not a regular expression. Write the name of a tensor.")
        try:
            pattern(self.match)
        except PatternError as error:
            raise ValueError(f"`Rule(match=...)`: {error} Escape special characters with a backslash.") from error
        object.__setattr__(self, "model_types", _typed_tuple("model_types", self.model_types, str))  # hashable
        _one_of("action", self.action, get_args(Action))
        _one_of("shape", self.shape, get_args(Shape))
        if self.view is not None and self.action != "merge":
            raise ValueError(
                f"`Rule(action={self.action!r}, view=...)`: only merged tensors are seen as matrices. Leave `view` "
                "out, or use `action: merge`."
            )
        if self.known and not self.model_types:
            raise ValueError(
                "`Rule(known=True)`: there are no model types to know. Give `model_types`, or leave `known` out."
            )

    def applies(self, names: Iterable[str], info: TensorInfo, model_type: str | None) -> bool:
        """Return whether the rule is about a tensor, given all its names (several if it is tied)."""
        return self.fits(info, model_type) and (not self.match or any(map(pattern(self.match).search, names)))

    def fits(self, info: TensorInfo, model_type: str | None) -> bool:
        """Return whether the rule is about tensors of this shape in models of this type, whatever their names."""
        typed = not self.model_types or model_type in self.model_types or (model_type is None and not self.known)
        return typed and SHAPES[self.shape](info.shape)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rule:
        """Make a rule from plain values, such as an entry of a YAML file.

        Args:
            values: Values of ``match`` and ``action``, and optionally the other arguments; ``view`` as a mapping of
                ``View``'s arguments, ``{}`` to see a matrix as it is.

        Returns:
            The rule.

        Raises:
            ValueError: If a key is unknown (the message names the nearest valid one) or a value has a wrong type.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"rule {values!r}: expected a mapping such as {{match: lm_head, action: base}}.")
        names = tuple(field.name for field in dataclasses.fields(cls))
        _known_keys("rule", values, names)
        for key in ("match", "action"):
            if key not in values:
                raise ValueError(
                    f"rule {dict(values)}: `{key}` is missing. Write for instance {{match: lm_head, action: base}}."
                )
        known = dict(values)
        if known.get("view") is not None:
            known["view"] = _view_from_dict(known["view"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :meth:`from_dict` takes back: ``match``, ``action``, and what is not a default."""
        values = {name: value for name, value in vars(self).items() if value != getattr(type(self), name)}
        if self.view is not None:
            view = {key: getattr(self.view, key) for key in _VIEW_KEYS if getattr(self.view, key) != getattr(View, key)}
            values["view"] = {key: list(value) if isinstance(value, tuple) else value for key, value in view.items()}
        if self.model_types:
            values["model_types"] = list(self.model_types)
        return {**values, "match": self.match, "action": self.action}


class Precedence:
    r"""Rules for tensors of one shape and model type, in order: the first whose text a name has decides.

    Args:
        rules: The rules.
        plain: Texts that need no budget of time and take all numbers of layers alike: they are tried on one name of
            those that differ in such numbers only.

    >>> lowest = Rule(r"layers\.0\.", "base")
    >>> order = Precedence([lowest, Rule("mlp", "average"), Rule()], {"mlp", ""})
    >>> [order.deciding([f"layers.{layer}.mlp.weight"]).action for layer in range(3)]
    ['base', 'average', 'average']
    """

    def __init__(self, rules: Sequence[Rule], plain: Collection[str]) -> None:
        self._rules = tuple(rules)
        places = range(len(rules))
        self._plain = [(p, re.compile(rules[p].match).search) for p in places if rules[p].match in plain]
        self._others = [(p, pattern(rules[p].match).search) for p in places if rules[p].match not in plain]
        self._first_plain: dict[tuple[str, ...], int] = {}

    def deciding(self, names: Sequence[str]) -> Rule | None:
        """The first rule that is about a tensor with these names (several if it is tied), or None."""
        alike = tuple([_NUMBER.sub("0", name) for name in names])
        if alike not in self._first_plain:
            found = (place for place, search in self._plain if any(map(search, alike)))
            self._first_plain[alike] = next(found, len(self._rules))
        last = self._first_plain[alike]
        for place, search in self._others:
            if place > last:
                break
            if any(map(search, names)):
                return self._rules[place]
        return self._rules[last] if last < len(self._rules) else None


def _view_from_dict(values: object) -> View:
    if not isinstance(values, Mapping):
        raise ValueError(f"rule: `view` is {values!r}. Write for instance `view: {{rows: [4096, 1024, 1024]}}`.")
    _known_keys("view", values, _VIEW_KEYS)
    plain = dict(values)
    for key in ("transpose", "heads", "stacked", "square", "vector"):
        if not isinstance(plain.get(key, False), bool):
            raise ValueError(f"view: `{key}` is {plain[key]!r}. Write true or false.")
    for key in ("blocks", "height", "groups"):
        if type(plain.get(key, 1)) is not int:
            raise ValueError(f"view: `{key}` is {plain[key]!r}. Write a whole number.")
    if "rows" in plain:
        plain["rows"] = _typed_tuple("rows", plain["rows"], int)
    return View(**plain)


def _typed_tuple(key: str, value: object, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
        raise ValueError(f"rule: `{key}` is {value!r}. Write a list of {'whole numbers' if kind is int else 'names'}.")
    return tuple(value)


def _known_keys(what: str, values: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for key in values:
        if key not in valid:
            raise ValueError(f"{what} {dict(values)}: unknown key {key!r}; {_nearest(key, valid)}.")


def _one_of(key: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"`Rule({key}={value!r})`: unknown {key}; {_nearest(value, valid)}.")


def _nearest(word: object, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
