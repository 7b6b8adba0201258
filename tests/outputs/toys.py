"""Arguments of commands, and small weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


SHAPES = {"a.weight": (4, 4), "b.weight": (4, 6), "c.bias": (4,)}


INPUTS = ("--base-model", "base", "--model", "x=x", "--model", "y=y")


SAMPLE = ("sample", *INPUTS, "-n", "2", "--draws", "4", "--warmup", "1", "--chains", "2")


COMMANDS = {
    "merge": ("merge", *INPUTS, "--batch-bytes", "1", "--out", "out"),
    "stats": ("stats", *INPUTS, "--out", "out"),
    "sample": (*SAMPLE, "--out", "out"),
    "deltas": (*SAMPLE, "--format", "deltas", "--out", "out"),
    "diagnose": ("diagnose", "done", "--surrogates", "0", "--out", "report.html"),
}


def saved(folder: Path, state: State, suffix: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    if suffix == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    return folder


def drawn(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fails(cli: Any, *arguments: str) -> str:
    status, err = cli(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, len(errors)) == (2, 1), err
    assert "Traceback" not in err
    return errors[0]
