"""Rules: of whole models against transformers, of users, and those that do not fit."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import transformers

from poe_models.weights.loading import MemoryCheckpoint, TensorInfo
from poe_models.weights.rules import DEFAULT_RULES, Rule, RuleTable, View, model_type_of

THIRDS = "split into 3 equal row blocks"


def treat_model(model: torch.nn.Module) -> dict[str, str]:
    checkpoint = MemoryCheckpoint(model.state_dict(), model.config.to_dict())
    kind = model_type_of(checkpoint)
    return {name: str(DEFAULT_RULES.treat(info, kind)) for name, info in checkpoint.tensors.items()}


def test_conv1d_is_exactly_what_transformers_says() -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    config.add_cross_attention = True
    model = transformers.GPT2LMHeadModel(config)
    conv1d = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    treatments = treat_model(model)
    assert conv1d == {name for name, text in treatments.items() if "transposed" in text}
    assert len(conv1d) == 7


def test_linear_layers_of_real_models_are_merged_as_they_are() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    for model in (
        transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)),
        transformers.ViTForImageClassification(vision),
        transformers.T5ForConditionalGeneration(t5),
    ):
        treatments = treat_model(model)
        for name, module in model.named_modules():
            text = treatments.get(f"{name}.weight", "")
            if isinstance(module, torch.nn.Linear) and text:
                assert text == "merge, as it is (matrix)" or name == "lm_head", (name, text)
            if isinstance(module, torch.nn.Embedding) and text:
                assert text == "average (embedding)", (name, text)
            if isinstance(module, torch.nn.Conv2d):
                assert text.startswith("merge, conv flattened"), (name, text)


def test_model_type_of_checkpoints() -> None:
    def guess(tensors: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> str | None:
        return model_type_of(MemoryCheckpoint({name: torch.zeros(shape) for name, shape in tensors.items()}, config))

    fc = "transformer.h.0.mlp.c_fc.weight"
    assert guess({fc: (8, 32)}, {"model_type": "bert"}) == "bert"
    assert guess({"w": (2, 2)}) is None
    assert guess({fc: (8, 32)}) == "gpt2"
    nano = guess({fc: (32, 8)})  # nanoGPT: linear layers under GPT-2's names
    square = TensorInfo("transformer.h.0.attn.c_proj.weight", (8, 8), torch.float32)
    assert str(DEFAULT_RULES.treat(square, nano).view) == "as it is"
    assert str(DEFAULT_RULES.treat(square, "gpt2").view) == "transposed"
    composite = {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2"},
    }
    assert guess({"w": (2, 2)}, composite) == "gpt2"
    assert guess({"w": (2, 2)}, {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}) == "clip"


def test_users_rules_come_first_and_the_first_decides() -> None:
    table = DEFAULT_RULES.extended([
        {"match": r"layers\.0\.", "action": "base"},
        Rule(r"embed_tokens", "merge"),
        {"match": r"\.weight$", "action": "average"},
    ])  # fmt: skip
    info = TensorInfo("layers.0.fc.weight", (4, 4), torch.float32)
    assert str(table.treat(info)) == "base (rule {match: 'layers\\\\.0\\\\.', action: base})"
    assert table.treat(TensorInfo("layers.1.fc.weight", (4, 4), torch.float32)).action == "average"
    assert str(table.treat(TensorInfo("embed_tokens.weight", (9, 4), torch.float32)).view) == "as it is"
    assert DEFAULT_RULES.treat(info).action == "merge"  # extending makes a new table


def test_a_rule_without_a_view_keeps_the_default_view() -> None:
    info = TensorInfo("h.0.attn.c_attn.weight", (8, 24), torch.float32)
    plain = DEFAULT_RULES.extended([{"match": "attn", "action": "merge"}]).treat(info, "gpt2")
    assert str(plain.view) == f"transposed, {THIRDS}"
    explicit = DEFAULT_RULES.extended([{"match": "attn", "action": "merge", "view": {}}]).treat(info, "gpt2")
    assert str(explicit.view) == "as it is"
    convolution = TensorInfo("dw.weight", (8, 1, 3, 3), torch.float32)
    table = DEFAULT_RULES.extended([{"match": "dw", "action": "merge", "view": {"groups": 8}}])
    assert table.treat(convolution).view == View(groups=8, flatten=True)
    wide = DEFAULT_RULES.extended([{"match": "dw", "action": "merge"}]).treat(convolution)
    assert str(wide.view) == "conv flattened (out, in*kh*kw)"


def test_fused_projections_with_given_heights() -> None:
    rule = {"match": r"qkv_proj\.weight", "action": "merge", "view": {"rows": [8, 2, 2]}, "model_types": ["phi3"]}
    info = TensorInfo("l.qkv_proj.weight", (12, 8), torch.float32)
    table = DEFAULT_RULES.extended([rule])
    assert str(table.treat(info, "phi3").view) == "split into row blocks of 8, 2, 2"
    assert str(table.treat(info, "llama").view) == "as it is"
    assert str(table.treat(info, None).view) == "split into row blocks of 8, 2, 2"


def test_tied_names_share_one_treatment() -> None:
    info = TensorInfo("wte.weight", (9, 4), torch.float32)
    assert DEFAULT_RULES.treat(info, None, ["lm_head.weight"]).action == "average"
    table = DEFAULT_RULES.extended([{"match": "lm_head", "action": "base"}])
    assert table.treat(info, None, ["lm_head.weight"]).action == "base"
    assert table.treat(info).action == "average"


def test_tables_survive_plain_values() -> None:
    table = DEFAULT_RULES.extended([
        Rule("a", "merge", View(rows=(1, 2), transpose=True), ("gpt2",), "matrix", known=True, note="note"),
        Rule("b", "base"),
        Rule("c", "merge", View()),
    ])  # fmt: skip
    plain = json.loads(json.dumps(table.to_dicts()))
    assert RuleTable.from_dicts(plain) == table
    assert plain[0] == {
        "match": "a",
        "action": "merge",
        "view": {"rows": [1, 2], "transpose": True},
        "model_types": ["gpt2"],
        "shape": "matrix",
        "known": True,
        "note": "note",
    }
    assert plain[1] == {"match": "b", "action": "base"}
    assert plain[2]["view"] == {}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"match": "(", "action": "base"}, r"rules\[1\].*not a regular expression"),
        ({"match": "a", "action": "bsae"}, r"unknown action; did you mean 'base'\?"),
        ({"match": "a", "action": "drop"}, r"unknown action; valid are merge, average, base"),
        ({"match": "a", "acton": "base"}, r"unknown key 'acton'; did you mean 'action'\?"),
        ({"match": "a"}, r"`action` is missing"),
        ({"action": "base"}, r"`match` is missing"),
        ({"match": "a", "action": "merge", "view": {"row": [1]}}, r"unknown key 'row'; did you mean 'rows'\?"),
        ({"match": "a", "action": "merge", "view": {"flatten": True}}, r"unknown key 'flatten'"),
        ({"match": "a", "action": "merge", "view": "square"}, r"`view` is 'square'"),
        ({"match": "a", "action": "merge", "view": {"rows": 3}}, r"`rows` is 3. Write a list of whole numbers"),
        ({"match": "a", "action": "merge", "view": {"rows": [1.5]}}, r"`rows` is \[1.5\]"),
        ({"match": "a", "action": "merge", "view": {"blocks": "3"}}, r"`blocks` is '3'"),
        ({"match": "a", "action": "merge", "view": {"square": "no"}}, r"`square` is 'no'. Write true or false"),
        ({"match": "a", "action": "merge", "view": {"square": True, "blocks": 2}}, r"two ways to cut"),
        ({"match": "a", "action": "average", "view": {}}, r"only merged tensors are seen as matrices"),
        ({"match": "a", "action": "merge", "shape": "matrx"}, r"unknown shape; did you mean 'matrix'\?"),
        ({"match": "a", "action": "merge", "model_types": "gpt2"}, r"`model_types` is 'gpt2'. Write a list of names"),
        ({"match": "a", "action": "merge", "known": True}, r"no model types to know"),
        ({"match": 3, "action": "base"}, r"not a regular expression"),
        ("lm_head", r"expected a mapping"),
    ],
)
def test_malformed_rules_are_one_error(rule: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"rules\[1\]: ") as caught:
        DEFAULT_RULES.extended([{"match": "ok", "action": "base"}, rule])
    assert re.search(words, str(caught.value)), str(caught.value)


def test_rules_that_do_not_fit_a_tensor_name_it() -> None:
    table = DEFAULT_RULES.extended([{"match": "bias", "action": "merge"}])
    with pytest.raises(
        ValueError, match=r"'fc\.bias': rule \{match: 'bias', action: merge\} merges it, but shape \(4,\)"
    ):
        table.treat(TensorInfo("fc.bias", (4,), torch.float32))
    with pytest.raises(ValueError, match=r"'w': no rule applies"):
        RuleTable(()).treat(TensorInfo("w", (4,), torch.float32))


NAMES = (
    *("h.{}.attn.c_attn.weight", "model.layers.{}.mlp.c_fc.weight", "{}.weight", "blocks.{}.w13.weight", "layers.{}"),
    *(
        "layers.{}.mlp.experts.{}.gate_up_proj",
        "layers.{}.norm{}.weight",
        "encoder.{}.rel_attn.r",
        "tok_embed{}.weight",
    ),
    *(
        "stages.{}.blocks.{}.attn.qkv.weight",
        "layers.{}.mask",
        "cls_token",
        "layer_{}.dense_h_to_4h.weight",
        "a.{}.bias",
    ),
)


@pytest.mark.parametrize("place", [0, 3, 17, len(DEFAULT_RULES.rules)])
@pytest.mark.parametrize("shape", [(4, 4), (12, 4), (3, 4, 4), (4, 1, 3, 3), (4,)])
def test_the_first_rule_that_applies_decides_for_every_layer(shape: tuple[int, ...], place: int) -> None:
    own = (Rule(r"(layers|h)\.1\d?\.", "base"), Rule(r"[._]2\b", "average"), Rule(r"^13\.", "base"))
    table = RuleTable((*DEFAULT_RULES.rules[:place], *own, *DEFAULT_RULES.rules[place:]))
    for number in (0, 1, 2, 13, 13, 4, 31, 123, 0):
        for name in NAMES:
            for names in ([name.format(number, 7)], [name.format(3, number), name.format(number, number)]):
                info = TensorInfo(names[0], shape, torch.float32)
                expected = next((rule for rule in table.rules if rule.applies(names, info, "gpt2")), None)
                assert table.deciding(info, "gpt2", names[1:]) is expected, names
