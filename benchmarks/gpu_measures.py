"""What the benchmark of a GPU measures, and on what: sizes, random models, seconds and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness.memory import Anonymous

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
        repeats: Runs of a solve on the GPU after the warm-up.
    """

    layers: tuple[Shape, ...]
    blocks: tuple[tuple[str, tuple[tuple[int, Shape], ...], bool], ...]
    drawn: Shape
    draws: tuple[int, int, int]
    models: tuple[tuple[int, tuple[str, ...]], ...]
    width: int
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
