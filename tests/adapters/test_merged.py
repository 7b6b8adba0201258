"""Adapters against what PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poe_models.weights.loading import Checkpoint, CheckpointError, open_checkpoint
from poe_models.weights.lora import LoraCheckpoint
from tests.adapters.toys import Mixed, build, change_config, save_base, train_adapter

MIXED_TARGETS = ["emb", "square_emb", "fc", "wide", "conv", "conv1x1", "conv1d"]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 7}),
    "bert rslora": ("bert", {"target_modules": ["query", "dense"], "r": 3, "lora_alpha": 7, "use_rslora": True}),
    "bert patterns": (
        "bert",
        {
            "target_modules": ["query", "key", "value"],
            "r": 3,
            "rank_pattern": {"query": 2, "layer.1.attention.self.key": 1},
            "alpha_pattern": {r"layer\.\d+\.attention\.self\.value": 5, "query": 11},
        },
    ),
    "bert patterns rslora": (
        "bert",
        {
            "target_modules": ["query", "key"],
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"key": 3},
            "use_rslora": True,
        },
    ),
    "bert head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "bert bias lora_only": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "bert bias all": ("bert", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bert gaussian": ("bert", {"target_modules": ["query"], "init_lora_weights": "gaussian"}),
    "bert orthogonal": ("bert", {"target_modules": ["query"], "init_lora_weights": "orthogonal", "r": 4}),
    "bert mica": ("bert", {"target_modules": ["query"], "init_lora_weights": "mica", "r": 4}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "gpt2 told wrongly": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": False}),
    "gpt2 rslora": ("gpt2", {"target_modules": ["c_proj"], "use_rslora": True, "alpha_pattern": {"mlp.c_proj": 3}}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"], "r": 3}),
    "gpt2 tied embedding": ("gpt2", {"target_modules": ["wte"], "r": 3}),
    "mixed": ("mixed", {"target_modules": MIXED_TARGETS, "r": 2, "lora_alpha": 5}),
    "mixed all": ("mixed", {"target_modules": MIXED_TARGETS, "r": 2, "bias": "all", "modules_to_save": ["head"]}),
    "mixed by index": ("bert", {"target_modules": ["query"], "layers_to_transform": [1], "lora_dropout": 0.1}),
}


def merged_by_peft(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_merges(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    model, base, folder = build(kind, tmp_path, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = open_checkpoint(folder, base=base)
    expected = merged_by_peft(model, folder)
    assert isinstance(lora, LoraCheckpoint)
    assert set(lora.tensors) == set(base.tensors)
    changed = set()
    for name, info in lora.tensors.items():
        read = lora.read(name)
        assert (tuple(read.shape), read.dtype) == (info.shape, info.dtype)
        torch.testing.assert_close(read, expected[name], rtol=1e-5, atol=1e-6)
        differs = not torch.equal(expected[name], before[name])
        assert lora.changes(name) == differs
        changed |= {name} if differs else set()
        factors = lora.lora_factors(name)
        if factors is not None:
            update = (factors[0] @ factors[1]).reshape(info.shape).float()
            torch.testing.assert_close(update, expected[name] - before[name], rtol=1e-4, atol=1e-5)
    assert changed


def test_every_kind_of_layer_was_adapted(tmp_path: Path) -> None:
    """Guards the test above: PEFT may stop adapting a kind of layer."""
    _, base, folder = build("mixed", tmp_path, **CASES["mixed"][1])
    lora = open_checkpoint(folder, base=base)
    assert isinstance(lora, LoraCheckpoint)
    adapted = {name for name in base.tensors if lora.lora_factors(name) is not None}
    assert adapted == {f"{target}.weight" for target in MIXED_TARGETS}


def test_attributes_are_the_bases(tmp_path: Path) -> None:
    _, base, folder = build("bert", tmp_path, target_modules=["query"])
    lora = open_checkpoint(folder, base=base)
    assert (lora.config, lora.layout, lora.aliases) == (base.config, base.layout, base.aliases)
    assert lora.files == (folder / "adapter_model.safetensors",)
    assert lora.source == str(folder)
    assert lora.metadata["format"] == "pt"


def test_adapter_saved_with_torch(tmp_path: Path) -> None:
    model, base, folder = build("bert", tmp_path, target_modules=["query"])
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    lora = open_checkpoint(folder, base=base)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(lora.read(name), merged_by_peft(model, folder)[name])


def test_base_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    model, base, folder = build("bert", tmp_path, target_modules=["query"])
    low = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    lora = open_checkpoint(folder, base=open_checkpoint(low))
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert isinstance(lora, LoraCheckpoint)
    factors = lora.lora_factors(name)
    assert factors is not None
    exact = low[name].double() + factors[0] @ factors[1]
    assert lora.read(name).dtype == torch.bfloat16
    assert torch.equal(lora.read(name), exact.bfloat16())
    assert factors[0].dtype == torch.float64  # the update itself is not rounded to the base's dtype


def renamed(base: Checkpoint, change: Any) -> Checkpoint:
    return open_checkpoint({change(name): base.read(name) for name in base.tensors})


def test_a_base_without_the_model_prefix(tmp_path: Path) -> None:
    model, base, folder = build("bert", tmp_path, target_modules=["query", "dense"], modules_to_save=["classifier"])
    expected = merged_by_peft(model, folder)
    lora = open_checkpoint(folder, base=renamed(base, lambda name: name.removeprefix("bert.")))
    for name in lora.tensors:
        full = f"bert.{name}" if not name.startswith("classifier") else name
        torch.testing.assert_close(lora.read(name), expected[full], rtol=1e-5, atol=1e-6)


def test_a_base_with_a_further_prefix(tmp_path: Path) -> None:
    model, base, folder = build("gpt2", tmp_path, target_modules=["c_attn"])
    expected = merged_by_peft(model, folder)
    lora = open_checkpoint(folder, base=renamed(base, lambda name: f"model.{name}"))
    for name in lora.tensors:
        torch.testing.assert_close(lora.read(name), expected[name.removeprefix("model.")], rtol=1e-5, atol=1e-6)


def test_names_that_fit_twice_are_refused_with_both(tmp_path: Path) -> None:
    _, base, folder = build("bert", tmp_path, target_modules=["query"])
    twins = {f"{side}.{name}": base.read(name) for name in base.tensors for side in ("encoder", "decoder")}
    name = r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight"
    with pytest.raises(CheckpointError, match=rf"could be any of 'encoder\.{name}', 'decoder\.{name}'"):
        open_checkpoint(folder, base=open_checkpoint(twins))


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, _, folder = build("bert", tmp_path, target_modules=["query"])
    other = {"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8)}
    with pytest.raises(CheckpointError, match=r"changes 'bert\.encoder\.layer\.1\.attention\.self\.query'.*nearest is"):
        open_checkpoint(folder, base=open_checkpoint(other))


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, base, folder = build("bert", tmp_path, target_modules=["query"])
    wide = {name: base.read(name) if "query" not in name else torch.zeros(16, 16) for name in base.tensors}
    with pytest.raises(CheckpointError, match=r"query' has A \(8, 8\) and B \(8, 8\), which do not fit.*\(16, 16\)"):
        open_checkpoint(folder, base=open_checkpoint(wide))
    change_config(folder, r=4)
    with pytest.raises(CheckpointError, match=r"do not fit rank 4"):
        open_checkpoint(folder, base=base)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2)

    model = Grouped()
    base = save_base(model, tmp_path / "base")
    train_adapter(model, tmp_path / "adapter", target_modules=["conv"], r=2)
    with pytest.raises(CheckpointError, match=r"Convolutions with groups are not supported"):
        open_checkpoint(tmp_path / "adapter", base=base)


def test_multihead_attention_is_refused_by_name(tmp_path: Path) -> None:
    _, base, folder = build("mixed", tmp_path, target_modules=["attn"])
    with pytest.raises(CheckpointError, match=r"on nn\.MultiheadAttention.*out_proj once or twice"):
        open_checkpoint(folder, base=base)


def test_a_new_head_is_an_extra_tensor(tmp_path: Path) -> None:
    _, base, folder = build("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier"])
    body = open_checkpoint({name: base.read(name) for name in base.tensors if not name.startswith("classifier")})
    lora = open_checkpoint(folder, base=body)
    assert set(lora.tensors) - set(body.tensors) == {"classifier.weight", "classifier.bias"}
    assert lora.read("classifier.weight").shape == (3, 8)


def test_one_of_two_tied_tensors_is_refused_with_both_names(tmp_path: Path) -> None:
    model = Mixed()
    model.square_emb.weight = model.fc.weight
    base = save_base(model, tmp_path / "base")
    assert base.aliases == {"fc.weight": "square_emb.weight"}
    for target, key in (("fc", "fc.lora_A"), ("square_emb", "square_emb.lora_embedding_A")):
        train_adapter(Mixed(), tmp_path / target, target_modules=[target])
        with pytest.raises(CheckpointError, match=rf"{key}.*'square_emb.weight' and 'fc.weight' are one tied tensor"):
            open_checkpoint(tmp_path / target, base=base)


def test_square_matrices_without_a_config_follow_fan_in_fan_out(tmp_path: Path) -> None:
    _, base, folder = build("mixed", tmp_path, target_modules=["fc"])
    plain = open_checkpoint(folder, base=base)
    change_config(folder, fan_in_fan_out=True)
    turned = open_checkpoint(folder, base=base)
    update = plain.read("fc.weight") - base.read("fc.weight")
    torch.testing.assert_close(turned.read("fc.weight") - base.read("fc.weight"), update.T)
    assert not torch.equal(update, update.T)


def test_square_conv1d_is_known_from_the_model_whatever_the_adapter_says(tmp_path: Path) -> None:
    model, base, folder = build("gpt2", tmp_path, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    name = "transformer.h.0.attn.c_proj.weight"
    change_config(folder, fan_in_fan_out=False)  # as adapters of old versions of PEFT say
    lora = open_checkpoint(folder, base=base)
    change_config(folder, fan_in_fan_out=True)
    torch.testing.assert_close(lora.read(name), merged_by_peft(model, folder)[name])


def test_a_stored_copy_of_an_embedding(tmp_path: Path) -> None:
    """PEFT saves the embedding itself beside its factors when the vocabulary may have changed."""
    _, base, folder = build("mixed", tmp_path, target_modules=["emb"])
    plain = open_checkpoint(folder, base=base)
    path = folder / "adapter_model.safetensors"
    key = "base_model.model.emb.base_layer.weight"
    assert isinstance(plain, LoraCheckpoint)
    factors = plain.lora_factors("emb.weight")
    assert factors is not None
    update = (factors[0] @ factors[1]).float()
    saved = load_file(path)

    save_file({**saved, key: base.read("emb.weight").clone()}, path, metadata={"format": "pt"})
    same = open_checkpoint(folder, base=base)
    assert isinstance(same, LoraCheckpoint)
    assert same.lora_factors("emb.weight") is not None
    torch.testing.assert_close(same.read("emb.weight"), base.read("emb.weight") + update)

    save_file({**saved, key: base.read("emb.weight") + 1}, path, metadata={"format": "pt"})
    moved = open_checkpoint(folder, base=base)
    assert isinstance(moved, LoraCheckpoint)
    assert moved.lora_factors("emb.weight") is None
    torch.testing.assert_close(moved.read("emb.weight"), base.read("emb.weight") + 1 + update)
