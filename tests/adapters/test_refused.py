"""Adapters that are no plain LoRA are refused by name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poe_models.weights import lora_config as _lora_config
from poe_models.weights.loading import Checkpoint, CheckpointError, open_checkpoint
from tests.adapters.toys import change_config

REFUSED = {
    "DoRA": {"use_dora": True},
    "VeLoRA": {"velora_config": {"num_groups": 64}},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "QALoRA": {"use_qalora": True},
    "MonteCLoRA": {"monteclora_config": {"num_samples": 8}},
    "layer replication": {"layer_replication": [[0, 1], [0, 1]]},
    "bias on B": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["experts.down_proj"]},
    "trainable tokens": {"trainable_token_indices": [1]},
    "BD-LoRA": {"use_bdlora": {"nblocks": 2}},
    "Arrow": {"arrow_config": {"top_k": 3}},
    "KaSA": {"kasa_config": {"beta": 0.1}},
    "Megatron": {"megatron_config": {"hidden_size": 8}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA initialisation": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "unknown initialisation 'better'": {"init_lora_weights": "better"},
    "type IA3": {"peft_type": "IA3"},
    "type ADALORA": {"peft_type": "ADALORA"},
    "without `peft_type`": {"peft_type": None},
    "unknown field `use_newlora`": {"use_newlora": True},
    "unknown field `depth`": {"depth": 3},
    "'r' is 0, not a whole number": {"r": 0},
    "'query' of `rank_pattern` is 2.5, not a whole number": {"rank_pattern": {"query": 2.5}},
    "'query' of `alpha_pattern` is None, not a finite number": {"alpha_pattern": {"query": None}},
    "'lora_alpha' is '16', not a finite number": {"lora_alpha": "16"},
    "'lora_alpha' is 10{400}, not a finite number": {"lora_alpha": 10**400},
    "'rank_pattern' is 3, not a mapping": {"rank_pattern": 3},
    "'use_rslora' is 'false', not true or false": {"use_rslora": "false"},
    r"'fan_in_fan_out' is \[0\], not true or false": {"fan_in_fan_out": [0]},
    "'use_dora' is 'false', not true or false": {"use_dora": "false"},
    "'init_lora_weights' is 1, not true, false or": {"init_lora_weights": 1},
    "'base_model_name_or_path' is 3, not the name": {"base_model_name_or_path": 3},
    r"'modules_to_save' is 'head', not a list of names": {"modules_to_save": "head"},
    r"'bias' is None, not 'none', 'all' or 'lora_only'": {"bias": None},
    r"`rank_pattern`: '\(': not a regular expression": {"rank_pattern": {"(": 4}},
    "`alpha_pattern`: the regular expression 'a.99999.' has more than": {"alpha_pattern": {"a{99999}": 4}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_variants_are_refused_by_name(name: str, adapter: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, folder = adapter
    shutil.copytree(folder, tmp_path / "copy")
    change_config(tmp_path / "copy", **REFUSED[name])
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json.*{name}"):
        open_checkpoint(tmp_path / "copy", base=base)


def test_every_field_of_peft_is_decided() -> None:
    """A new version of PEFT adds fields: each must be looked at before it is let through."""
    known = _lora_config._USED | _lora_config._WITHOUT_EFFECT | set(_lora_config._REFUSED)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


def test_defaults_of_unknown_fields_pass(adapter: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, folder = adapter
    shutil.copytree(folder, tmp_path / "copy")
    change_config(tmp_path / "copy", use_newlora=False, new_config=None, new_pattern={})
    assert open_checkpoint(tmp_path / "copy", base=base).tensors


def with_keys(folder: Path, tmp_path: Path, **changes: Tensor | None) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    saved: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({key: tensor for key, tensor in saved.items() if tensor is not None}, path)
    return tmp_path / "copy"


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def test_tensors_that_plain_lora_lacks_are_refused(adapter: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, folder = adapter
    key = f"{QUERY}.lora_magnitude_vector"
    with pytest.raises(CheckpointError, match=r"query\.lora_magnitude_vector', which plain LoRA does not have"):
        open_checkpoint(with_keys(folder, tmp_path, **{key: torch.ones(8)}), base=base)


def test_a_factor_without_its_partner_is_refused(adapter: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, folder = adapter
    with pytest.raises(CheckpointError, match=r"query' has A alone"):
        open_checkpoint(with_keys(folder, tmp_path, **{f"{QUERY}.lora_B.weight": None}), base=base)


def test_an_adapter_without_weights_is_refused(adapter: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, folder = adapter
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors and adapter_model\.bin"):
        open_checkpoint(tmp_path / "copy", base=base)
    (tmp_path / "copy" / "adapter_config.json").write_text("not json")
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not readable as JSON"):
        open_checkpoint(tmp_path / "copy", base=base)
