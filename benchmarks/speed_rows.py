"""What the benchmark of speed runs, each in a process of its own, and what the process has used in the end."""

from __future__ import annotations

import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.memory import Anonymous
from benchmarks.speed_models import Shapes, opened
from inference import fixed_point, gibbs, laplace
from inference.models.design import Design
from inference.models.merge import merge_checkpoint, plan
from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.statistics_files import collect_statistics
from poe_models import (
    Average,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    InputGram,
    OutputGram,
    ProductOfExperts,
    ResidualMap,
    TaskArithmetic,
    TaskVectors,
    Ties,
)

DRAWS, SWEEPS = 10, 20
Work = Callable[[Path, Shapes, torch.device], int]
"""From the folder of a base and its experts, and the device that computes, to the number of matrices that did not
converge."""


def product(vectors: TaskVectors, residual_map: ResidualMap, energy: Energy) -> ProductOfExperts:
    """One expert for every task vector, with the default scale and anchor."""
    return ProductOfExperts.of(vectors.names, residual_map, energy)


def copying(folder: Path, shapes: Shapes, device: torch.device) -> int:
    """A plain copy of all checkpoints."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for index, path in enumerate(sorted(folder.glob("*/model.safetensors"))):
            shutil.copyfile(path, Path(out) / str(index))
    return 0


def merging(design: Callable[[TaskVectors], AnyDesign | ProductOfExperts]) -> Work:
    """A whole merge: checksums, reading, solving, writing."""

    def work(folder: Path, shapes: Shapes, device: torch.device) -> int:
        vectors = opened(folder, shapes, device)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return len(merge_checkpoint(vectors, design(vectors), Path(out) / "merged").not_converged)

    return work


def merging_by(residual_map: ResidualMap, energy: Energy) -> Work:
    """A whole merge by a product of experts."""
    return merging(lambda vectors: product(vectors, residual_map, energy))


def planning(folder: Path, shapes: Shapes, device: torch.device) -> int:
    """A plan, from headers."""
    vectors = opened(folder, shapes, device)
    plan(vectors, product(vectors, InputGram(), Gaussian()))
    return 0


def statistics(folder: Path, shapes: Shapes, device: torch.device) -> int:
    """One pass over the weights, after which everything in the span of the updates is small."""
    vectors = opened(folder, shapes, device)
    collect_statistics(vectors, Design(product(vectors, InputGram(), Cauchy()), coordinates="span"))
    return 0


def bare(folder: Path, shapes: Shapes, device: torch.device) -> int:
    """The algebra of a merge by input Grams and nothing else: Grams, right-hand sides, one Cholesky, one solve."""
    for module in opened(folder, shapes, device):
        size = module.updates.shape[-1]
        matrix, right = module.base.new_zeros(size, size), torch.zeros_like(module.base)
        for update in module.updates:
            gram = update.mT @ update
            right += update @ gram
            matrix += gram
        matrix.diagonal().add_(0.1 * matrix.diagonal().mean())
        torch.cholesky_solve(right.mT, torch.linalg.cholesky(matrix))
    return 0


def solving(draws: Callable[[ProductOfExperts, Tensor], bool]) -> Work:
    """The MAP of every matrix, read as a merge reads it, and what is drawn around it."""

    def work(folder: Path, shapes: Shapes, device: torch.device) -> int:
        vectors = opened(folder, shapes, device)
        poe = product(vectors, InputGram(), Cauchy())
        return sum(not draws(poe, module.updates.unsqueeze(0)) for module in vectors)

    return work


def mode(poe: ProductOfExperts, updates: Tensor) -> bool:
    """The MAP alone; true if it converged, as of the next two."""
    return fixed_point(poe.bind(updates)).converged


def laplace_draws(poe: ProductOfExperts, updates: Tensor) -> bool:
    """The MAP, and draws of Laplace's approximation there."""
    posterior = poe.bind(updates)
    solution = fixed_point(posterior)
    draws = laplace(posterior, solution).sample(DRAWS, torch.Generator(updates.device).manual_seed(0))
    for index in range(DRAWS):
        draws.latents(0, index)
    return solution.converged


def gibbs_draws(poe: ProductOfExperts, updates: Tensor) -> bool:
    """Exact draws after a short warm-up."""
    posterior = poe.bind(updates)
    draws = gibbs(posterior, DRAWS, generator=torch.Generator(updates.device).manual_seed(0), chains=1, warmup=SWEEPS)
    for index in range(DRAWS):
        draws.latents(0, index)
    return True


ROWS: dict[str, Work] = {
    "copy": copying,
    "plan": planning,
    "average": merging(lambda vectors: MethodDesign(Average())),
    "task arithmetic": merging(lambda vectors: MethodDesign(TaskArithmetic())),
    "TIES": merging(lambda vectors: MethodDesign(Ties())),
    "Directional, Gaussian": merging_by(Directional(), Gaussian()),
    "InputGram, Gaussian": merging_by(InputGram(), Gaussian()),
    "InputGram, Cauchy": merging_by(InputGram(), Cauchy()),
    "OutputGram, Gaussian": merging_by(OutputGram(), Gaussian()),
    "OutputGram, Cauchy": merging_by(OutputGram(), Cauchy()),
    "bare algebra": bare,
    "Span statistics": statistics,
    "MAP": solving(mode),
    "ten Laplace draws": solving(laplace_draws),
    "ten Gibbs draws": solving(gibbs_draws),
}


def measured(work: Callable[[], int]) -> dict[str, float]:
    """CPU and wall seconds, the peak of anonymous memory in bytes, and bytes read and written by this process."""
    watch, before, read, written = Anonymous(), Anonymous.now(), *transferred()
    watch.start()
    wall, cpu, system = time.monotonic(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
    numbers = {
        "unconverged": work(),
        "cpu": time.process_time() - cpu,
        "wall": time.monotonic() - wall,
        "system": resource.getrusage(resource.RUSAGE_SELF).ru_stime - system,
    }
    watch.done.set()
    watch.join()
    after = transferred()
    return numbers | {"peak": watch.peak, "before": before, "read": after[0] - read, "written": after[1] - written}


def transferred() -> tuple[int, int]:
    """Bytes that this process has read and written by calls of the system, from the disk or its cache."""
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    read, written = (re.search(rf"{name}: (\d+)", text) for name in ("rchar", "wchar"))
    assert read is not None
    assert written is not None
    return int(read[1]), int(written[1])
