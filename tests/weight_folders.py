"""Checkpoints written in every form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

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
