"""What the benchmark of a GPU measures, and on what: sizes, random models, seconds and peak memory."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness.memory import Anonymous
from benchmarks.speed_models import Shapes

CPU = torch.device("cpu")
SEED = 0
EXPERTS = 4
RANK = 16
NOISE = 0.3
"""Size of the noise beside the low-rank part, per entry."""
Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        layers: Matrices of the comparison of devices.
        blocks: Name of a model, its modules as counts of shapes, and whether the CPU is measured, too.
        drawn: The matrix that is drawn.
        draws: Gibbs steps and chains, Laplace draws.
        models: Layers of whole models, and the devices that merge them.
        width: Width of these models.
        speed: Shapes of the models of `benchmarks.speed_rows`, by their name there.
        large: Layers, hidden and intermediate width, vocabulary, layers in a shard, and experts of a sharded model.
        precise: The matrix whose MAP is found with less precise products.
        suites: Suites whose merges are made and judged in both places, with most test examples of a task.
        repeats: Runs of a solve on the GPU after the warm-up.
    """

    layers: tuple[Shape, ...]
    blocks: tuple[tuple[str, tuple[tuple[int, Shape], ...], bool], ...]
    drawn: Shape
    draws: tuple[int, int, int]
    models: tuple[tuple[int, tuple[str, ...]], ...]
    width: int
    speed: str
    large: tuple[int, int, int, int, int, int]
    precise: Shape
    suites: tuple[tuple[str, ...], int]
    repeats: int
    rank: int = RANK

    @classmethod
    def full(cls) -> Sizes:
        """Real layers."""
        large = 4096
        return cls(
            layers=((768, 768), (3072, 768), (1024, 4096)),
            blocks=(
                ("ViT-B/32", transformer(768), True),
                ("ViT-L/14", transformer(1024), True),
                (
                    "Llama-3-8B",
                    ((2, (large, large)), (2, (1024, large)), (2, (14336, large)), (1, (large, 14336))),
                    False,
                ),
            ),
            drawn=(768, 3072),
            draws=(5, 4, 10),
            models=((2, ("CPU", "GPU")), (24, ("GPU",))),
            width=1024,
            speed="llama",
            large=(32, large, 11008, 32_000, 4, 3),
            precise=(large, large),
            suites=(("vision", "language"), 300),
            repeats=3,
        )

    @classmethod
    def small(cls) -> Sizes:
        """Small ones, in seconds on any machine."""
        return cls(
            layers=((24, 24), (40, 16)),
            blocks=(("ViT-B/32", transformer(16), True), ("Llama-3-8B", ((2, (24, 24)), (1, (24, 56))), False)),
            drawn=(12, 20),
            draws=(3, 2, 4),
            models=((1, ("CPU", "GPU")), (2, ("GPU",))),
            width=16,
            speed="2 24 16 3",
            large=(3, 16, 24, 30, 2, 2),
            precise=(24, 24),
            suites=((), 8),
            repeats=2,
        )


def transformer(width: int) -> tuple[tuple[int, Shape], ...]:
    """The matrices of one block: attention's four, and the two of the MLP."""
    return (4, (width, width)), (1, (4 * width, width)), (1, (width, 4 * width))


@dataclass(frozen=True)
class Spent:
    """Cost of some work.

    Args:
        seconds: Median of the runs.
        peak: Most bytes of torch's allocator on a GPU; None on a CPU.
        main: Most bytes of anonymous main memory of this process, what it held before included.
    """

    seconds: float
    peak: int | None
    main: int

    @property
    def mebibytes(self) -> str:
        """The GPU's peak for a table."""
        return "" if self.peak is None else f"{self.peak / 2**20:.0f}"


def measured(work: Callable[[], object], device: torch.device, repeats: int) -> Spent:
    """Run some work and wait for the device.

    Args:
        work: What is measured.
        device: Where it computes.
        repeats: Measured runs; on a GPU one comes before them as warm-up. With 0 there is one run and no warm-up.
    """
    gpu = device.type == "cuda"
    if gpu and repeats:
        work()
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    watch = Anonymous()
    watch.start()
    seconds = []
    for _ in range(max(repeats, 1)):
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    watch.done.set()
    watch.join()
    peak = torch.cuda.max_memory_allocated(device) if gpu else None
    return Spent(statistics.median(seconds), peak, max(watch.peak, Anonymous.now()))


def random_updates(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Updates `(M, N, d_out, d_in)` of low rank with noise, drawn where they are to be."""
    generator = torch.Generator(device).manual_seed(seed)
    *leading, d_out, d_in = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*leading, *size, generator=generator, device=device)

    updates = normal(d_out, d_in).mul_(NOISE)
    return updates.add_(normal(d_out, RANK) @ normal(RANK, d_in) / RANK**0.5).mul_(1e-3)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Of entries, relative to the largest of `other`.

    >>> largest_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    0.2
    """
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def write_shards(
    home: Path, shapes: Shapes, layers_in_shard: int, seed: int, device: torch.device, dtype: torch.dtype
) -> list[Path]:
    """Write a base and experts as shards with an index, drawn on a device; the base's noise is 20 times an update's.

    Args:
        home: Folder of `base` and `expert1` and so on.
        shapes: Names and shapes, and the number of experts.
        layers_in_shard: Layers of a shard; what is of no layer is in the first or the last.
        seed: Of all values.
        device: Where they are drawn.
        dtype: In which they are stored.

    Returns:
        The folders.
    """
    folders = [home / ("base" if index == 0 else f"expert{index}") for index in range(shapes.experts + 1)]
    shards: list[list[str]] = []
    for name in shapes.tensors:
        found = re.search(r"layers\.(\d+)\.", name)
        place = int(found[1]) // layers_in_shard if found else max(len(shards) - 1, 0)
        shards += [[] for _ in range(place + 1 - len(shards))]
        shards[place].append(name)
    files = {
        name: f"model-{at:05}-of-{len(shards):05}.safetensors" for at, names in enumerate(shards, 1) for name in names
    }
    generator = torch.Generator(device).manual_seed(seed)
    with ThreadPoolExecutor(4) as pool:
        for names in shards:
            base = {n: torch.randn(shapes.tensors[n], generator=generator, device=device).mul_(0.02) for n in names}
            saved = []
            for index, folder in enumerate(folders):
                folder.mkdir(parents=True, exist_ok=True)
                state = {}
                for name, value in base.items():
                    noise = torch.randn(value.shape, generator=generator, device=device).mul_(1e-3 if index else 0.0)
                    state[name] = noise.add_(value).to(dtype).cpu()
                saved.append(pool.submit(save_file, state, folder / files[names[0]], {"format": "pt"}))
            for each in saved:
                each.result()
    for folder in folders:
        listed = json.dumps({"metadata": {}, "weight_map": files})
        (folder / "model.safetensors.index.json").write_text(listed, encoding="utf-8")
    return folders


def write_models(home: Path, layers: int, width: int, experts: int, seed: int, device: torch.device) -> int:
    """Write `base` and the experts of transformer blocks in float32; returns the parameters of one."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        name = f"layers.{layer}"
        matrices: dict[str, Shape] = {
            f"attention.{part}": (width, width) for part in ("query", "key", "value", "output")
        }
        matrices |= {"mlp.in": (4 * width, width), "mlp.out": (width, 4 * width)}
        for part, shape in matrices.items():
            shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        shapes |= {f"{name}.norm{i}.{part}": (width,) for i in range(2) for part in ("weight", "bias")}
    base: dict[str, Tensor] = {}
    for index in range(experts + 1):
        state = {}
        for name, size in shapes.items():
            noise = torch.randn(size, generator=generator, device=device).cpu()
            state[name] = noise.mul_(0.02) if index == 0 else noise.mul_(1e-3).add_(base[name])
        base = base or state
        folder = home / ("base" if index == 0 else f"expert{index - 1}")
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(value.numel() for value in base.values())
