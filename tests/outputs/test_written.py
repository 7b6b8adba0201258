"""What commands write: links, missing tensors, names of shards, limits of files, odd tensors."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics.predictions.inputs import checked_probabilities
from inference.models import staging as staging_module
from inference.models.folder import weight_files
from inference.models.memory import OutOfMemory
from inference.models.merge import merge_checkpoint
from poe_merge.cli import run
from poe_models import CheckpointError, ProductOfExperts, TaskVectors, open_checkpoint
from poe_models.weights.lora import LoraCheckpoint
from tests.outputs.toys import COMMANDS, INPUTS, SAMPLE, SHAPES, State, drawn, fails, saved
from tests.streaming.toys import Ticks, contents


def test_links_out_of_the_bases_folder_are_not_followed(cli: Any, here: Path) -> None:
    private = here / "home"
    private.mkdir()
    (private / "id_rsa").write_text("PRIVATE")
    (private / "secret.json").write_text('{"password": 1}')
    base = here / "base"
    (base / "assets").symlink_to(private)
    (base / "vocab.txt").symlink_to(private / "secret.json")
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(private / "secret.json")
    (base / "inner").mkdir()
    (base / "inner" / "merges.txt").symlink_to(private / "id_rsa")
    (base / "notes.sqlite").write_text("unknown")
    os.mkfifo(base / "pipe.json")
    (base / "tokenizer.json").write_text("{}")
    (base / "same.json").symlink_to(base / "tokenizer.json")
    (base / "loop.json").symlink_to("loop.json")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    status, err = cli("merge", *INPUTS, "--out-dtype", "bfloat16", "--out", "out")
    assert status == 0, err
    copied = ["same.json", "tokenizer.json", "1_Pooling/config.json"]
    assert json.loads((here / "out" / "poe_merge.json").read_text())["copied"] == copied
    assert set(contents(here / "out")) == {*copied, "README.md", "poe_merge.json", "model.safetensors"}
    assert not any(b"PRIVATE" in each or b"password" in each for each in contents(here / "out").values())
    assert "left in the base's folder" in err
    assert "vocab.txt" in err
    assert all(name in err for name in ("assets", "config.json", "inner", "loop.json", "notes.sqlite", "pipe.json"))


def test_a_snapshot_of_the_hubs_cache_comes_along(cli: Any, here: Path) -> None:
    model = here / "models--org--name"
    snapshot, blobs = model / "snapshots" / "0a1b", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (here / "base" / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob-{name}")
    (here / "other").mkdir()
    (here / "other" / "vocab.txt").write_text("x")
    (snapshot / "vocab.txt").symlink_to(here / "other" / "vocab.txt")
    arguments = ["merge", "--base-model", str(snapshot), *INPUTS[2:], "--out", "out"]
    assert cli(*arguments)[0] == 0
    assert json.loads((here / "out" / "poe_merge.json").read_text())["copied"] == ["config.json"]


def test_a_file_that_lacks_a_tensor_is_not_moved_into_place(
    cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(tensors: State, path: Path, metadata: Any = None, *, spared: str = "parts") -> None:
        whole = spared in Path(path).parts
        save_file({k: v for k, v in tensors.items() if whole or k != "b.weight"}, path, metadata=metadata)

    cli("merge", *INPUTS, "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "save_file", forgetful)
        message = fails(cli, *COMMANDS["merge"])
        assert "model.safetensors: tensor 'b.weight' is None, expected (torch.float32, (4, 6))" in message
        assert "go on with `--resume`" in message
        patch.setattr(staging_module, "save_file", partial(forgetful, spared="nothing"))  # a member is its one part
        message = fails(cli, *SAMPLE, "--out", "members")
        assert "tensor 'b.weight' is None" in message
    assert not (here / "out").exists()
    assert cli(*COMMANDS["merge"], "--resume")[0] == 0
    assert load_file(here / "out" / "model.safetensors").keys() == SHAPES.keys()


def test_shards_of_one_name_and_another_suffix(cli: Any, here: Path) -> None:
    state, base = drawn(0), here / "base"
    (base / "model.safetensors").unlink()
    torch.save({"a.weight": state["a.weight"]}, base / "pytorch_model.bin")
    save_file({name: state[name] for name in ("b.weight", "c.bias")}, base / "part.safetensors")
    places = dict.fromkeys(SHAPES, "part.safetensors") | {"a.weight": "pytorch_model.bin"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert cli(*COMMANDS["merge"])[0] == 0
    assert set(open_checkpoint(here / "out").tensors) == set(SHAPES)


def test_a_header_that_would_be_too_large_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint({f"{i}.weight": torch.ones(1) for i in range(100)})
    assert list(weight_files(base)) == ["model.safetensors"]
    monkeypatch.setattr("inference.models.folder._HEADER_BYTES", 2000)
    files = weight_files(base)
    assert [name for names in files.values() for name in names] == list(base.tensors)
    assert all(len(names) < 20 for names in files.values())
    assert "model.safetensors" not in files


def test_a_second_run_is_told_of_the_first(cli: Any, here: Path) -> None:
    messages = []
    vectors = TaskVectors("base", {"x": "x", "y": "y"})

    def second() -> None:
        messages.extend([fails(cli, *COMMANDS["merge"]), fails(cli, *COMMANDS["merge"], "--resume")])

    merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), "out", batch_bytes=1, progress=Ticks(0, second))
    assert all("another process is writing into" in each for each in messages)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("nbytes", [100, 1500])
def test_a_limit_on_files_is_one_error_of_every_command(command: str, nbytes: int, here: Path, capfd: Any) -> None:
    run(["merge", *INPUTS, "--out", "done"])
    capfd.readouterr()
    err: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poe_merge.console.error", err.append)  # what it prints to is a file under the same limit
        patch.setattr("poe_merge.console.warning", lambda text: None)
        with largest_file(nbytes):
            status = run(COMMANDS[command])
    assert (status, len(err)) == (2, 1)
    assert "would be larger than files may be here (`ulimit -f`" in err[0]
    resume = ("--resume",) if command in ("merge", "sample", "deltas") else ()
    assert ("`--resume`" in err[0]) == bool(resume)
    assert run([*COMMANDS[command], *resume]) == 0


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9 bytes.",
        "CUDA out of memory. Tried to allocate 9.00 GiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_out_of_memory_says_what_was_needed(said: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("inference.models.merge.merge_batch", full)
    vectors = TaskVectors("base", {"x": "x", "y": "y"})
    with pytest.raises(OutOfMemory, match=r"out of memory on cpu at 'a.weight', which take 1.4 kB .*Free memory"):
        merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), "out")


def adapter(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_without_tensors_and_of_complex_factors(here: Path) -> None:
    base = open_checkpoint("base")
    with pytest.raises(CheckpointError, match="the adapter has no tensors. Save it again"):
        LoraCheckpoint(adapter(here / "empty", {}), base)
    factors = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}
    LoraCheckpoint(adapter(here / "real", factors), base)
    with pytest.raises(CheckpointError, match=r"tensor 'a.lora_A.weight' is torch.complex64, not real"):
        LoraCheckpoint(adapter(here / "complex", {name: each.cfloat() for name, each in factors.items()}), base)


def test_complex_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype complex128. Give probabilities in float32 or float64"):
        checked_probabilities(np.full((2, 2), 0.5 + 0.5j), "score")


def test_a_mask_of_minus_infinity_stays(cli: Any, here: Path) -> None:
    mask = torch.full((4, 4), -torch.inf).triu(1)
    for seed, name in enumerate(("base", "x", "y")):
        saved(here / name, {**drawn(seed), "attn_mask": mask})
    rule = ("--rule", "{match: attn_mask, action: base}")
    for command, place in (("merge", "out"), ("sample", "out2/member-000")):
        arguments = [*COMMANDS[command][:-1], place.partition("/")[0]]
        assert cli(arguments[0], *rule, *arguments[1:])[0] == 0
        assert torch.equal(load_file(here / place / "model.safetensors")["attn_mask"], mask)


def test_a_tensor_with_the_name_of_anothers_matrix(cli: Any, here: Path) -> None:
    for seed, name in enumerate(("base", "x", "y")):
        saved(here / name, drawn(seed, {"a.qkv.weight": (12, 4), "a.qkv.weight[1]": (4, 4)}))
    message = fails(cli, *COMMANDS["merge"])
    assert "tensor 'a.qkv.weight[1]' has the name of a matrix of 'a.qkv.weight'" in message
    rule = message.partition("the rule ")[2].partition(", or rename")[0]
    status, err = cli("merge", "--rule", rule, *COMMANDS["merge"][1:])
    assert status == 0, (rule, err)


def test_a_dtype_that_safetensors_lacks_is_refused(cli: Any, here: Path) -> None:
    (here / "base" / "model.safetensors").unlink()
    saved(here / "base", {**drawn(0), "phases": torch.ones(2, dtype=torch.complex128)}, "bin")
    for command in ("merge", "sample"):
        message = fails(cli, *COMMANDS[command])
        assert "tensor 'phases' is torch.complex128, which safetensors files and merges cannot hold" in message
    assert not list(here.glob("out*"))


def test_a_tensor_called_metadata_is_refused(cli: Any, here: Path) -> None:
    for seed, name in enumerate(("base", "x", "y")):
        (here / name / "model.safetensors").unlink()
        saved(here / name, {**drawn(seed), "__metadata__": torch.full((2, 2), float(seed))}, "bin")
    assert "has a tensor called '__metadata__', a name that safetensors files" in fails(cli, *COMMANDS["merge"])
