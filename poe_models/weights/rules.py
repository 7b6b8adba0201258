"""One rule of the table: which tensors it is about, and what it does with them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from poe_models.weights.checkpoint import TensorInfo
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
    """What to do with the tensors whose name, shape and model type fit.

    Args:
        match: regular expression, searched for anywhere in the tensor's name.
        action: `"merge"` by the product of experts, `"average"` the experts' updates, or keep the `"base"`.
        view: how a merged tensor is seen as matrices; None leaves that to the first later rule that says it.
        model_types: `model_type` of the config; empty for any. A model without a config fits too, unless `known`.
        shape: condition on the shape. `"vector"` fewer than two axes (or all but one of length 1, from three axes on);
            `"matrix"` two axes; `"stack"` three; `"kernel"` three to five; `"depthwise"` a kernel with one input
            channel and several outputs; `"three_in_rows"` d_out = 3 d_in; `"three_in_columns"` the transpose of it.
        known: the model type must be known to be one of `model_types`.
        note: what the tensors are, for the reason that `plan` prints.

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
        try:
            re.compile(self.match)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`Rule(match={self.match!r})`: not a regular expression ({error}). Escape special characters with a "
                "backslash."
            ) from error
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
        """Say whether the rule is about a tensor.

        Args:
            names: all names of the tensor (several if it is tied).
            info: its header.
            model_type: `model_type` of the config, or None if there is no config.

        Returns:
            Whether name, shape and model type fit.
        """
        typed = not self.model_types or model_type in self.model_types or (model_type is None and not self.known)
        return typed and _SHAPES[self.shape](info.shape) and any(re.search(self.match, name) for name in names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rule:
        """Make a rule from plain values, such as an entry of a YAML file.

        Args:
            values: `match` and `action`, and optionally the other arguments; `view` as a mapping of `View`'s arguments,
                `{}` to see a matrix as it is.

        Returns:
            The rule.

        Raises:
            ValueError: for an unknown key (naming the nearest valid one) or a value of a wrong type.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"rule {values!r}: expected a mapping such as {{match: lm_head, action: base}}.")
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        _known_keys("rule", values, tuple(field.name for field in dataclasses.fields(cls)))
        for key in ("match", "action"):
            if key not in values:
                raise ValueError(
                    f"rule {dict(values)}: `{key}` is missing. Write for instance {{match: lm_head, action: base}}."
                )
        if "model_types" in known:
            known["model_types"] = _typed_tuple("model_types", known["model_types"], str)
        if known.get("view") is not None:
            known["view"] = _view_from_dict(known["view"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` takes back.

        Returns:
            `match`, `action`, and what differs from the defaults.
        """
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

RULES: tuple[Rule, ...] = (
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
