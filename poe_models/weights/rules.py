r"""Rules for parameters: which are merged (seen as which matrices), averaged, or kept from the base.

One table serves every method, so that methods are compared on the same footing. The first rule that applies to a tensor
decides, and a user's rules go before the defaults:

    DEFAULT_RULES.extended([{"match": "lm_head", "action": "base"},
                            {"match": r"qkv_proj\.weight", "action": "merge", "view": {"rows": [4096, 1024, 1024]}}])

By default (``DEFAULT_RULES``) matrices and convolutions are merged; GPT-2's Conv1D is transposed; fused projections
``in_proj_weight``, ``c_attn`` and ``qkv`` are split into [q; k; v] where d_out = 3*d_in; stacked 3-D experts are a
batch of matrices; embeddings, biases, norms (LayerNorm and the others) and scalars are averaged. Only the shape can say
that a convolution is grouped, and only of depthwise ones: shape[1] = 1 with several outputs, which a first layer on
grey images has too. Those are averaged unless a rule merges them. ``ALL_TENSORS`` merges what these average as well,
each tensor as one row: methods that act entry by entry were published so. Integer, bool and complex tensors, and those
without entries, always stay the base's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from typing_extensions import override

from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.rule import SHAPES, Action, Precedence, Rule
from poe_models.weights.views import View

_TOKENS = r"(^|\.)(wte|shared|embed_in|embed_tokens|tok\w*_embed\w*|tokens_embed|word_embed\w*|embeddings)\.weight$"
# Model types whose linear layers are Conv1D, stored (in, out).
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D = r"(^|\.)(h|layers)\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$"
# Model types whose stacked experts are stored (expert, in, out).
_IN_OUT_EXPERTS = ("llama4", "llama4_text", "gpt_oss", "openai_privacy_filter", "aria", "aria_text")
_CONV1D_FUSED = r"(^|\.)h\.\d+\.attn\.c_attn\.weight$"
_FUSED = r"(^|\.)(in_proj_weight|((c_attn|qkv|qkv_proj|Wqkv|to_qkv|att_proj)\.weight))$"
_EMBEDDING = (
    r"(^|\.)(wte|wpe|shared|embs?|embed|embed_in|\w*embed_tokens|\w*embed_positions|relative_attention_bias|\w*pos_emb"
    r"|\w*(tokens|positions|pos|query|level|class|cls|label|seg|segment|mask|char|codec|point|tgt|freq)_emb(ed)?"
    r"|emb_layers\.\d+|(?!\w*patch)\w*embeddings?)(\.weight)?$"
)
# Input and output features of these gated projections are one tensor, gate above up (or up above gate).
_GATE_UP = r"(^|\.)(gate_up_proj|gate_and_up_proj|up_gate_proj|w1w3|w13|fused_gate_up)(\.weight)?$"
_GATE_UP_BY_TYPE = (
    r"(^|\.)(mlp\.Wi|shared_mlp\.input_linear|block_sparse_moe\.input_linear|dense_h_to_4h|mlp\.weights_in"
    r"|ff_proj)\.weight$"
)
_GATE_UP_TYPES = (
    *("modernbert", "modernbert-decoder", "granitemoe", "granitemoeshared", "granitemoehybrid", "jetmoe", "chatglm"),
    *("granitemoe_swa", "dinov2", "dinov2_with_registers", "olmo", "hf_olmo"),
)
# Masks and position tables that a model computes; learned ones (mask_token, mask_emb) are parameters.
_MASK = r"(^|\.)(\w*_mask|mask|masked_bias|IGNORE|causal|tril|triu)$"
_ATTENTION_MASK = r"(^|\.)(attn|attention)\.bias$"
_MASK_NOTE = "mask: no weights"
_STATE_SPACE = (
    r"(^|\.)(A_logs?|log_A\w*|A_(real|imag)|dt_bias|time_(decay|first|faaaa|mix\w*|maa\w*)|conv_state|ssm_state)$"
)

_DEFAULTS: tuple[Rule, ...] = (
    Rule(_MASK, "base", note=_MASK_NOTE),
    Rule(_ATTENTION_MASK, "base", shape="square_mask", note=_MASK_NOTE),
    Rule(action="average", shape="vector", note="bias, norm, running statistic or scalar: fewer than two axes"),
    Rule(r"(^|[._])bias$", "average", note="bias"),
    Rule(_EMBEDDING, "average", note="embedding"),
    Rule(r"(^|\.)w\.weight$", "average", model_types=("ctrl",), known=True, note="embedding"),
    Rule(r"(^|\.)\w+_tokens?$", "average", note="learned token"),
    Rule(r"(^|\.)relative_position_bias_table$", "average", note="position bias"),
    Rule(_STATE_SPACE, "average", note="state-space parameter, entry by entry"),
    Rule(r"(^|\.)rel(_attn|ative_attention)?\.r_\w_bias$|(^|\.)r_[wrs]_bias$", "average", note="bias"),
    Rule(
        r"(^|\.)rel_attn\.[qkvr]$|(^|\.)r_kernel$|(^|\.)(query|key|value)\.kernel$",
        "merge",
        View(heads=True),
        shape="stack",
        note="projection to heads, stored (in, head, dim)",
    ),
    Rule(
        r"(^|\.)(input|recurrent)_gate_weight$",
        "merge",
        View(stacked=True, transpose=True),
        shape="stack",
        note="block-diagonal projection, stored (head, in, out)",
    ),
    Rule(
        r"(^|\.)experts\.mlp\.(w1|v1|w2)$",
        "merge",
        View(),
        model_types=("dbrx",),
        shape="matrix",
        known=True,
        note="experts stacked in the rows: merged whole; cut them with `view: {blocks: NUMBER_OF_EXPERTS}`",
    ),
    Rule(r"(^|\.)(\w*norm\w*|ln(_\w+)?|\w+_ln)\.weight$", "average", note="norm"),
    Rule(
        r"experts\.gate_up_proj$",
        "merge",
        View(stacked=True, transpose=True),
        model_types=("gpt_oss", "openai_privacy_filter"),
        shape="stack",
        known=True,
        note="stacked experts stored (expert, in, out), gate and up in turn: merged whole",
    ),
    Rule(
        r"experts\.gate_up_proj$",
        "merge",
        View(stacked=True, transpose=True, blocks=2),
        model_types=_IN_OUT_EXPERTS,
        shape="stack",
        known=True,
        note="stacked experts stored (expert, in, out), fused [gate; up]",
    ),
    Rule(
        r"experts\b",
        "merge",
        View(stacked=True, transpose=True),
        model_types=_IN_OUT_EXPERTS,
        shape="stack",
        known=True,
        note="stacked experts stored (expert, in, out)",
    ),
    Rule(
        rf"experts\b.*gate_up_proj|{_GATE_UP_BY_TYPE}",
        "merge",
        View(stacked=True, blocks=2),
        shape="even_stack",
        note="stacked experts, fused [gate; up]",
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
    Rule(_GATE_UP, "merge", View(blocks=2), shape="even_rows", note="fused [gate; up]"),
    Rule(
        _GATE_UP_BY_TYPE,
        "merge",
        View(blocks=2),
        model_types=_GATE_UP_TYPES,
        shape="even_rows",
        known=True,
        note="fused [gate; up]",
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
    Rule(action="merge", view=View(), shape="matrix", note="matrix"),
    Rule(action="merge", view=View(), shape="kernel", note="convolution"),
    Rule(action="average", note="none of the known shapes"),
)


_OURS = frozenset(rule.match for rule in _DEFAULTS)  # none of them asks which layer it is


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

    def treat(
        self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = (), *, first: bool = False
    ) -> Treatment:
        """Decide what happens to a tensor.

        Args:
            info: Header of the tensor.
            model_type: Value of ``model_type`` in the config; None if there is no config.
            aliases: Further names of a tied tensor: a rule applies if any of the names matches.
            first: It is the convolution that sees the input (``first_convolution``), and not depthwise.

        Returns:
            The treatment, with its reason.

        Raises:
            ValueError: If no rule applies, or the deciding rule asks for a view that the shape does not allow.
        """
        if unchangeable(info):
            kind = str(info.dtype).removeprefix("torch.")
            reason = EMPTY if 0 in info.shape else f"{kind} buffer: the base's, whatever the rules say"
            return Treatment("base", None, reason)
        rule = self.deciding(info, model_type, aliases, first=first)
        if rule is None:
            raise ValueError(
                f"tensor {info.name!r}: no rule applies. Extend `DEFAULT_RULES`, which covers every tensor."
            )
        reason = rule.note or f"rule {{match: {rule.match!r}, action: {rule.action}}}"
        if rule.action != "merge":
            return self._shared(rule.action, None, info.shape, reason)
        later = (r for r in self.rules if r.view is not None and r.applies((info.name, *aliases), info, model_type))
        view = rule.view or next((r.view for r in later), None) or View()
        try:
            return self._shared("merge", view, info.shape, reason)
        except ValueError as error:
            raise ValueError(f"tensor {info.name!r}: {reason} merges it, but {error}.") from error

    def _shared(self, action: Action, view: View | None, shape: tuple[int, ...], reason: str) -> Treatment:
        """The treatment of all tensors of a shape that are treated alike: one object for many."""
        key = (action, view, shape, reason)
        if key not in self._treatments:
            self._treatments[key] = Treatment(action, None if view is None else view.fitted(shape), reason)
        return self._treatments[key]

    @cached_property
    def _treatments(self) -> dict[tuple[object, ...], Treatment]:
        return {}

    def deciding(
        self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = (), *, first: bool = False
    ) -> Rule | None:
        """The first rule that applies to a tensor, or None; for the arguments see :meth:`treat`."""
        kind, names = (info.shape, model_type, first), (info.name, *aliases)
        if kind not in self._fitting:
            fitting = [rule for rule in self.rules if rule.fits(info, model_type)]
            rules = [rule for rule in fitting if not (first and rule.shape == "depthwise")]
            self._fitting[kind] = Precedence(rules, _OURS)
        return self._fitting[kind].deciding(names)

    @cached_property
    def _fitting(self) -> dict[tuple[tuple[int, ...], str | None, bool], Precedence]:
        """The rules for each shape and model type that was asked about: a model has many tensors of few shapes."""
        return {}

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


def unchangeable(info: TensorInfo) -> bool:
    """Whether a tensor stays the base's whatever the rules say: without entries, or not of floating-point numbers."""
    return 0 in info.shape or not info.dtype.is_floating_point


DEFAULT_RULES = RuleTable(_DEFAULTS)
"""The defaults, which cover every tensor."""

UNTOUCHED = "no adapter changes it"
EMPTY = "no entries"
NO_WEIGHTS = (_MASK_NOTE, UNTOUCHED, EMPTY)
"""Reasons for keeping the base's floating tensor that do not shorten what is merged."""

_VECTOR = View(vector=True)
ALL_TENSORS = RuleTable(
    tuple(replace(rule, action="merge", view=_VECTOR) if rule.action == "average" else rule for rule in _DEFAULTS)
)
"""The defaults with embeddings, biases, norms and scalars merged, too, each seen as one row."""


_DEPTHWISE = re.compile(r"depth_?wise|dw|conv1d|mixer|separable", re.IGNORECASE)


def first_convolution(checkpoint: Checkpoint) -> str | None:
    """The convolution with one input channel that sees the input itself, grey images or sound; None without one.

    Where another convolution has the two to four channels of an image, or there is an embedding of tokens, the input
    comes in there, and kernels with one input channel are depthwise.
    """
    kernels = {
        name: info.shape
        for name, info in checkpoint.tensors.items()
        if info.dtype.is_floating_point and 3 <= len(info.shape) <= 5 and not SHAPES["vector"](info.shape)
    }
    grey = [name for name, shape in kernels.items() if shape[1] == 1 and not _DEPTHWISE.search(name)]
    if not grey or any(1 < shape[1] <= 4 for shape in kernels.values()):
        return None
    if any(re.search(_TOKENS, name) for name in checkpoint.tensors):
        return None
    return min(grey, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that counts: ``layers.10`` after ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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
