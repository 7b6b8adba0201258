"""Files and folders that are no checkpoints, and weights that are not read."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from poe_models.weights.loading import CheckpointError, open_checkpoint
from tests.weight_folders import random_state, write, write_shards


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "bare pickle of protocol 5"])
def test_a_pickle_with_code_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    bad = {"w": torch.zeros(2), "x": Evil(trace)}
    if how.startswith("bare"):
        path.write_bytes(pickle.dumps({"x": Evil(trace)}, protocol=5 if how.endswith("5") else 2))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pt.*holds code.*convert it to safetensors"):
        open_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if not how.startswith("bare") else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file is as evil as it should be


def test_a_saved_module_and_a_torchscript_archive_hold_code(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name in ("module.pt", "script.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}.*holds code.*safetensors"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy.pt"])
def test_truncated_files_are_named(kind: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{kind}"
    if kind == "safetensors":
        save_file(random_state(), path)
    else:
        torch.save(random_state(), path, _use_new_zipfile_serialization=kind == "pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\..*(truncated|corrupt)"):
        open_checkpoint(path)


def test_corrupt_headers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(random_state(), path)
    data = bytearray(path.read_bytes())
    data[8:12] = b"oops"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*corrupt"):
        open_checkpoint(path)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pt.*corrupt"):
        open_checkpoint(tmp_path / "text.pt")


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    checkpoint = open_checkpoint(path)
    path.unlink()
    save_file({"w": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match=r"'w'.*changed while"):
        checkpoint.read("w")


def test_broken_indexes_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, random_state())
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()

    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"1 of 2 shards.*model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "away").rename(tmp_path / "model-00002-of-00002.safetensors")

    content = json.loads(good)
    content["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"1 tensors.*'ghost\.weight' \(in model-00001"):
        open_checkpoint(tmp_path)

    for place in ("../model-00001-of-00002.safetensors", "sub/m.safetensors", str(tmp_path / "away"), ".."):
        content["weight_map"] = {"w": place}
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=rf"'{re.escape(place)}'; subfolders and `\.\.` are not followed"):
            open_checkpoint(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(tmp_path)


def test_the_index_says_which_of_two_tensors_of_a_name_counts(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)})
    left_over = {"a": torch.ones(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    save_file(left_over, tmp_path / "model-00002-of-00002.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert torch.equal(checkpoint.read("a"), torch.zeros(1))


def test_folders_without_weights_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors.*found an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*found consolidated\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("target", ["../blobs/gone", "itself"])
def test_a_link_that_leads_nowhere_is_no_missing_file(name: str, target: str, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).config is None
    (tmp_path / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(CheckpointError, match=rf"{name}: a link to .*, which is not there\. Download .* or remove"):
        open_checkpoint(tmp_path)


def test_paths_and_kinds_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder.*hub id 'org/name'"):
        open_checkpoint(tmp_path / "nowhere")
    for suffix, words in ((".gguf", "GGUF files hold quantised"), (".npz", "unknown suffix '.npz'")):
        (tmp_path / f"m{suffix}").write_bytes(b"")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / f"m{suffix}")
    with pytest.raises(CheckpointError, match=r"got Linear; expected a path.*state_dict"):
        open_checkpoint(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_an_adapter_needs_a_base_and_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter needs the model"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both an adapter.*and a whole model"):
        open_checkpoint(tmp_path, base=open_checkpoint({"w": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), r"holds a Tensor"),
        ([torch.zeros(2)], r"holds a list"),
        ({}, r"it is empty"),
        ({"w": torch.zeros(2), "epoch": 3}, r"'epoch' \(int\)"),
        (
            {"state_dict": {"w": torch.zeros(2), "step": 3}},
            r"'state_dict' \(dict\) with 'step' \(int\) in it.*every leaf is a tensor",
        ),
        ({"state_dict": {"a": {"w": torch.zeros(2)}}}, r"with 'a' \(dict\) in it.*every leaf is a tensor"),
        (
            {**{str(n): n for n in range(6)}, "model": {"w": torch.zeros(2), "x": None}},
            r"not a state dict: 'model' \(dict\) with 'x' \(NoneType\) in it, '0'",
        ),
        ({"moments": {"w": torch.zeros(2)}}, r"'moments' \(dict\)\. "),
        (
            {"model": {"w": torch.zeros(2)}, "ema": {"w": torch.zeros(2)}},
            r"more than one state dict \('model', 'ema'\)",
        ),
        ({"w": torch.zeros(2, 2).to_sparse()}, r"'w' is not an ordinary dense tensor"),
    ],
)
def test_torch_files_that_are_no_state_dicts(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.pt")


def test_quantised_torch_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, still found in files
        weight = torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8)
        torch.save({"w": weight}, tmp_path / "m.pt")
        for source in (tmp_path / "m.pt", {"w": weight}):
            with pytest.raises(CheckpointError, match=r"'w' is not an ordinary dense.*Quantised"):
                open_checkpoint(source)


def test_mappings_that_are_no_state_dicts() -> None:
    for bad, words in (({}, "is empty"), ({"model": {"w": 1}}, r"'model' \(dict\)"), ({"w": [1.0]}, r"'w' \(list\)")):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(bad)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not an ordinary dense tensor"):
        open_checkpoint({"w": torch.zeros(2, device="meta")})


QUANTISED = {
    "int8 weight": ({"fc.weight": torch.zeros(4, 4, dtype=torch.int8)}, "packed integer"),
    "int8 with SCB": ({"fc.weight": torch.zeros(4, 4), "fc.SCB": torch.zeros(4)}, "bitsandbytes int8"),
    "4-bit": ({"fc.weight": torch.zeros(8, 1), "fc.weight.absmax": torch.zeros(1)}, "bitsandbytes 4-bit"),
    "nf4 map": ({"fc.weight.quant_map": torch.zeros(16)}, "bitsandbytes 4-bit"),
    "uint8 4-bit": ({"fc.weight": torch.zeros(8, 1, dtype=torch.uint8)}, "packed integer"),
    "gptq": ({"fc.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "GPTQ or AWQ"),
    "gptq zeros": ({"fc.qzeros": torch.zeros(4, 4, dtype=torch.int32)}, "GPTQ or AWQ"),
    "gptq order": ({"fc.g_idx": torch.zeros(4, dtype=torch.int32)}, "GPTQ or AWQ"),
    "fp8": ({"fc.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "fp8"),
    "fp8 e5m2": ({"fc.weight": torch.zeros(4, 4).to(torch.float8_e5m2)}, "fp8"),
    "block fp8": ({"fc.weight": torch.zeros(4, 4), "fc.weight_scale_inv": torch.zeros(1)}, "block-scaled fp8"),
    "compressed": ({"fc.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "compressed-tensors"),
    "scaled int32": (
        {"fc.w": torch.zeros(4, 1, dtype=torch.int32), "fc.w_scale": torch.zeros(4)},
        "packed integer",
    ),
    "quanto": (
        {"fc.weight._data": torch.zeros(4, 4, dtype=torch.int8), "fc.weight._scale": torch.zeros(4, 1)},
        "packed integer",
    ),
    "mxfp4": ({"experts.gate_up_proj_blocks": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "packed integer"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("where", ["memory", "safetensors folder", "bin folder"])
def test_quantised_weights_are_refused_by_name(name: str, where: str, tmp_path: Path) -> None:
    state, kind = QUANTISED[name]
    with pytest.raises(CheckpointError, match=rf"(?s)'(fc|experts)\..*{kind}.*quantised weights cannot be merged"):
        open_checkpoint(write(where, tmp_path / "m", state))


def test_a_quantisation_config_is_refused(tmp_path: Path) -> None:
    write("safetensors folder", tmp_path / "m", random_state())
    (tmp_path / "m" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(CheckpointError, match=r"quantization_config.*'awq'.*cannot be merged"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"quantization_config": null}')
    assert open_checkpoint(tmp_path / "m").config == {"quantization_config": None}


def test_integer_buffers_are_no_quantised_weights() -> None:
    buffers = {
        "embeddings.position_ids": torch.arange(5).reshape(1, 5),
        "bn.num_batches_tracked": torch.tensor(3),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),  # the causal mask of old GPT-2 files
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "steps": torch.zeros(3, dtype=torch.int8),
        "weight": torch.tensor([3], dtype=torch.int32),
        "pos.weight": torch.zeros(4, 4, dtype=torch.int64),
        "codebook.weight": torch.zeros(4, 4, dtype=torch.int32),
        "vq.w": torch.zeros(4, 4, dtype=torch.int16),
        "table.data": torch.zeros(2, 2, dtype=torch.int8),
    }
    assert set(open_checkpoint(buffers).tensors) == set(buffers)
