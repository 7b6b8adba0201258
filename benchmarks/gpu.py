"""The toolkit on a GPU: agreement with the CPU, draws per second, the merge of a whole checkpoint, times of the MAP.

`python -m benchmarks.gpu` writes `benchmarks/results/gpu.md` on a machine with a GPU; updates are random, of low rank
with noise. `--small` tries everything but the suites on small matrices in seconds, `--device cpu` where there is no
GPU: then both columns are the CPU's.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.gpu_measures import (
    CPU,
    EXPERTS,
    SEED,
    Shape,
    Sizes,
    Spent,
    largest_difference,
    measured,
    random_updates,
)
from benchmarks.gpu_models import checkpoints, seven_billion, speeds, suites
from inference import Design, fixed_point, gibbs, laplace, plain_iterates
from inference.models.memory import merged_bytes
from poe_models import (
    Balanced,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    Posterior,
    ProductOfExperts,
    ResidualMap,
    StudentT,
    Welsch,
)

AGREEING = 8
"""Experts of the comparison of devices."""
STEPS = 2
"""Reweighted solves of the comparison of maps; a MAP takes more, and no other operations."""
Maps = ResidualMap | tuple[ResidualMap, ...]
MAPS: tuple[Maps, ...] = (
    Identity(),
    Directional(),
    OutputGram(),
    InputGram(),
    (OutputGram(), InputGram()),
)
ENERGIES: tuple[Energy, ...] = (
    Gaussian(),
    Cauchy(),
    StudentT(4.0),
    Welsch(),
    Huber(1.0),
    GeneralizedGaussian(1.0),
)


def name_of(residual_map: Maps) -> str:
    """Maps in words.

    >>> name_of((OutputGram(), InputGram()))
    'OutputGram + InputGram'
    """
    maps = residual_map if isinstance(residual_map, tuple) else (residual_map,)
    return " + ".join(type(each).__name__ for each in maps)


def shape_of(shape: Shape) -> str:
    """Rows and columns.

    >>> shape_of((3072, 768))
    '3072 x 768'
    """
    return f"{shape[0]} x {shape[1]}"


def product(residual_map: Maps, energy: Energy, experts: int) -> ProductOfExperts:
    """Experts that all have one map and one energy."""
    return ProductOfExperts.of([f"expert{i}" for i in range(experts)], residual_map, energy, Balanced())


def stepped(posterior: Posterior) -> Tensor:
    """The merged update after some reweighted solves from the weights of the Gaussian twin."""
    iterates = plain_iterates(posterior, posterior.weights(torch.zeros_like(posterior.active, dtype=torch.float64)))
    return [next(iterates) for _ in range(STEPS)][-1]


def solved(posterior: Posterior) -> Tensor:
    """The MAP from one start."""
    return fixed_point(posterior, starts=("twin",)).value


# --- tables: the lines of each, as Markdown ---


def agreement(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Differences between the devices and precisions, for every map and every energy.

    Yields:
        Lines of the table.
    """
    yield "| map | energy | matrix | what | GPU and CPU, float32 | GPU float32, CPU float64 | CPU float32, float64 |"
    yield "|---|---|---|---|---:|---:|---:|"
    cases: list[tuple[Maps, Energy, Shape, Callable[[Posterior], Tensor], str]] = [
        (each, Cauchy(), shape, stepped, f"{STEPS} solves") for shape in sizes.layers for each in MAPS
    ]
    cases += [(InputGram(), each, sizes.layers[0], solved, "MAP") for each in ENERGIES]
    for residual_map, energy, shape, found, what in cases:
        updates = random_updates((1, AGREEING, *shape), SEED, CPU)
        poe = product(residual_map, energy, AGREEING)
        exact, here, there = (found(poe.bind(each)).cpu() for each in (updates.double(), updates, updates.to(device)))
        differences = (largest_difference(*pair) for pair in ((there, here), (there, exact), (here, exact)))
        numbers = " | ".join(f"{each:.1e}" for each in differences)
        energy_name = repr(energy).replace("()", "")
        yield f"| {name_of(residual_map)} | {energy_name} | {shape_of(shape)} | {what} | {numbers} |"


def times(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Seconds of the MAP of each batch of modules of one block of a model, and of all of them.

    Yields:
        Lines of the table.
    """
    yield (
        "| block | modules | CPU s | GPU s | CPU / GPU | peak GPU MiB | of it updates | predicted by `plan`, MiB |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|"
    )
    poe = product(InputGram(), Cauchy(), EXPERTS)
    for name, batches, on_cpu in sizes.blocks:
        total_here, total_there = 0.0, 0.0
        for count, shape in batches:
            there = _map_on(device, poe, count, shape, sizes.repeats if on_cpu else 1)
            here = _map_on(CPU, poe, count, shape, 1).seconds if on_cpu else None
            total_here, total_there = total_here + (here or 0.0), total_there + there.seconds
            predicted = merged_bytes(Design(poe), EXPERTS, [[shape]] * count, 4, device)
            held = 4 * count * EXPERTS * shape[0] * shape[1]
            numbers = (
                f"{_ratio(here, there.seconds)} | {there.mebibytes} | {held / 2**20:.0f} | {predicted / 2**20:.0f}"
            )
            yield f"| {name} | {count} of {shape_of(shape)} | {numbers} |"
        modules = sum(count for count, _ in batches)
        yield f"| {name} | all {modules} | {_ratio(total_here if on_cpu else None, total_there)} | | | |"


def _map_on(device: torch.device, poe: ProductOfExperts, count: int, shape: Shape, repeats: int) -> Spent:
    updates = random_updates((count, EXPERTS, *shape), SEED, device)
    return measured(lambda: solved(poe.bind(updates)), device, repeats)


def _ratio(here: float | None, there: float) -> str:
    if here is None:
        return f"not measured | {there:.3f} | "
    return f"{here:.3f} | {there:.3f} | {here / there:.1f}"


def draws(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Draws per second of a module in Full coordinates.

    Yields:
        Lines of the table.
    """
    yield "| sampler | matrix | setting | CPU draws / s | GPU draws / s | GPU / CPU |\n|---|---|---|---:|---:|---:|"
    poe = product(InputGram(), Cauchy(), EXPERTS)
    steps, chains, made = sizes.draws
    rates: dict[str, list[float]] = {"Gibbs": [], "Laplace": []}
    for place in (CPU, device):
        posterior = poe.bind(random_updates((1, EXPERTS, *sizes.drawn), SEED, place))
        generator = torch.Generator(place).manual_seed(SEED)

        def chain(posterior: Posterior = posterior, generator: torch.Generator = generator) -> object:
            return gibbs(posterior, steps, generator=generator, chains=chains, warmup=0)

        rates["Gibbs"].append(chains * steps / measured(chain, place, 1).seconds)
        around = laplace(posterior, at=fixed_point(posterior))

        def independent(around: object = around, generator: torch.Generator = generator) -> Tensor:
            values: Tensor = around.sample(made, generator).values  # type: ignore[attr-defined]
            return values

        rates["Laplace"].append(made / measured(independent, place, 1).seconds)
    settings = {"Gibbs": f"{chains} chains of {steps} steps", "Laplace": f"{made} draws at the MAP"}
    for name, (here, there) in rates.items():
        numbers = f"{here:.1f} | {there:.1f} | {there / here:.1f}"
        yield f"| {name} | {shape_of(sizes.drawn)} | {settings[name]} | {numbers} |"


def precisions(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """What less precise products of float32 matrices cost and give.

    Yields:
        Lines of the table.
    """
    yield "| precision | energy | s | from float64 on the device | converged |\n|---|---|---:|---:|---|"
    updates = random_updates((1, EXPERTS, *sizes.precise), SEED, device)
    for energy in (Gaussian(), Cauchy()):
        poe = product(InputGram(), energy, EXPERTS)
        exact = solved(poe.bind(updates.double()))
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            found = fixed_point(poe.bind(updates), starts=("twin",))
            spent = measured(lambda: solved(poe.bind(updates)), device, sizes.repeats)  # noqa: B023
            torch.set_float32_matmul_precision("highest")
            off = largest_difference(found.value, exact)
            yield f"| {precision} | {type(energy).__name__} | {spent.seconds:.3f} | {off:.1e} | {found.converged} |"


# --- the page ---

SECTIONS = {
    "Agreement": (
        agreement,
        f"Largest difference of an entry of the merged update, relative to the largest entry; {AGREEING} experts.",
    ),
    "Draws": (
        draws,
        f"InputGram, Cauchy, {EXPERTS} experts, float32, Full coordinates, one module. Gibbs from its start, and "
        "without making the kept draws again; Laplace's draws made.",
    ),
    "Whole checkpoints": (
        checkpoints,
        f"`merge_checkpoint` of {EXPERTS} float32 experts of random transformer blocks of ViT-L/14's shapes in a "
        "temporary folder, InputGram, Cauchy; one run, files in the page cache. The checksums of all inputs are "
        "included, and the default starts and batches of modules.",
    ),
    "Time of the MAP": (
        times,
        f"`fixed_point` from the Gaussian twin's weights, InputGram, Cauchy, {EXPERTS} experts, float32, one block of "
        "a model with the modules of one shape in a batch. GPU: median of three runs after a warm-up, "
        "one of Llama's; CPU: one run. Peak memory is "
        "that of torch's allocator during the solve, the updates included.",
    ),
    "Rows of the benchmark of speed": (
        speeds,
        "What `python -m benchmarks.speed` measures on a CPU, on the GPU, on the same random models (109.5 million "
        "float32 parameters, 4 experts): wall seconds of one run each, files in the page cache, all in one process.",
    ),
    "Seven billion weights": (
        seven_billion,
        "`merge_checkpoint` of random bfloat16 experts of Llama-2-7B's shapes, in shards that were written just "
        "before and are in the page cache as far as there is room; InputGram, Cauchy, the default batches of 64 MiB. "
        "All input is read twice: for the checksums, and to merge.",
    ),
    "Less precise products": (
        precisions,
        "`torch.set_float32_matmul_precision` (`--matmul-precision`): the MAP of one matrix of 4096 x 4096, 4 experts, "
        "InputGram, float32. *high* is TF32 on a GPU, and so is *medium* there. Differences are of entries, relative "
        "to the largest.",
    ),
    "Both suites": (
        suites,
        "Merges made and judged on the device and on the CPU: mean over tasks of at most 300 test examples each, "
        "experts of training seed 0 at full size, trained on the GPU if the cache lacks them. Task arithmetic with "
        "λ = 0.3, InputGram, Cauchy with the default η and λ = 1, and the fit of one expert a task on predictions of "
        "128 unlabelled examples. TF32 off in convolutions, too. The times include reading the experts.",
    ),
}


def hardware(device: torch.device) -> str:
    """The machine in words."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU ({device})"
    return (
        f"GPU: {card}. CPU: {processor}, {cores} cores, {torch.get_num_threads()} threads of torch. torch "
        f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {platform.python_version()}; TF32 off."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page, section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small matrices, to try it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.md"))
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="TITLE")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {given.device}: there is no GPU here, or torch cannot use it. Try --device cpu --small."
        )
    device, sizes = torch.device(given.device), Sizes.small() if given.small else Sizes.full()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    flags = ["--device", given.device, *(["--small"] if given.small else [])]
    lines = [
        f"{hardware(device)}\nRandom updates of rank {sizes.rank} with noise, seed {SEED}. Made by "
        f"`python -m benchmarks.gpu {shlex.join(flags)}`.\n"
    ]
    console = Console()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for title in given.sections:
        table, about = SECTIONS[title]
        lines += [f"## {title}\n", f"{about}\n"]
        for line in table(device, sizes):
            lines.append(line)
            console.print(line, markup=False)
            given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")  # what is measured stays
        lines.append("")
    given.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
