"""Checkpoints of every form: the same tensors, read from headers and maps, and the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn

from poe_models.weights import saving
from poe_models.weights import weight_files as _weight_files
from poe_models.weights.loading import CheckpointError, MemoryCheckpoint, TensorInfo, open_checkpoint, same_weights
from tests.seeds import seeded
from tests.weight_folders import random_state, write

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


@pytest.mark.parametrize("how", ["as it lies", "lazily conjugated", "of another byte order", "deflated"])
def test_tensors_of_any_layout_are_read_by_their_place(how: str, tmp_path: Path) -> None:
    whole = torch.randn(6, 5, 4, generator=seeded(0))
    state = {
        "part": whole[1:5, 2],
        "steps": whole[::2, :, 1::2],
        "turned": whole.permute(2, 0, 1).bfloat16(),
        "spread": whole[0, 0].expand(3, 4),
        "scalar": whole[5, 4, 3].double(),
        "none": whole[:0],
        "flags": whole > 0,
        "complex": torch.complex(whole, -whole).mT,
    }
    if how == "lazily conjugated":
        state["complex"] = state["complex"].conj()
    torch.save({"state_dict": state, "optimizer": [torch.arange(3)]}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for member in old.infolist():
            turned = how == "of another byte order" and member.filename.endswith("byteorder")
            deflated = how == "deflated" and "/data/" in member.filename
            kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
            new.writestr(member.filename, b"big" if turned else old.read(member), kind)
    found = open_checkpoint(tmp_path / "m.pt")
    expected = torch.load(tmp_path / "m.pt", weights_only=True)["state_dict"]
    assert how == "of another byte order" or torch.equal(expected["part"], state["part"])
    for name, tensor in expected.items():
        value = found.read(name)
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(value.nan_to_num(), tensor.nan_to_num())
        assert value.is_contiguous()


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
def test_files_are_opened_anew_and_values_stay(kind: str, tmp_path: Path) -> None:
    state = random_state()
    checkpoint = open_checkpoint(write(kind, tmp_path / "m", state))
    kept = {name: checkpoint.read(name) for name in [*state, *state]}
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())


MEASURE = """
import re, sys, torch
from pathlib import Path
from safetensors import safe_open
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
    assert peak("lazy") < 80  # a tensor or two, and the allocator


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


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 2, generator=seeded(5)).bfloat16(),
        "a.weight": torch.randn(3, 2, generator=seeded(6), dtype=torch.float64),
        "turned": torch.arange(6).reshape(2, 3).T,
        "none": torch.empty(0, 3),
        "one": torch.tensor(3.0),
        "mask": torch.tensor([True, False]),
    }
    tensors |= {"tied": tensors["a.weight"], "row": tensors["a.weight"][1]}
    saving.save_file(tensors, tmp_path / "ours.safetensors", {"format": "pt"})
    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(apart, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_file_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Whatever its metadata, which are in a random order as safetensors writes them."""
    tensors, path = {"w\u00e9ight": torch.arange(3.0)}, tmp_path / "model.safetensors"
    metadata = {"format": "pt", **{f'further "{i}" \n\x01\u00e9': f"w\u00e9ight {i}" for i in range(8)}}
    written = set()
    for _ in range(5):
        saving.save_file(tensors, path, metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("w\u00e9ight"), tensors["w\u00e9ight"])
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    assert path.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size
