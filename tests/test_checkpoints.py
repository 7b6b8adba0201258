from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from poe_models.weights import weight_files as _weight_files
from poe_models.weights.loading import CheckpointError, MemoryCheckpoint, TensorInfo, open_checkpoint, same_weights
from tests.seeds import seeded


def random_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {
        "emb.weight": torch.randn(10, 4, generator=generator).to(dtype),
        "fc.weight": torch.randn(6, 4, generator=generator).to(dtype),
        "fc.bias": torch.randn(6, generator=generator).to(dtype),
        "emb.position_ids": torch.arange(10).reshape(1, 10),
        "flag": torch.tensor(True),
    }


def write_shards(folder: Path, state: dict[str, Tensor], bin_files: bool = False) -> None:
    names = sorted(state)
    suffix = "bin" if bin_files else "safetensors"
    stem = "pytorch_model" if bin_files else "model"
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        part = {name: state[name] for name in held}
        if bin_files:
            torch.save(part, folder / shard)
        else:
            save_file(part, folder / shard, metadata={"format": "pt", "shard": shard})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write(kind: str, folder: Path, state: dict[str, Tensor]) -> Path | dict[str, Tensor]:
    """Write a state dict in one of the supported forms and return what opens it."""
    folder.mkdir(exist_ok=True)
    if kind == "memory":
        return state
    if kind == "safetensors file":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    if kind == "safetensors folder":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "safetensors shards":
        write_shards(folder, state)
    elif kind == "bin folder":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "bin shards":
        write_shards(folder, state, bin_files=True)
    elif kind == "legacy pt":
        torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
        return folder / "old.pt"
    elif kind == "nested pth":
        torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "nested.pth")
        return folder / "nested.pth"
    elif kind == "nested model":
        torch.save({"model": state}, folder / "nested.ckpt")
        return folder / "nested.ckpt"
    return folder


KINDS = [
    *(
        "memory",
        "safetensors file",
        "safetensors folder",
        "safetensors shards",
        "bin folder",
        "bin shards",
        "legacy pt",
    ),
    *("nested pth", "nested model"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(dtype=dtype)
    checkpoint = open_checkpoint(write(kind, tmp_path / "m", state))
    assert set(checkpoint.tensors) == set(state)
    assert not checkpoint.aliases
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.nbytes
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.device.type == "cpu"
        assert torch.equal(read, tensor)
    assert all((info.file is None) == (kind == "memory") for info in checkpoint.tensors.values())


def test_attributes_of_folders_and_files(tmp_path: Path) -> None:
    state = random_state()
    folder = tmp_path / "m"
    write("safetensors shards", folder, state)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    sharded = open_checkpoint(str(folder))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert sharded.source == str(folder)
    assert sharded.config == {"model_type": "bert"}
    assert [path.name for path in sharded.files] == [first, second]
    assert list(sharded.layout) == [first, second]
    assert sharded.layout[first] == tuple(sorted(state)[::2])
    assert sharded.metadata["format"] == "pt"
    assert tuple(sharded.tensors) == sharded.layout[first] + sharded.layout[second]

    single = open_checkpoint(write("safetensors file", tmp_path / "s", state))
    assert single.config is None
    assert single.layout == {"model.safetensors": tuple(sorted(state))}
    memory = open_checkpoint(state)
    assert (memory.source, memory.files) == ("<memory>", ())
    assert memory.layout == {"model.safetensors": tuple(state)}  # the order of a state dict is the model's


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).read("w").sum() == 0


def test_tied_weights_in_a_torch_file_and_in_memory(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, generator=seeded(0))
    state = {
        "wte": weight,
        "h": weight[:2],
        "t": weight.T,
        "lm_head": weight,
        "copy": weight.clone(),
        "none": weight[:0],
    }
    torch.save(state, tmp_path / "tied.pt")
    for source in (state, tmp_path / "tied.pt"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.aliases == {"lm_head": "wte"}
        assert set(checkpoint.tensors) == {"wte", "h", "t", "copy", "none"}
        assert torch.equal(checkpoint.read("lm_head"), weight)
        assert torch.equal(checkpoint.read("t"), weight.T)
        assert checkpoint.tied_names("lm_head") == checkpoint.tied_names("wte") == ("wte", "lm_head")


def test_tied_names_in_the_metadata_of_safetensors(tmp_path: Path) -> None:
    model = nn.Module()
    model.wte, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.wte.weight
    save_model(model, str(tmp_path / "m.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    kept = next(iter(checkpoint.tensors))
    assert len(checkpoint.tensors) == 1
    assert set(checkpoint.tied_names(kept)) == {"wte.weight", "head.weight"}
    assert torch.equal(checkpoint.read("head.weight"), checkpoint.read("wte.weight"))


def test_only_headers_are_read_at_opening(tmp_path: Path) -> None:
    """A sparse file of 64 GB: reading its data would take minutes and more memory than there is."""
    rows, cols = 2**17, 2**17
    header = json.dumps(
        {
            "big": {"dtype": "F32", "shape": [rows, cols], "data_offsets": [0, 4 * rows * cols]},
            "small": {"dtype": "F32", "shape": [2], "data_offsets": [4 * rows * cols, 4 * rows * cols + 8]},
        }
    ).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * rows * cols + 8)
    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["big"].nbytes == 64 * 2**30
    assert torch.equal(checkpoint.read("small"), torch.zeros(2))
    assert time.perf_counter() - start < 5
    assert os.stat(path).st_blocks * 512 < 2**20


def test_torch_files_are_mapped_and_not_read_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(random_state(), tmp_path / "m.pt")
    torch.save(random_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(kwargs) or load(*args, **kwargs))
    open_checkpoint(tmp_path / "m.pt")
    open_checkpoint(tmp_path / "old.pt")
    assert [call["mmap"] for call in calls] == [True, False]
    assert all(call["weights_only"] is True for call in calls)


def test_safetensors_are_read_without_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(random_state(), tmp_path / "m.safetensors")
    opened = []

    def open_file(path: Path, framework: str, device: str, backend: str) -> object:
        opened.append(backend)
        return safetensors.safe_open(path, framework=framework, device=device, backend=backend)

    monkeypatch.setattr(_weight_files, "safe_open", open_file)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(checkpoint.read("fc.weight"), random_state()["fc.weight"])
    assert opened == ["pread", "pread"]


@pytest.mark.parametrize("kind", ["safetensors folder", "bin folder", "safetensors shards", "bin shards"])
def test_maps_are_renewed_and_values_stay(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state()
    checkpoint = open_checkpoint(write(kind, tmp_path / "m", state))
    monkeypatch.setattr(_weight_files, "RESIDENT_BYTES", 0)
    kept = {name: checkpoint.read(name) for name in [*state, *state]}
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())


MEASURE = """
import re, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from poe_models.weights.loading import open_checkpoint
path, how = sys.argv[1:]
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
start = peak()
if how == "lazy":
    checkpoint = open_checkpoint(path)
    total = sum(float(checkpoint.read(name).sum()) for name in checkpoint.tensors)
else:
    state = load_file(path) if path.endswith("safetensors") else torch.load(path, weights_only=True)
    total = sum(float(tensor.sum()) for tensor in state.values())
print((peak() - start) * 1024, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_reading_all_tensors_does_not_hold_the_file(suffix: str, tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.full((2**21,), float(i)) for i in range(40)}  # 40 x 8 MiB
    path = tmp_path / f"m.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)

    def peak(how: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(path), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        peak_bytes, total = map(float, done.stdout.split())
        assert total == 2**21 * sum(range(40))
        return peak_bytes / 2**20

    assert peak("whole") > 300  # the measurement sees a model of 320 MiB that is held
    assert peak("lazy") < 80  # 16 MiB of map, one tensor, and the allocator


def test_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such tensor; the nearest name is 'fc.weight'"):
        open_checkpoint(random_state()).read("fc.weights")


def test_inputs_in_memory_are_not_copied_and_may_be_parameters() -> None:
    layer = nn.Linear(3, 2)
    checkpoint = open_checkpoint(dict(layer.named_parameters()))
    assert checkpoint.read("weight").data_ptr() == layer.weight.data_ptr()
    assert not checkpoint.read("weight").requires_grad
    strided = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(open_checkpoint({"w": strided}).read("w"), strided)


def test_same_weights(tmp_path: Path) -> None:
    state = random_state()
    one = open_checkpoint(write("safetensors folder", tmp_path / "a", state))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    assert same_weights(one, open_checkpoint(link))
    assert same_weights(one, open_checkpoint(tmp_path / "a" / "model.safetensors"))
    assert not same_weights(one, open_checkpoint(write("safetensors folder", tmp_path / "b", state)))
    assert same_weights(open_checkpoint(state), open_checkpoint(dict(state)))
    copies = {name: tensor.clone() for name, tensor in state.items()}
    assert not same_weights(open_checkpoint(state), open_checkpoint(copies))
    assert not same_weights(open_checkpoint(state), open_checkpoint({**state, "fc.weight": copies["fc.weight"]}))


# ------------------------------------------------------------------------------------------------ bad input


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

    content["weight_map"] = {"w": "../model-00001-of-00002.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"not in the folder"):
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
        ({"state_dict": {"w": torch.zeros(2), "step": 3}}, r"'state_dict' \(dict\).*every leaf is a tensor"),
        ({"state_dict": {"a": {"w": torch.zeros(2)}}}, r"every leaf is a tensor"),
        ({"weights": {"w": torch.zeros(2)}}, r"'weights' \(dict\)"),
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
    }
    assert set(open_checkpoint(buffers).tensors) == set(buffers)


# ------------------------------------------------------------------------------------------------ the hub


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("bin folder", tmp_path / "m", random_state())
    calls: list[tuple[str, str | None, list[str]]] = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert set(open_checkpoint("org/some-model@v1.0").tensors) == set(random_state())
    assert [(repo, revision) for repo, revision, _ in calls] == [("org/some-model", "v1.0")] * 2
    assert "*.bin" not in calls[0][2]  # pickles only where there is nothing else
    assert "*.bin" in calls[1][2]

    write("safetensors folder", tmp_path / "m", random_state())
    calls.clear()
    open_checkpoint("org/some-model")
    assert [(repo, revision) for repo, revision, _ in calls] == [("org/some-model", None)]


def test_a_failed_download_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"'models/base'.*no such file or folder: .*no route to host"):
        open_checkpoint("models/base")


@pytest.mark.parametrize("prefix", ["ft/", "./ft/", "{here}/ft/", "ft/../ft/"])
def test_a_missing_path_is_told_as_one(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ft" / "mnist").mkdir(parents=True)
    message = r"no such file or folder: \S*ft has no 'minst'; the nearest is 'mnist'. Give a folder, a weight file"
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(f"{prefix}minst".format(here=tmp_path))
    assert "ZeroDivisionError" not in str(caught.value)


def test_tensor_info_and_repr() -> None:
    assert TensorInfo("s", (), torch.int64).nbytes == 8
    assert repr(MemoryCheckpoint({"w": torch.zeros(1)})) == "MemoryCheckpoint('<memory>', 1 tensors)"
