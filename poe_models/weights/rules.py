r"""Rules for parameters: which are merged (seen as which matrices), averaged, or kept from the base.

One table serves every method, so that methods are compared on the same footing. The first rule that applies to a tensor
decides, and a user's rules go before the defaults:

    DEFAULT_RULES.extended([{"match": "lm_head", "action": "base"},
                            {"match": r"qkv_proj\.weight", "action": "merge", "view": {"rows": [4096, 1024, 1024]}}])

By default matrices and convolutions are merged; GPT-2's Conv1D is transposed; fused projections ``in_proj_weight``,
``c_attn`` and ``qkv`` are split into [q; k; v] where d_out = 3*d_in; stacked 3-D experts are a batch of matrices;
embeddings, biases, norms (LayerNorm and the others) and scalars are averaged. Only the shape can say that a convolution
is grouped, and only of depthwise ones: shape[1] = 1 with several outputs, which a first layer on grey images has too.
Those are averaged unless a rule merges them. Integer, bool and complex tensors always stay the base's.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from typing_extensions import override

from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.patterns import PatternError, pattern
from poe_models.weights.views import View

Action = Literal["merge", "average", "base"]
Shape = Literal["any", "vector", "matrix", "stack", "kernel", "depthwise", "three_in_rows", "three_in_columns"]

_SHAPES: dict[str, Callable[[tuple[int, ...]], bool]] = {
    "any": lambda shape: True,
    "vector": lambda shape: len(shape) < 2 or (len(shape) > 2 and sum(axis > 1 for axis in shape) < 2),
    "matrix": lambda shape: len(shape) == 2,
    "stack": lambda shape: len(shape) == 3,
    "kernel": lambda shape: 3 <= len(shape) <= 5,
    "depthwise": lambda shape: 3 <= len(shape) <= 5 and shape[1] == 1 and shape[0] > 1,
    "three_in_rows": lambda shape: len(shape) == 2 and shape[0] == 3 * shape[1],
    "three_in_columns": lambda shape: len(shape) == 2 and shape[1] == 3 * shape[0],
}
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
            one input channel and several outputs; ``"three_in_rows"`` d_out = 3 d_in; ``"three_in_columns"`` the
            transpose of it.
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
        typed = not self.model_types or model_type in self.model_types or (model_type is None and not self.known)
        return typed and _SHAPES[self.shape](info.shape) and any(map(pattern(self.match).search, names))

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
        if "model_types" in known:
            known["model_types"] = _typed_tuple("model_types", known["model_types"], str)
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


def _view_from_dict(values: object) -> View:
    if not isinstance(values, Mapping):
        raise ValueError(f"rule: `view` is {values!r}. Write for instance `view: {{rows: [4096, 1024, 1024]}}`.")
    _known_keys("view", values, _VIEW_KEYS)
    plain = dict(values)
    for key in ("transpose", "stacked", "square"):
        if not isinstance(plain.get(key, False), bool):
            raise ValueError(f"view: `{key}` is {plain[key]!r}. Write true or false.")
    for key in ("blocks", "groups"):
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


# Model types whose linear layers are Conv1D, stored (in, out).
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$"
_CONV1D_FUSED = r"(^|\.)h\.\d+\.attn\.c_attn\.weight$"
_FUSED = r"(^|\.)(in_proj_weight|((c_attn|qkv|qkv_proj|Wqkv|to_qkv)\.weight))$"
_EMBEDDING = (
    r"(^|\.)(wte|wpe|shared|embs?|embed|embed_in|embed_tokens|embed_positions|relative_attention_bias|\w*pos_embed"
    r"|(?!\w*patch)\w*embeddings?)(\.weight)?$"
)

_DEFAULTS: tuple[Rule, ...] = (
    Rule(action="average", shape="vector", note="bias, norm, running statistic or scalar: fewer than two axes"),
    Rule(r"(^|[._])bias$", "average", note="bias"),
    Rule(_EMBEDDING, "average", note="embedding"),
    Rule(r"(^|\.)relative_position_bias_table$", "average", note="position bias"),
    Rule(r"(^|\.)(\w*norm\w*|ln(_\w+)?|\w+_ln)\.weight$", "average", note="norm"),
    Rule(
        r"experts\b",
        "merge",
        View(stacked=True, transpose=True),
        model_types=("llama4", "llama4_text", "gpt_oss"),
        shape="stack",
        known=True,
        note="stacked experts stored (expert, in, out)",
    ),
    Rule(
        r"experts\b|block_sparse_moe\.(input|output)_linear",
        "merge",
        View(stacked=True),
        shape="stack",
        note="stacked experts",
    ),
    Rule(action="average", shape="depthwise", note="depthwise convolution; ask for `view: {groups: ...}` to merge it"),
    Rule(
        r"(^|\.)query_key_value\.weight$",
        "merge",
        View(),
        note="fused, with the heads interleaved: merged whole; cut it with `view: {blocks: 3}` only if it is [q; k; v]",
    ),
    Rule(
        _FUSED,
        "merge",
        View(),
        model_types=("gpt_bigcode", "codegen"),
        known=True,
        note="fused, with the heads interleaved in this model type: merged whole",
    ),
    Rule(_FUSED, "merge", View(blocks=3), shape="three_in_rows", note="fused [q; k; v]"),
    Rule(
        _CONV1D_FUSED,
        "merge",
        View(transpose=True, blocks=3),
        model_types=CONV1D_TYPES,
        shape="three_in_columns",
        note="fused [q, k, v] in a Conv1D, stored (in, out)",
    ),
    Rule(
        _CONV1D,
        "merge",
        View(transpose=True),
        model_types=CONV1D_TYPES,
        shape="matrix",
        note="Conv1D, stored (in, out)",
    ),
    Rule(
        r"(^|\.)(visual\.proj|text_projection)$",
        "merge",
        View(transpose=True),
        shape="matrix",
        note="CLIP projection, stored (in, out)",
    ),
    Rule(
        _FUSED,
        "merge",
        View(),
        note="fused, but d_out is not 3*d_in: merged whole; give the heights, `view: {rows: [...]}`, to split it",
    ),
    Rule(action="merge", shape="matrix", note="matrix"),
    Rule(action="merge", shape="kernel", note="convolution"),
    Rule(action="average", note="none of the known shapes"),
)


@dataclass(frozen=True)
class Treatment:
    """The decision of a table about one tensor.

    Args:
        action: Merged, averaged, or kept from the base.
        view: For merged tensors, the matrices it is seen as.
        reason: Note or text of the rule that decided.
    """

    action: Action
    view: View | None
    reason: str

    @override
    def __str__(self) -> str:
        return f"{self.action}{'' if self.view is None else f', {self.view}'} ({self.reason})"


@dataclass(frozen=True)
class RuleTable:
    """Rules in order of precedence.

    Args:
        rules: The first rule that applies to a tensor decides.

    >>> import torch
    >>> info = TensorInfo("h.0.attn.c_attn.weight", (4, 12), torch.float32)
    >>> print(DEFAULT_RULES.treat(info, "gpt2"))
    merge, transposed, split into 3 equal row blocks (fused [q, k, v] in a Conv1D, stored (in, out))
    """

    rules: tuple[Rule, ...]

    def treat(self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = ()) -> Treatment:
        """Decide what happens to a tensor.

        Args:
            info: Header of the tensor.
            model_type: Value of ``model_type`` in the config; None if there is no config.
            aliases: Further names of a tied tensor: a rule applies if any of the names matches.

        Returns:
            The treatment, with its reason.

        Raises:
            ValueError: If no rule applies, or the deciding rule asks for a view that the shape does not allow.
        """
        if not info.dtype.is_floating_point:
            kind = str(info.dtype).removeprefix("torch.")
            return Treatment("base", None, f"{kind} buffer: the base's, whatever the rules say")
        rule = self.deciding(info, model_type, aliases)
        if rule is None:
            raise ValueError(
                f"tensor {info.name!r}: no rule applies. Extend `DEFAULT_RULES`, which covers every tensor."
            )
        reason = rule.note or f"rule {{match: {rule.match!r}, action: {rule.action}}}"
        if rule.action != "merge":
            return Treatment(rule.action, None, reason)
        applying = (r for r in self.rules if r.action == "merge" and r.applies((info.name, *aliases), info, model_type))
        view = next((r.view for r in applying if r.view is not None), View())
        try:
            return Treatment("merge", view.fitted(info.shape), reason)
        except ValueError as error:
            raise ValueError(f"tensor {info.name!r}: {reason} merges it, but {error}.") from error

    def deciding(self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = ()) -> Rule | None:
        """The first rule that applies to a tensor, or None; for the arguments see :meth:`treat`."""
        names = (info.name, *aliases)
        return next((rule for rule in self.rules if rule.applies(names, info, model_type)), None)

    def extended(self, rules: Iterable[Rule | Mapping[str, Any]]) -> RuleTable:
        """Put rules before those of this table.

        Args:
            rules: Objects, or mappings as :meth:`Rule.from_dict` takes them.

        Returns:
            A new table.

        Raises:
            ValueError: If a rule is malformed; the message says which.
        """
        made = list(self.rules)
        for position, rule in enumerate(rules):
            try:
                made.insert(position, rule if isinstance(rule, Rule) else Rule.from_dict(rule))
            except ValueError as error:
                raise ValueError(f"rules[{position}]: {error}") from error
        return RuleTable(tuple(made))

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rules as plain values, in order."""
        return [rule.to_dict() for rule in self.rules]

    @classmethod
    def from_dicts(cls, rules: Iterable[Mapping[str, Any]]) -> RuleTable:
        """The table of plain values as :meth:`to_dicts` gives them; malformed ones raise a ``ValueError``."""
        return cls(()).extended(rules)

    @override
    def __repr__(self) -> str:
        return f"RuleTable({len(self.rules)} rules)"


DEFAULT_RULES = RuleTable(_DEFAULTS)
"""The defaults, which cover every tensor."""


def model_type_of(checkpoint: Checkpoint) -> str | None:
    """The ``model_type`` of a checkpoint as far as the rules need it, or None if nothing says it.

    A composite model (an encoder with a GPT-2 decoder) counts as the part that the rules treat specially. Without a
    config, GPT-2 and models that use its names for linear layers (nanoGPT, GPT-Neo) differ in how the first MLP matrix
    lies: (d, 4d) in a Conv1D, (4d, d) in a linear layer.
    """
    special = {name for rule in _DEFAULTS for name in rule.model_types}
    config = checkpoint.config or {}
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    types = [part["model_type"] for part in parts if isinstance(part.get("model_type"), str)]
    if types:
        return next((name for name in types if name in special), types[0])
    for name, info in checkpoint.tensors.items():
        if name.endswith((".mlp.c_fc.weight", ".attn.c_attn.weight")) and ".h." in f".{name}" and len(info.shape) == 2:
            return CONV1D_TYPES[0] if info.shape[0] < info.shape[1] else "linear layers with GPT-2's names"
    return None
