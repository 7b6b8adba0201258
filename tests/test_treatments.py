"""Views of tensors as matrices, and the default treatment of every kind of tensor."""

from __future__ import annotations

import pytest
import torch

from poe_models.weights.loading import MemoryCheckpoint, TensorInfo
from poe_models.weights.rules import DEFAULT_RULES, View, first_convolution
from poe_models.weights.task_vectors import TaskVectors

VIEWS: list[tuple[View, tuple[int, ...], list[tuple[int, int]], str]] = [
    (View(), (5, 3), [(5, 3)], "as it is"),
    (View(transpose=True), (5, 3), [(3, 5)], "transposed"),
    (View(), (4, 3, 2, 2), [(4, 12)], "conv flattened (out, in*kh*kw)"),
    (View(), (4, 3, 2), [(4, 6)], "conv flattened (out, in*kh*kw)"),
    (View(), (4, 3, 2, 1, 2), [(4, 12)], "conv flattened (out, in*kh*kw)"),
    (View(transpose=True), (4, 3, 2, 2), [(3, 16)], "transposed, conv flattened (out, in*kh*kw)"),
    (View(blocks=3), (6, 2), [(2, 2)] * 3, "split into 3 equal row blocks"),
    (View(blocks=3, transpose=True), (2, 6), [(2, 2)] * 3, "transposed, split into 3 equal row blocks"),
    (View(rows=(4, 1, 1)), (6, 2), [(4, 2), (1, 2), (1, 2)], "split into row blocks of 4, 1, 1"),
    (View(height=2), (5, 3), [(2, 3), (2, 3), (1, 3)], "row blocks of 2 rows"),
    (View(height=8), (5, 3), [(5, 3)], "row blocks of 8 rows"),
    (View(square=True), (7, 3), [(3, 3), (3, 3), (1, 3)], "square row blocks of height d_in"),
    (View(square=True), (6, 3), [(3, 3), (3, 3)], "square row blocks of height d_in"),
    (View(square=True), (2, 5), [(2, 5)], "square row blocks of height d_in"),
    (View(groups=2), (6, 2, 3, 3), [(3, 18)] * 2, "conv flattened (out, in*kh*kw), per group (2 groups)"),
    (View(stacked=True), (3, 4, 2), [(4, 2)] * 3, "stacked: a batch of matrices"),
    (View(heads=True), (5, 2, 3), [(6, 5)], "heads flattened (head*dim, in)"),
    (View(stacked=True, transpose=True), (2, 4, 3), [(3, 4)] * 2, "stacked: a batch of matrices, transposed"),
    (
        View(stacked=True, rows=(1, 3)),
        (2, 4, 3),
        [(1, 3), (3, 3)] * 2,
        "stacked: a batch of matrices, split into row blocks of 1, 3",
    ),
    (View(stacked=True), (2, 4, 3, 2), [(4, 6)] * 2, "stacked: a batch of matrices, conv flattened (out, in*kh*kw)"),
]


@pytest.mark.parametrize(("view", "shape", "blocks", "text"), VIEWS)
@pytest.mark.parametrize("strided", [False, True])
def test_join_is_the_exact_inverse_of_split(
    view: View, shape: tuple[int, ...], blocks: list[tuple[int, int]], text: str, strided: bool
) -> None:
    fitted = view.fitted(shape)
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    if strided:
        tensor = tensor.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    parts = fitted.split(tensor)
    assert [tuple(part.shape) for part in parts] == fitted.block_shapes(shape) == blocks
    assert sum(part.numel() for part in parts) == tensor.numel()
    joined = fitted.join(parts, shape)
    assert torch.equal(joined, tensor)
    assert joined.is_contiguous()
    assert joined.data_ptr() != tensor.data_ptr()
    assert str(fitted) == text


def test_what_the_views_mean() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    (matrix,) = View(transpose=True).fitted((6, 4)).split(weight)
    assert torch.equal(matrix @ x.T, (x @ weight).T)  # Conv1D computes x W with W (in, out)

    query, key, value = View(blocks=3).fitted((6, 2)).split(weight.reshape(6, 4)[:, :2])
    assert torch.equal(torch.cat([query, key, value]), weight[:, :2])

    kernel = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    patch = torch.randn(2, 2, 2, dtype=torch.float64)
    (matrix,) = View().fitted(kernel.shape).split(kernel)
    torch.testing.assert_close(matrix @ patch.flatten(), torch.conv2d(patch[None], kernel).flatten())

    heads = torch.randn(6, 2, 3, dtype=torch.float64)  # XLNet: einsum("ih,hnd->ind")
    (matrix,) = View(heads=True).fitted(heads.shape).split(heads)
    torch.testing.assert_close(matrix @ x.T, torch.einsum("ih,hnd->ind", x, heads).flatten(1).T)

    grouped = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    pixels = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    top, bottom = View(groups=2).fitted(grouped.shape).split(grouped)
    expected = torch.conv2d(pixels, grouped, groups=2).flatten()
    torch.testing.assert_close(torch.cat([top @ pixels[0, :2, 0, 0], bottom @ pixels[0, 2:, 0, 0]]), expected)


@pytest.mark.parametrize(("view", "shape", "blocks", "text"), [case for case in VIEWS if case[0].has_factors])
def test_factors_are_split_like_their_product(
    view: View, shape: tuple[int, ...], blocks: list[tuple[int, int]], text: str, generator: torch.Generator
) -> None:
    if view.transpose and len(shape) > 2:
        with pytest.raises(ValueError, match="no two factors"):
            view.fitted(shape).split_factors(torch.zeros(4, 1), torch.zeros(1, 12))
        return
    columns = torch.Size(shape).numel() // shape[0]
    left = torch.randn(shape[0], 2, generator=generator, dtype=torch.float64)
    right = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    fitted = view.fitted(shape)
    pairs = fitted.split_factors(left, right)
    assert [(b.shape[0], a.shape[1]) for b, a in pairs] == blocks
    for (b, a), block in zip(pairs, fitted.split((left @ right).reshape(shape)), strict=True):
        torch.testing.assert_close(b @ a, block)


@pytest.mark.parametrize(
    ("tensors", "first"),
    [
        ({"conv1.weight": (6, 1, 5, 5), "conv2.weight": (16, 6, 5, 5)}, "conv1.weight"),
        ({"features.0.0.weight": (8, 1, 3, 3), "features.1.0.weight": (8, 1, 3, 3)}, "features.0.0.weight"),
        ({"features.10.weight": (8, 1, 3, 3), "features.9.weight": (8, 1, 3, 3)}, "features.9.weight"),
        (
            {"encoder.depthwise.weight": (8, 1, 31), "feature_extractor.0.weight": (8, 1, 10)},
            "feature_extractor.0.weight",
        ),
        ({"stem.weight": (8, 3, 3, 3), "block.weight": (8, 1, 3, 3)}, None),
        ({"embed_tokens.weight": (50, 8), "layers.0.conv.weight": (8, 1, 3)}, None),
    ],
)
def test_the_convolution_that_sees_grey_images_is_not_depthwise(
    tensors: dict[str, tuple[int, ...]], first: str | None
) -> None:
    assert first_convolution(MemoryCheckpoint({name: torch.zeros(shape) for name, shape in tensors.items()})) == first
    for name, shape in tensors.items():
        treated = DEFAULT_RULES.treat(TensorInfo(name, shape, torch.float32), first=name == first)
        assert treated.action == ("average" if shape[1] == 1 and name != first or "embed" in name else "merge")


def test_views_that_do_not_fit_say_why() -> None:
    for view, shape, words in [
        (View(), (5,), r"shape \(5,\) is not a matrix"),
        (View(stacked=True), (5, 2), r"shape \(5, 2\) is not a stack of matrices"),
        (View(blocks=3), (7, 2), r"7 rows cannot be cut into 3 equal row blocks"),
        (View(groups=2), (5, 2, 3, 3), r"5 rows cannot be cut into 2 groups"),
        (View(rows=(4, 2)), (7, 2), r"\(4, 2\) sum to 6, the matrix has 7 rows"),
    ]:
        with pytest.raises(ValueError, match=words):
            view.fitted(shape)
    for wrong, words in [
        ({"blocks": 2, "square": True}, "blocks and square are two ways"),
        ({"blocks": 0}, "below 1"),
        ({"rows": (3, 0)}, "height below 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            View(**wrong)
    with pytest.raises(ValueError, match="Give the blocks as `split` returned them"):
        View(blocks=2).fitted((4, 2)).join([torch.zeros(4, 2)], (4, 2))


THIRDS = "split into 3 equal row blocks"


HALVES = "split into 2 equal row blocks"


DEFAULTS: list[tuple[str, tuple[int, ...], str | None, str, str | None]] = [
    # Conv1D and its namesakes
    ("transformer.h.0.attn.c_attn.weight", (8, 24), "gpt2", "merge", f"transposed, {THIRDS}"),
    ("h.0.attn.c_attn.weight", (8, 24), None, "merge", f"transposed, {THIRDS}"),
    ("transformer.h.11.attn.c_proj.weight", (8, 8), "gpt2", "merge", "transposed"),
    ("transformer.h.0.mlp.c_fc.weight", (8, 32), "gpt2", "merge", "transposed"),
    ("transformer.h.0.mlp.c_fc.weight", (8, 32), None, "merge", "transposed"),
    ("transformer.h.0.crossattention.c_attn.weight", (8, 16), "gpt2", "merge", "transposed"),
    ("transformer.h.0.crossattention.q_attn.weight", (8, 8), "gpt2", "merge", "transposed"),
    ("lm_head.weight", (50, 8), "gpt2", "merge", "as it is"),
    ("h.0.attn.bias", (1, 1, 16, 16), "gpt2", "base", None),
    ("transformer.h.0.attn.attention.bias", (1, 1, 16, 16), "gpt_neo", "base", None),
    ("h.0.attn.bias", (1, 2, 16, 16), None, "average", None),
    # fused, stacked, state-space parameters and embeddings by other names
    ("encoder.layer.0.mlp.weights_in.weight", (32, 8), "dinov2", "merge", HALVES),
    ("encoder.layer.0.mlp.up_gate_proj.weight", (32, 8), "new", "merge", HALVES),
    ("model.transformer.blocks.0.ff_proj.weight", (32, 8), "olmo", "merge", HALVES),
    ("model.transformer.blocks.0.att_proj.weight", (24, 8), "olmo", "merge", THIRDS),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (32, 8), "dbrx", "merge", "as it is"),
    (
        "layers.0.temporal_block.rg_lru.input_gate_weight",
        (2, 4, 4),
        "recurrent_gemma",
        "merge",
        "stacked: a batch of matrices, transposed",
    ),
    ("encoder.query.kernel", (8, 2, 4), None, "merge", "heads flattened (head*dim, in)"),
    ("layers.0.log_A_real", (8, 4), None, "average", None),
    ("layers.0.A_imag", (8, 4), None, "average", None),
    ("w.weight", (50, 8), "ctrl", "average", None),
    ("w.weight", (50, 8), None, "merge", "as it is"),
    ("word_emb.emb_layers.0.weight", (50, 8), "transfo-xl", "average", None),
    ("transformer.h.0.attn.c_attn.weight", (10, 8), "gpt_bigcode", "merge", "as it is"),
    ("transformer.h.0.attn.c_attn.weight", (24, 8), "gpt_bigcode", "merge", "as it is"),
    ("transformer.h.0.attn.c_proj.weight", (8, 8), "gpt_bigcode", "merge", "as it is"),
    ("transformer.h.0.mlp.c_fc.weight", (32, 8), "gpt_bigcode", "merge", "as it is"),
    ("transformer.h.0.attn.c_attn.weight", (24, 8), None, "merge", THIRDS),
    ("transformer.h.0.attn.c_attn.weight", (24, 8), "qwen", "merge", THIRDS),
    ("visual.transformer.resblocks.0.mlp.c_fc.weight", (32, 8), None, "merge", "as it is"),
    ("transformer.resblocks.0.mlp.c_proj.weight", (8, 32), None, "merge", "as it is"),
    # fused projections
    ("visual.transformer.resblocks.0.attn.in_proj_weight", (24, 8), None, "merge", THIRDS),
    ("blocks.0.attn.qkv.weight", (24, 8), None, "merge", THIRDS),
    ("model.layers.0.self_attn.qkv_proj.weight", (24, 8), "phi3", "merge", THIRDS),
    ("model.layers.0.self_attn.qkv_proj.weight", (12, 8), "phi3", "merge", "as it is"),  # 12 = 3 * 4, but not thirds
    ("transformer.h.0.attn.qkv_proj.weight", (24, 8), "codegen", "merge", "as it is"),
    ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8), "gpt_neox", "merge", "as it is"),
    ("h.0.self_attention.query_key_value.weight", (24, 8), None, "merge", "as it is"),
    # matrices
    ("encoder.layer.0.attention.self.query.weight", (8, 8), "bert", "merge", "as it is"),
    ("patch_embed.proj.weight", (8, 3), None, "merge", "as it is"),
    ("time_embedding.linear_1.weight", (8, 3), None, "merge", "as it is"),
    ("blocks.0.norm1.linear.weight", (8, 3), None, "merge", "as it is"),
    ("mixer.experts.3.w1.weight", (8, 3), "mixtral", "merge", "as it is"),
    ("visual.proj", (8, 4), None, "merge", "transposed"),
    ("text_projection", (8, 4), None, "merge", "transposed"),
    ("text_projection.weight", (8, 4), "clip", "merge", "as it is"),
    # convolutions
    ("features.0.weight", (8, 3, 3, 3), None, "merge", "conv flattened (out, in*kh*kw)"),
    ("vision_model.embeddings.patch_embedding.weight", (8, 3, 4, 4), "clip", "merge", "conv flattened (out, in*kh*kw)"),
    ("encoder.conv1.weight", (8, 3, 3), "whisper", "merge", "conv flattened (out, in*kh*kw)"),
    ("video.weight", (8, 3, 2, 3, 3), None, "merge", "conv flattened (out, in*kh*kw)"),
    ("features.1.depthwise.weight", (8, 1, 3, 3), None, "average", None),
    ("mixer.conv1d.weight", (8, 1, 4), "mamba", "average", None),
    # stacked experts
    (
        "model.layers.0.mlp.experts.gate_up_proj",
        (4, 16, 8),
        "mixtral",
        "merge",
        f"stacked: a batch of matrices, {HALVES}",
    ),
    ("layers.0.experts.down_proj", (4, 8, 16), None, "merge", "stacked: a batch of matrices"),
    (
        "layers.0.block_sparse_moe.input_linear.weight",
        (4, 8, 16),
        "granitemoe",
        "merge",
        f"stacked: a batch of matrices, {HALVES}",
    ),
    (
        "layers.0.block_sparse_moe.output_linear.weight",
        (4, 8, 16),
        "granitemoe",
        "merge",
        "stacked: a batch of matrices",
    ),
    ("layers.0.shared_mlp.input_linear.weight", (32, 8), "granitemoehybrid", "merge", HALVES),
    ("model.layers.0.mlp.gate_up_proj.weight", (32, 8), "phi3", "merge", HALVES),
    ("layers.0.mlp.Wi.weight", (32, 8), "modernbert", "merge", HALVES),
    ("layers.0.mlp.Wi.weight", (32, 8), "another", "merge", "as it is"),
    (
        "layers.0.feed_forward.experts.gate_up_proj",
        (4, 8, 32),
        "llama4",
        "merge",
        f"stacked: a batch of matrices, transposed, {HALVES}",
    ),
    ("layers.0.mlp.experts.fc1.weight", (4, 8, 32), "aria", "merge", "stacked: a batch of matrices, transposed"),
    ("conditioning_encoder.layers.0.mlp.c_fc.weight", (8, 32), "clvp", "merge", "transposed"),
    ("transformer.layer.0.rel_attn.q", (8, 2, 4), "xlnet", "merge", "heads flattened (head*dim, in)"),
    ("transformer.layer.0.rel_attn.o", (8, 2, 4), "xlnet", "merge", "conv flattened (out, in*kh*kw)"),
    # kept
    ("blocks.0.attn_mask", (4, 16, 16), "swin", "base", None),
    ("blocks.0.attn.IGNORE", (), None, "base", None),
    ("fc.weight", (0, 8), None, "base", None),
    ("layers.0.mlp.experts.gate_up_proj", (4, 8, 16), "gpt_oss", "merge", "stacked: a batch of matrices, transposed"),
    # averaged
    ("tokens_embed.weight", (50, 8), "openai-gpt", "average", None),
    ("positions_embed.weight", (50, 8), "openai-gpt", "average", None),
    ("transformer.word_embedding.weight", (50, 8), "xlnet", "average", None),
    ("transformer.layer.0.rel_attn.seg_embed", (2, 2, 4), "xlnet", "average", None),
    ("transformer.layer.0.rel_attn.r_w_bias", (2, 4), "xlnet", "average", None),
    ("mask_token", (1, 1, 8), "vit", "average", None),
    ("layers.0.mixer.A_log", (16, 8), "mamba", "average", None),
    ("wte.weight", (50, 8), "gpt2", "average", None),
    ("transformer.wpe.weight", (50, 8), "gpt2", "average", None),
    ("bert.embeddings.word_embeddings.weight", (50, 8), "bert", "average", None),
    ("bert.embeddings.position_embeddings.weight", (50, 8), "bert", "average", None),
    ("bert.embeddings.token_type_embeddings.weight", (2, 8), "bert", "average", None),
    ("model.embed_tokens.weight", (50, 8), "llama", "average", None),
    ("shared.weight", (50, 8), "t5", "average", None),
    ("gpt_neox.embed_in.weight", (50, 8), "gpt_neox", "average", None),
    ("token_embedding.weight", (50, 8), None, "average", None),
    ("positional_embedding", (77, 8), None, "average", None),
    ("class_embedding", (8,), None, "average", None),
    ("pos_embed", (1, 17, 8), None, "average", None),
    ("embeddings.position_embeddings", (1, 17, 8), "vit", "average", None),
    ("cls_token", (1, 1, 8), None, "average", None),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "t5", "average", None),
    ("layers.0.attn.relative_position_bias_table", (169, 4), "swin", "average", None),
    ("fc.bias", (8,), None, "average", None),
    ("attn.in_proj_bias", (24,), None, "average", None),
    ("ln_1.weight", (8,), None, "average", None),
    ("q_norm.weight", (4, 8), None, "average", None),
    ("ln_pre.weight", (8,), None, "average", None),
    ("bn1.running_mean", (8,), None, "average", None),
    ("bn1.running_var", (8,), None, "average", None),
    ("logit_scale", (), None, "average", None),
    ("odd", (2, 2, 2, 2, 2, 2), None, "average", None),
]


@pytest.mark.parametrize(("name", "shape", "model_type", "action", "view"), DEFAULTS)
def test_default_treatments(
    name: str, shape: tuple[int, ...], model_type: str | None, action: str, view: str | None
) -> None:
    treatment = DEFAULT_RULES.treat(TensorInfo(name, shape, torch.bfloat16), model_type)
    assert treatment.action == action, treatment
    assert (str(treatment.view) if treatment.view else None) == view, treatment
    assert treatment.reason


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_buffers_stay_the_bases_whatever_the_rules_say(dtype: torch.dtype) -> None:
    table = DEFAULT_RULES.extended([{"match": "", "action": "merge"}])
    for rules in (DEFAULT_RULES, table):
        treatment = rules.treat(TensorInfo("position_ids", (1, 8), dtype))
        assert (treatment.action, treatment.view) == ("base", None)
        assert str(dtype).removeprefix("torch.") in treatment.reason


def test_reasons_are_printed() -> None:
    def text(name: str, shape: tuple[int, ...], model_type: str | None = None) -> str:
        return str(DEFAULT_RULES.treat(TensorInfo(name, shape, torch.float32), model_type))

    assert "heads interleaved" in text("query_key_value.weight", (24, 8))
    assert "d_out is not 3*d_in: merged whole; give the heights" in text("qkv_proj.weight", (12, 8))
    assert text("h.0.mlp.c_fc.weight", (8, 32), "gpt2") == "merge, transposed (Conv1D, stored (in, out))"
    assert text("wte.weight", (8, 32)) == "average (embedding)"


def test_a_mask_that_only_the_base_has_is_the_bases(generator: torch.Generator) -> None:
    """Old files of GPT-2 have the causal mask, fine-tunes that are saved today do not."""
    mask = torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6)
    base = {"h.0.mlp.c_fc.weight": torch.zeros(4, 8), "h.0.attn.bias": mask}
    expert = {"h.0.mlp.c_fc.weight": torch.randn(4, 8, generator=generator)}
    for given in (expert, {**expert, "h.0.attn.bias": mask.bool()}, {**expert, "h.0.attn.bias": mask[..., :3, :3]}):
        vectors = TaskVectors(base, {"a": given})
        assert vectors.treatments["h.0.attn.bias"].reason == "mask: no weights"
