"""Draws of a whole model by any method, whose designs may differ between tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.arviz_adapter import FEWEST_CHAINS, FEWEST_DRAWS, TooFewDraws, to_inference_data
from inference.draws import Draws
from inference.gibbs import gibbs_posterior
from inference.laplace import Laplace
from inference.merge_distance import span_distance
from inference.models.design import Design
from inference.models.digest import Progress
from inference.models.full_draws import not_drawn, sample_full
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.modules import module_names, read_modules, with_names
from inference.models.statistics_files import statistics_digest
from inference.nuts import nuts
from inference.propriety import undetermined
from inference.retention import ExpertRetention
from inference.slice import slice_sample
from inference.tempering import temperature_range
from poe_merge.kept import kept_in_statistics, kept_when_solved, merge_in_span
from poe_merge.sampling import Sampling
from poe_merge.stats import Table
from poe_models.posterior import Posterior
from poe_models.span import SpanCoordinates, SpanStatistics, span_posterior
from poe_models.weights.task_vectors import TaskVectors

Steps = Callable[[str], Callable[[int, int], None]]
"""A stage's name to a function that is told the finished steps and their total."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Draws with what belongs beside them.

    Attributes:
        draws: Of all modules.
        data: ArviZ's InferenceData, one for each distinct design; Span only.
        experts: What the merge that they surround kept of each expert; none for a method's seeds.
        warnings: What a reader should know.
    """

    draws: SpanDraws | FullDraws | MethodDraws
    data: tuple[Any, ...]
    experts: tuple[ExpertRetention, ...]
    warnings: tuple[str, ...]


def draw_span(
    statistics: Sequence[SpanStatistics], task_vectors: TaskVectors, designs: Table, what: Sampling, steps: Steps
) -> Drawn:
    """Draw coefficients, the modules of one design at a time.

    Args:
        statistics: Of all merged modules, in one set or several.
        task_vectors: Base and experts; only headers are used.
        designs: The design of each tensor.
        what: Settings.
        steps: Makes the progress of a stage.

    Returns:
        The draws.

    Raises:
        ValueError: The pattern fits no module, the method does not fit an energy, or a posterior is improper.
    """
    if len({each.updates for each in statistics}) > 1:
        raise ValueError(
            "the designs of some tensors are about other experts than those of others, and draws in Span coordinates "
            "have one set of coefficients. Give every expert a weight above 0 everywhere, or --coordinates full."
        )
    modules = [name for each in statistics for name in each.modules]
    sets = [(each, place) for each in statistics for place in range(len(each.modules))]
    groups = _groups(task_vectors, designs, modules, what.pattern)
    whole = [(each, _selected(sets, places)) for each, places in _groups(task_vectors, designs, modules, "")]
    generator, digest = what.generator(), _digest(statistics)
    groups, left = _determined(groups, sets, what)
    parts, data, notes = [], [], _silent(statistics) + ([not_drawn(left)] if left else [])
    for number, (design, places) in enumerate(groups):
        some = _selected(sets, places)
        posterior, coordinates = _posterior(design, some, what)
        merge = merge_in_span(posterior, coordinates, some, design)
        step = steps(what.method if len(groups) == 1 else f"{what.method} {number + 1}/{len(groups)}")
        try:
            chains = _run(posterior, merge, what, generator, step)
        except ValueError as error:
            raise with_names(error, some.modules) from error
        made, said = _inference_data(chains, posterior, coordinates, some, chains=what.method != "laplace")
        made.attrs["statistics_digest"] = digest
        data.append(made)
        notes += said
        if bool(posterior.active.any()):
            notes += _too_hot(what.temperature, temperature_range(posterior, coordinates)[1])
        named = SpanDraws.of(chains, coordinates, some)
        away = span_distance(some, named.coefficients, coordinates.coefficients(merge))
        parts.append(dataclasses.replace(named, from_merge=away))
    order = [place for _, places in groups for place in places]
    draws = SpanDraws.joined(parts, digest).select(sorted(range(len(order)), key=order.__getitem__))
    return Drawn(draws, tuple(data), kept_in_statistics(whole), tuple(dict.fromkeys(notes)))


def draw_full(task_vectors: TaskVectors, designs: Table, what: Sampling, progress: Progress) -> Drawn:
    """Draw merged updates themselves, one module in memory at a time.

    Args:
        task_vectors: Base and experts.
        designs: The design of each tensor.
        what: Settings.
        progress: Told how far it is.

    Returns:
        The draws.

    Raises:
        ValueError: The pattern fits no module, the method does not fit an energy, or a posterior is improper.
    """
    modules = [name for tensor in task_vectors.treatments for name in module_names(task_vectors, tensor)]
    groups = _groups(task_vectors, designs, modules, what.pattern)
    hot: dict[int, Design] = {}
    for design, _ in groups:
        _check_method(design, what)
        hot[id(design)] = dataclasses.replace(design, poe=dataclasses.replace(design.poe, temperature=what.temperature))
    draws = sample_full(
        task_vectors,
        lambda tensor: hot.get(id(designs(tensor)), designs(tensor)),
        what.draws,
        generator=what.generator(task_vectors.device),
        method="laplace" if what.method == "laplace" else "gibbs",
        chains=what.chains,
        warmup=what.warmup,
        thin=what.thin,
        pattern=what.pattern,
        progress=progress,
    )
    left = [modules[place] for _, places in groups for place in places if modules[place] not in draws.modules]
    notes = [not_drawn(left)] if left else []
    if what.method != "laplace" and (draws.num_chains < FEWEST_CHAINS or draws.num_draws < FEWEST_DRAWS):
        notes.append(str(TooFewDraws(draws.num_chains, draws.num_draws)))
    notes += _too_hot(what.temperature, _hottest(task_vectors, designs, draws.modules))
    return Drawn(draws, (), kept_when_solved(task_vectors, designs, draws.modules), tuple(notes))


def _groups(
    task_vectors: TaskVectors, designs: Table, modules: Sequence[str], pattern: str
) -> list[tuple[Design, list[int]]]:
    """Positions of the modules to draw, by design."""
    tensor_of = {name: tensor for tensor in task_vectors.treatments for name in module_names(task_vectors, tensor)}
    groups: dict[int, tuple[Design, list[int]]] = {}
    for place, name in enumerate(modules):
        if re.search(pattern, name):
            design = designs(tensor_of[name])
            groups.setdefault(id(design), (design, []))[1].append(place)
    if not groups:
        shown = f"{', '.join(modules[:3])}{', ...' if len(modules) > 3 else ''}"
        raise ValueError(
            f"--pattern {pattern!r}: fits none of the {len(modules)} merged modules ({shown}). `poe-merge plan` lists "
            "the tensors."
        )
    return list(groups.values())


def _determined(
    groups: Sequence[tuple[Design, list[int]]], sets: Sequence[tuple[SpanStatistics, int]], what: Sampling
) -> tuple[list[tuple[Design, list[int]]], list[str]]:
    """The groups without modules that nothing changes, and the names of these."""
    kept: list[tuple[Design, list[int]]] = []
    left: list[str] = []
    for design, places in groups:
        some = _selected(sets, places)
        idle = undetermined(_posterior(design, some, what)[0]).tolist()
        left += [name for name, silent in zip(some.modules, idle, strict=True) if silent]
        found = [place for place, silent in zip(places, idle, strict=True) if not silent]
        if found:
            kept.append((design, found))
    if not kept:
        raise ValueError("no expert changes any of the modules to draw: there is nothing to infer. Draw others.")
    return kept, left


def _selected(sets: Sequence[tuple[SpanStatistics, int]], places: Sequence[int]) -> SpanStatistics:
    """The statistics of modules of one design, which are in one set."""
    return sets[places[0]][0].select([sets[place][1] for place in places])


def _posterior(design: Design, statistics: SpanStatistics, what: Sampling) -> tuple[Posterior, SpanCoordinates]:
    _check_method(design, what)
    poe = dataclasses.replace(design.span_product, temperature=what.temperature)
    return span_posterior(poe, statistics)


def _check_method(design: Design, what: Sampling) -> None:
    """Refuse Gibbs sampling of an energy that has no scale mixture, with options instead of functions."""
    if what.method != "gibbs":
        return
    for expert in design.poe.experts:
        try:
            expert.energy.for_dimension(torch.ones((), dtype=torch.float64)).scale_mixture()
        except ValueError:
            raise ValueError(
                f"--method gibbs: the energy {expert.energy!r} of {expert.name!r} has no known Gaussian scale mixture. "
                "Use --method slice or --method nuts, with --coordinates span."
            ) from None


def _run(
    posterior: Posterior,
    merge: Tensor,
    what: Sampling,
    generator: torch.Generator,
    step: Callable[[int, int], None],
) -> Draws:
    if what.method == "laplace":
        return Laplace(posterior, merge).sample(what.draws, generator)
    settings: dict[str, Any] = {"chains": what.chains, "warmup": what.warmup, "progress": step}
    if what.method == "nuts":
        return nuts(posterior, what.draws, generator=generator, **settings)
    sampler = gibbs_posterior if what.method == "gibbs" else slice_sample
    return sampler(posterior, what.draws, generator=generator, thin=what.thin, **settings)


def _inference_data(
    draws: Draws, posterior: Posterior, coordinates: SpanCoordinates, statistics: SpanStatistics, chains: bool
) -> tuple[Any, list[str]]:
    """ArviZ's InferenceData, and what it says about the number of draws if they are chains."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = to_inference_data(draws, posterior, coordinates, statistics)
    notes = [str(each.message) for each in caught if chains and each.category is TooFewDraws]
    return data, notes


def _digest(statistics: Sequence[SpanStatistics]) -> str:
    """Of the only set, or of all sets' digests."""
    digests = [statistics_digest(each) for each in statistics]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _silent(statistics: Sequence[SpanStatistics]) -> list[str]:
    """Experts whose update is zero wherever something is merged: they drop out, and copies of the base do."""
    norms = torch.cat([each.gram.diagonal(dim1=-2, dim2=-1)[:, : len(each.updates)] for each in statistics])
    silent = [name for name, found in zip(statistics[0].updates, (norms > 0).any(0).tolist(), strict=True) if not found]
    return [f"{name!r} has no update in any merged tensor; is it a copy of the base?" for name in silent]


def _too_hot(temperature: float, highest: float) -> list[str]:
    if temperature <= highest:
        return []
    return [
        f"temperature {temperature:g}: above about {highest:.2g} draws are the anchor's rather than the experts'. Give "
        "a lower --temperature, or choose it on validation data (`inference.tempering.temper`)."
    ]


def _hottest(task_vectors: TaskVectors, designs: Table, drawn: Sequence[str]) -> float:
    """The highest temperature of `temperature_range` over some modules."""
    highest = 0.0
    for tensor in task_vectors.treatments:
        if set(drawn).isdisjoint(module_names(task_vectors, tensor)):
            continue
        for module in read_modules(task_vectors, tensor, designs(tensor)):
            posterior = module.posterior
            if module.name in drawn and bool(posterior.active.any()):
                highest = max(highest, temperature_range(posterior)[1])
    return highest
