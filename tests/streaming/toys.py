"""Small checkpoints to merge, what was written of them, and processes that stop at a file operation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from poe_models import ProductOfExperts, TaskVectors

SHAPES = {
    "embed.weight": (10, 4),
    "layers.0.attn.in_proj_weight": (12, 4),
    "layers.0.mlp.weight": (8, 4),
    "layers.0.mlp.bias": (8,),
    "layers.1.attn.in_proj_weight": (12, 4),
    "layers.1.mlp.weight": (8, 4),
    "layers.1.conv.weight": (4, 2, 3, 3),
    "head.weight": (5, 8),
}


State = dict[str, Tensor]


def states(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made = {"base": base}
    for name in ("mnist", "emoji", "animals"):
        made[name] = {k: w + 0.1 * torch.randn(w.shape, generator=generator) for k, w in base.items()}
    for state in made.values():
        for name in state:
            state[name] = state[name].to(dtype)
        state["position_ids"] = torch.arange(7)
    return made


def save_folder(folder: Path, state: State, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, held in files.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def poe(vectors: TaskVectors, **options: Any) -> ProductOfExperts:
    return ProductOfExperts.of(vectors.names, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "poe_merge.json").read_text())


class Ticks:
    """A progress that counts, and can stop the merge at any call."""

    def __init__(self, stop_at: int | None = None, stop: Callable[[], None] | None = None) -> None:
        self.announced: dict[str, tuple[int, int]] = {}
        self.done: dict[str, list[int]] = {}
        self.calls = 0
        self.stop_at = stop_at
        self.stop = stop

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self.announced[stage] = (modules, nbytes)
        self.done[stage] = [0, 0]
        self.stage = stage

    def advance(self, modules: int, nbytes: int) -> None:
        self.done[self.stage][0] += modules
        self.done[self.stage][1] += nbytes
        if self.stage == "merging":
            if self.calls == self.stop_at and self.stop is not None:
                self.stop()
            self.calls += 1


class Killed(BaseException):
    """The process was killed: from then on it does nothing to the disk."""


class Operations:
    """Counts operations that change files, and ends with the one that it is told to end with."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0


ARMED: list[Operations] = []


def _watch(event: str, arguments: Any) -> None:
    if not ARMED or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
        return
    if ARMED[0].count == ARMED[0].last:
        raise Killed
    ARMED[0].count += 1


sys.addaudithook(_watch)


@contextmanager
def killed_at(operation: int) -> Iterator[Operations]:
    ARMED.append(Operations(operation))
    try:
        yield ARMED[0]
    finally:
        ARMED.clear()
