"""Draws of a whole model in Full coordinates, a module at a time, and where they can be made again bit for bit."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from inference.draws import Draws
from inference.gibbs import GibbsKernel, gibbs
from inference.laplace import Laplace
from inference.merge_distance import MergeDistance
from inference.models.artifacts import matmul_precision
from inference.models.design import Design, Designs, as_function, design_text
from inference.models.digest import Progress, Silent
from inference.models.model_draws import FullDraws
from inference.models.modules import Module, feed, merged_tensors, merged_update, module_names, read_modules
from inference.models.ranks import ALONE, Ranks
from inference.models.surrounding import distance_of_module, gibbs_distance
from poe_models.module_names import not_drawn, with_names
from poe_models.sums import sum_of_squares
from poe_models.weights.patterns import pattern as regular
from poe_models.weights.task_vectors import TaskVectors

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Largest difference of a draw made again with other threads or another torch, relative to its largest entry."""


class RegenerationWarning(UserWarning):
    """Warning that Full draws are regenerated on another device, torch version or number of threads."""


def sample_full(
    task_vectors: TaskVectors,
    design: Designs,
    num_samples: int,
    *,
    generator: torch.Generator,
    sampler: Literal["gibbs", "laplace"] = "gibbs",
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    pattern: str = "",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> FullDraws:
    """Draw merged updates themselves, one module in memory at a time.

    The noise of a module is its own: it depends on the generator and on the module's place in the model alone, and not
    on what else is drawn.

    Args:
        task_vectors: Base and experts.
        design: One product or design for all tensors, or a function from the name of a merged tensor.
        num_samples: Draws kept per chain.
        generator: Source of all randomness.
        sampler: Exact Gibbs sampling, or independent draws of Laplace's approximation in one chain.
        chains: Chains of Gibbs sampling.
        warmup: Its steps per chain before the first kept draw.
        thin: Its steps per kept draw.
        pattern: Regular expression; only modules whose names it finds are drawn.
        progress: Told how far it is.
        ranks: The processes that divide the modules between them; all get all draws.

    Returns:
        The draws, as small as a few numbers per module and expert. Modules that no update changes are left out, with a
        warning, where the anchor's precision is relative: there is nothing to infer, and an ensemble has their MAP.

    Raises:
        ValueError: If the pattern fits no merged module, or only such that nothing changes, an energy has no scale
            mixture (Gibbs), a mode has a Hessian that is not positive definite (Laplace), or a posterior is improper.
    """
    progress, for_tensor = progress or Silent(), as_function(design)
    wanted, seeds = _wanted(task_vectors, pattern), _seeds(task_vectors, generator)
    nbytes = [task_vectors.base.tensors[tensor].nbytes for tensor in wanted]
    own = ranks.share(nbytes)
    progress.begin("sampling", sum(map(len, wanted.values())), sum(nbytes))
    parts: dict[str, FullDraws] = {}
    silent: list[str] = []
    digest = hashlib.sha256()
    where = environment(task_vectors.device, task_vectors.dtype)
    for place, (tensor, names) in enumerate(wanted.items()):
        here = for_tensor(tensor)
        modules = [each for each in read_modules(task_vectors, tensor, here) if each.name in names]
        for module in modules:
            if not bool(module.updates.any()) and bool(module.posterior.undetermined):
                silent.append(module.name)
                continue
            feed(digest, module.name, module.updates, module.center)
            if place not in own:
                continue
            its = torch.Generator(generator.device).manual_seed(seeds[module.name])
            try:
                drawn = _draw(module, num_samples, its, sampler, chains, warmup, thin)
                away = _from_mode(module, drawn, sampler)
            except ValueError as error:
                raise with_names(error, [module.name]) from error
            parts[module.name] = _named(module, drawn, away, sampler, here, where)
        progress.advance(len(modules), nbytes[place])
    if silent:
        warnings.warn(not_drawn(silent), stacklevel=2)
    everyones = {name: part for each in ranks.gather(parts) for name, part in each.items()}
    if not everyones:
        raise ValueError("`sample_full(...)`: nothing changes any of these modules. Draw others.")
    return FullDraws.joined([everyones[name] for name in seeds if name in everyones], digest.hexdigest())


def _seeds(task_vectors: TaskVectors, generator: torch.Generator) -> dict[str, int]:
    """A seed for every merged module, in the order of the model."""
    names = [name for tensor in task_vectors.treatments for name in module_names(task_vectors, tensor)]
    seeds = torch.randint(2**62, (len(names),), generator=generator, device=generator.device).tolist()
    return dict(zip(names, seeds, strict=True))


def _wanted(task_vectors: TaskVectors, pattern: str) -> dict[str, list[str]]:
    """Merged tensors with the names of their modules that a pattern finds."""
    found = {
        tensor: [name for name in module_names(task_vectors, tensor) if regular(pattern).search(name)]
        for tensor in merged_tensors(task_vectors)
    }
    if not any(found.values()):
        raise ValueError(f"`sample_full(pattern={pattern!r})`: fits none of the merged modules; `plan` lists them.")
    return {tensor: names for tensor, names in found.items() if names}


def _named(
    module: Module, drawn: Draws, away: MergeDistance, sampler: str, design: Design, where: Mapping[str, Any]
) -> FullDraws:
    """The draws of one module without the module itself, which they would hold in memory."""
    return FullDraws(
        modules=(module.name,),
        squared_norms=module.squared_norms.unsqueeze(0),
        source="",
        designs=(design_text(design, solver=sampler != "gibbs"),),
        stats={name: values.cpu() for name, values in drawn.stats.items()},
        sampler=sampler,
        temperature=torch.tensor([module.poe.temperature], dtype=torch.float64),
        from_merge=away,
        weights=drawn.weights.cpu(),
        seeds=drawn.seeds,
        environment=where,
    )


def noise_control(
    draws: FullDraws, task_vectors: TaskVectors, design: Designs, *, generator: torch.Generator
) -> FullDraws:
    """White noise around the MAP, each draw of each module as far from it as the given one: the control for ensembles.

    What a posterior is worth beyond its size shows against noise of that size ([BMM] Figure 4; Li et al., arXiv
    2605.12843).

    Args:
        draws: Of the design, by Gibbs sampling or Laplace's approximation.
        task_vectors: Base and experts.
        design: What the draws are from.
        generator: Source of the noise.

    Returns:
        As many draws of the same modules.
    """
    for_tensor = as_function(design)
    lengths = torch.zeros(*draws.seeds.shape, 1, dtype=torch.float64)
    seeds = torch.randint(2**62, draws.seeds.shape, generator=generator, device=generator.device).cpu()
    noise = replace(draws, stats={}, sampler="noise", weights=lengths, seeds=seeds)
    texts, away = list(draws.designs), {}
    for tensor in task_vectors.treatments:
        if set(module_names(task_vectors, tensor)).isdisjoint(draws.modules):
            continue
        here = for_tensor(tensor)
        for module in read_modules(task_vectors, tensor, here):
            if module.name in draws.modules:
                index = draws.index(module.name)
                texts[index] = design_text(here, solver=True)
                made = draws.maker(module)
                for member in range(len(draws)):
                    distance = (made(member) - module.mode).double().norm()
                    lengths[*draws.place(member), index] = float(distance)
                away[module.name] = distance_of_module(noise, module, merged_update(module, here))
    measured = MergeDistance.joined([away[name] for name in draws.modules])
    return replace(noise, designs=tuple(texts), from_merge=measured)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Record where draws are made: all of this decides their digits."""
    return {
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matmul_precision": matmul_precision(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def check_environment(recorded: Mapping[str, Any]) -> None:
    """Refuse an environment that ``environment`` cannot have given.

    Raises:
        ValueError: If something is missing, or is not known here.
    """
    keys = {"device", "torch", "threads", "dtype"}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    if not keys <= set(recorded) or recorded["dtype"] not in dtypes or recorded["device"] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown environment {dict(recorded)}")


def warn_of_changes(recorded: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Warn if draws recorded elsewhere will not be the same bits here.

    Args:
        recorded: What ``environment`` gave where they were made.
        device: Where they will be made again; by default the same kind of device, or the CPU if there is none.
    """
    dtype = getattr(torch, recorded["dtype"])
    if device is None:
        available = recorded["device"] == "cpu" or (recorded["device"] == "cuda" and torch.cuda.is_available())
        device = torch.device(recorded["device"] if available else "cpu")
    before, here = {"matmul_precision": "highest", **recorded}, environment(device, dtype)
    keys = ("device", "torch", "threads", "matmul_precision")
    changed = [f"{key} {before[key]} -> {here[key]}" for key in keys if before[key] != here[key]]
    if not changed:
        return
    if before["matmul_precision"] != here["matmul_precision"]:
        what = "the draws are made again to the less precise of both products"
    elif recorded["device"] == here["device"]:
        what = f"the draws are made again within {TOLERANCE[dtype]:g} of their largest entry, not bit for bit"
    else:
        what = "the seeds give other noise here: these will be other draws of the same posterior, equally good"
    warnings.warn(f"Full draws from elsewhere ({', '.join(changed)}): {what}.", RegenerationWarning, stacklevel=4)


def _draw(
    module: Module,
    num_samples: int,
    generator: torch.Generator,
    sampler: str,
    chains: int,
    warmup: int,
    thin: int,
) -> Draws:
    if sampler == "laplace":
        return Laplace(module.posterior, module.mode.unsqueeze(0)).sample(num_samples, generator)
    return gibbs(module.posterior, num_samples, generator=generator, chains=chains, warmup=warmup, thin=thin)


def _from_mode(module: Module, drawn: Draws, sampler: str) -> MergeDistance:
    """Distance of the draws from the MAP, which is the mean of Laplace's draws."""
    if sampler == "gibbs":
        kernel = GibbsKernel(module.posterior)
        return gibbs_distance(module.name, kernel, drawn.weights.flatten(0, 1)[:, 0], module.mode)
    length = sum_of_squares(module.mode).sqrt().cpu().reshape(1)
    return MergeDistance.zero([module.name], length)
