"""The default rules: what happens to each kind of tensor when the user says nothing.

Embeddings, biases, norms and scalars are averaged, as in [PoE] (Bui et al., 2026); weights of linear and convolutional
layers are merged. The first rule that applies decides.
"""

from __future__ import annotations

from poe_models._rules import Rule
from poe_models.views import View

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
