"""Draws of a whole model in Full coordinates, a module at a time, and where they can be made again bit for bit."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from inference.draws import RegeneratedDraws
from inference.gibbs import GibbsKernel, gibbs, seeded_noise
from inference.laplace import Laplace
from inference.merge_distance import MergeDistance
from inference.models.design import Designs, as_function, design_text
from inference.models.digest import Progress, Silent
from inference.models.model_draws import FullDraws
from inference.models.modules import Module, module_names, read_modules, with_names
from inference.models.surrounding import gibbs_distance
from inference.propriety import undetermined
from poe_models.operators import sum_of_squares
from poe_models.weights.task_vectors import TaskVectors

__all__ = ["TOLERANCE", "RegenerationWarning", "environment", "noise_control", "sample_full"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""How far a draw made again with other threads or another torch may be off, relative to its largest entry."""
_PROBES = ((1, 5), (7, 9))  # torch fills short and long tensors by different routines


class RegenerationWarning(UserWarning):
    """Full draws are made again somewhere else than where they were drawn; the message says what still holds."""


def sample_full(
    task_vectors: TaskVectors,
    design: Designs,
    num_samples: int,
    *,
    generator: torch.Generator,
    method: Literal["gibbs", "laplace"] = "gibbs",
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    pattern: str = "",
    progress: Progress | None = None,
) -> FullDraws:
    """Draw merged updates themselves, one module in memory at a time.

    Args:
        task_vectors: Base and experts.
        design: One product or design for all tensors, or a function from the tensor's name.
        num_samples: Draws kept per chain.
        generator: Source of all randomness.
        method: Exact Gibbs sampling, or independent draws of Laplace's approximation in one chain.
        chains: Chains of Gibbs sampling.
        warmup: Its steps per chain before the first kept draw.
        thin: Its steps per kept draw.
        pattern: Regular expression; only modules whose names it finds are drawn.
        progress: Told how far it is.

    Returns:
        The draws, as small as a few numbers per module and expert. Modules that no update changes are left out, with a
        warning, where the anchor's precision is relative: there is nothing to infer, and an ensemble has their MAP.

    Raises:
        ValueError: If the pattern fits no merged module, or only such that nothing changes, an energy has no scale
            mixture (Gibbs), a mode has a Hessian that is not positive definite (Laplace), or a posterior is improper.
    """
    progress, for_tensor = progress or Silent(), as_function(design)
    wanted = {
        tensor: [name for name in module_names(task_vectors, tensor) if re.search(pattern, name)]
        for tensor, treatment in task_vectors.treatments.items()
        if treatment.action == "merge"
    }
    count = sum(len(names) for names in wanted.values())
    if count == 0:
        raise ValueError(f"`sample_full(pattern={pattern!r})`: fits none of the merged modules; `plan` lists them.")
    nbytes = {tensor: task_vectors.base.tensors[tensor].nbytes for tensor, names in wanted.items() if names}
    progress.begin("sampling", count, sum(nbytes.values()))
    names, texts, norms, parts, temperatures, distances, silent = [], [], [], [], [], [], []
    digest = hashlib.sha256()
    for tensor in nbytes:
        here = for_tensor(tensor)
        modules = [each for each in read_modules(task_vectors, tensor, here) if each.name in wanted[tensor]]
        for module in modules:
            if not bool(module.updates.any()) and bool(undetermined(module.posterior)):
                silent.append(module.name)
                continue
            try:
                drawn = _draw(module, num_samples, generator, method, chains, warmup, thin)
                distances.append(_from_mode(module, drawn, method))
            except ValueError as error:
                raise with_names(error, [module.name]) from error
            parts.append((drawn.weights, drawn.seeds, drawn.stats))  # the draws themselves hold on to the module
            names.append(module.name)
            texts.append(design_text(here, solver=method != "gibbs"))
            norms.append(module.squared_norms)
            temperatures.append(module.poe.temperature)
            _feed(digest, module)
        progress.advance(len(modules), nbytes[tensor])
    if silent:
        warnings.warn(not_drawn(silent), stacklevel=2)
    if not parts:
        raise ValueError("`sample_full(...)`: nothing changes any of these modules. Draw others.")
    weights, seeds, stats = zip(*parts, strict=True)
    return FullDraws(
        modules=tuple(names),
        squared_norms=torch.nn.utils.rnn.pad_sequence(norms, batch_first=True),
        source=digest.hexdigest(),
        stats={name: torch.cat([each[name] for each in stats], -1).cpu() for name in stats[0]},
        from_merge=MergeDistance.joined(distances),
        method=method,
        weights=_joined(weights),
        seeds=torch.cat(seeds, -1).cpu(),
        temperature=torch.tensor(temperatures, dtype=torch.float64),
        designs=tuple(texts),
        environment=environment(task_vectors.device, task_vectors.dtype),
    )


def not_drawn(modules: Sequence[str]) -> str:
    """Says that nothing is to be inferred in some modules.

    Args:
        modules: Their names.

    >>> not_drawn(["fc.weight"])
    "nothing changes fc.weight: not drawn but left at the MAP, the anchor's centre."
    """
    shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more modules" if len(modules) > 3 else "")
    return f"nothing changes {shown}: not drawn but left at the MAP, the anchor's centre."


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
    lengths = torch.zeros(len(draws), len(draws.modules), 1, dtype=torch.float64)
    texts = list(draws.designs)
    for tensor, treatment in task_vectors.treatments.items():
        if treatment.action != "merge" or not set(module_names(task_vectors, tensor)).intersection(draws.modules):
            continue
        here = for_tensor(tensor)
        for module in read_modules(task_vectors, tensor, here):
            if module.name in draws.modules:
                texts[draws.index(module.name)] = design_text(here, solver=True)
                for member in range(len(draws)):
                    distance = (draws.update(module, member) - module.mode).double().norm()
                    lengths[member, draws.index(module.name)] = float(distance)
    return replace(
        draws,
        stats={},
        from_merge=None if draws.from_merge is None else MergeDistance.zero(draws.modules, draws.from_merge.length),
        method="noise",
        weights=lengths.unflatten(0, draws.seeds.shape[:2]),
        seeds=torch.randint(2**62, draws.seeds.shape, generator=generator, device=generator.device).cpu(),
        designs=tuple(texts),
    )


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the digits of a draw besides its seed.

    Args:
        device: Where it is computed.
        dtype: The compute dtype.

    Returns:
        Plain data: device type, torch version, threads, dtype, and a few random numbers of a known seed.
    """
    return {
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "noise": _noise(device, dtype),
    }


def check_environment(recorded: Mapping[str, Any]) -> None:
    """Raise unless this is what `environment` gives, as a file should have it.

    Args:
        recorded: Plain data.

    Raises:
        ValueError: Something is missing, or is not known here.
    """
    keys = {"device", "torch", "threads", "dtype", "noise"}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    if set(recorded) != keys or recorded["dtype"] not in dtypes or recorded["device"] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown environment {dict(recorded)}")


def warn_of_changes(recorded: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Warn if draws recorded elsewhere will not be the same bits here.

    Args:
        recorded: What `environment` gave where they were made.
        device: Where they will be made again; by default the same kind of device, or the CPU if there is none.
    """
    dtype = getattr(torch, recorded["dtype"])
    if device is None:
        available = recorded["device"] == "cpu" or (recorded["device"] == "cuda" and torch.cuda.is_available())
        device = torch.device(recorded["device"] if available else "cpu")
    here = environment(device, dtype)
    changed = [
        f"{key} {recorded[key]} -> {here[key]}" for key in ("device", "torch", "threads") if recorded[key] != here[key]
    ]
    if not changed:
        return
    if torch.allclose(torch.tensor(here["noise"]), torch.tensor(recorded["noise"]), atol=1e-4):
        what = f"the draws are made again within {TOLERANCE[dtype]:g} of their largest entry, not bit for bit"
    else:
        what = "the seeds give other noise here: these will be other draws of the same posterior, equally good"
    warnings.warn(f"Full draws from elsewhere ({', '.join(changed)}): {what}.", RegenerationWarning, stacklevel=4)


def _draw(
    module: Module,
    num_samples: int,
    generator: torch.Generator,
    method: str,
    chains: int,
    warmup: int,
    thin: int,
) -> RegeneratedDraws:
    if method == "laplace":
        return Laplace(module.posterior, module.mode.unsqueeze(0)).sample(num_samples, generator)
    drawn = gibbs(module.posterior, num_samples, generator=generator, chains=chains, warmup=warmup, thin=thin)
    assert isinstance(drawn, RegeneratedDraws)  # as they are in Full coordinates
    return drawn


def _from_mode(module: Module, drawn: RegeneratedDraws, method: str) -> MergeDistance:
    """How far the draws are from the MAP, which is the mean of Laplace's draws."""
    if method == "gibbs":
        kernel = GibbsKernel(module.posterior)
        return gibbs_distance(module.name, kernel, drawn.weights.flatten(0, 1)[:, 0], module.mode)
    length = sum_of_squares(module.mode).sqrt().cpu().reshape(1)
    return MergeDistance.zero([module.name], length)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights of several modules ``(C, S, 1, E_m)`` as one, filled up with zeros."""
    most = max(part.shape[-1] for part in weights)
    return torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[-1])) for part in weights], -2).cpu()


def _feed(digest: Any, module: Module) -> None:
    """Add a module's name, updates and centre to a checksum."""
    center = module.center
    for tensor in (module.updates, *(() if center is None else (center,))):
        digest.update(f"{module.name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())


def _noise(device: torch.device, dtype: torch.dtype) -> list[float]:
    like = torch.empty(0, device=device, dtype=dtype)
    noise = [seeded_noise(seed, shape, like).flatten() for seed, shape in enumerate(_PROBES)]
    return [round(value, 6) for value in torch.cat(noise)[::4].tolist()]
