"""Draws of a whole model by any sampler, whose designs may differ between tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch

from diagnostics.arviz_adapter import ArvizData, TooFewDraws, to_inference_data
from inference.draws import Draws
from inference.merge_distance import span_distance
from inference.models.design import Design
from inference.models.digest import Progress
from inference.models.full_draws import sample_full
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.modules import merged_tensors, module_names
from inference.models.ranks import ALONE, Ranks
from inference.models.statistics_files import statistics_digest
from inference.retention import ExpertRetention, without_update
from inference.samplers import SAMPLERS
from inference.tempering import temperature_range
from poe_merge.kept import bound, kept_in_statistics, kept_when_solved, merge_in_span
from poe_merge.sampling import Sampling, one_of
from poe_merge.stats import Table
from poe_models.energies import Energy
from poe_models.module_names import not_drawn, with_names
from poe_models.posterior import Posterior
from poe_models.span import SpanStatistics
from poe_models.weights.patterns import pattern as regular
from poe_models.weights.task_vectors import TaskVectors
from poe_models.weights.unmatched import nearest_part

Steps = Callable[[str], Callable[[int, int], None]]
"""A stage's name to a function that is told the finished steps and their total."""
_COLDEST = 1e-12
"""Temperature, in units of the highest, below which errors within a sampler are put down to it."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Draws with what belongs beside them.

    Attributes:
        draws: Of all modules.
        data: For ArviZ: of Span draws one for each distinct design, of Full ones one; none of draws without numbers.
        experts: What the merge that they surround kept of each expert; none for a method's seeds.
        warnings: What a reader should know.
        convergence: R-hat, effective sample size and verdicts as plain data; None for independent draws.
    """

    draws: SpanDraws | FullDraws | MethodDraws
    data: tuple[ArvizData, ...]
    experts: tuple[ExpertRetention, ...]
    warnings: tuple[str, ...]
    convergence: Mapping[str, Any] | None = None


def check_drawable(task_vectors: TaskVectors, designs: Table, what: Sampling) -> None:
    """Refuse, before any pass over the weights, a pattern that fits no module and an energy that cannot be drawn."""
    for design, _ in _groups(task_vectors, designs, _modules(task_vectors), what.pattern):
        for expert in design.poe.experts:
            reason = SAMPLERS[what.sampler].refusal(expert.energy)
            if reason is not None:
                raise ValueError(
                    f"--sampler {what.sampler}: the energy {expert.energy!r} of {expert.name!r} {reason}. Use "
                    f"--sampler {_serving(expert.energy, what.coordinates)}."
                )


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
        ValueError: If tensors are about different experts, or a posterior is improper.
    """
    if len({each.updates for each in statistics}) > 1:
        raise ValueError(
            "the designs of some tensors are about other experts than those of others, and draws in Span coordinates "
            "have one set of coefficients. Give every expert a weight above 0 everywhere, or --coordinates full."
        )
    modules = [name for each in statistics for name in each.modules]
    sets = [(each, place) for each in statistics for place in range(len(each.modules))]
    wanted = _groups(task_vectors, designs, modules, what.pattern)
    posteriors = [(design, _bound(design, _selected(sets, places), what)) for design, places in wanted]
    groups = [(design, each) for design, each in posteriors if not bool(each.undetermined.all())]
    if not groups:
        raise ValueError("no expert changes any of the modules to draw: there is nothing to infer. Draw others.")
    drawn = [name for _, posterior in groups for name in posterior.modules]
    left = [modules[place] for _, places in wanted for place in places if modules[place] not in drawn]
    whole = [(each, _selected(sets, places)) for each, places in _groups(task_vectors, designs, modules, "")]
    generator, digest = what.generator(), _digest(statistics)
    parts, data, notes = [], [], _silent(statistics) + ([not_drawn(left)] if left else [])
    for number, (design, posterior) in enumerate(groups, 1):
        name = what.sampler if len(groups) == 1 else f"{what.sampler} {number}/{len(groups)}"
        part, made, said = _draw_group(design, posterior, what, generator, partial(steps, name))
        made.attrs["statistics_digest"] = digest
        parts.append(part)
        data.append(made)
        notes += said
    order = sorted(range(len(drawn)), key=lambda place: modules.index(drawn[place]))
    draws = SpanDraws.joined(parts, digest).select(order)
    return Drawn(draws, tuple(data), kept_in_statistics(whole), tuple(dict.fromkeys(notes)))


def draw_full(
    task_vectors: TaskVectors, designs: Table, what: Sampling, progress: Progress, ranks: Ranks = ALONE
) -> Drawn:
    """Draw merged updates themselves, one module in memory at a time.

    Args:
        task_vectors: Base and experts.
        designs: The design of each tensor.
        what: Settings.
        progress: Told how far it is.
        ranks: The processes that share the work.

    Returns:
        The draws.

    Raises:
        ValueError: If a posterior is improper.
    """
    modules = _modules(task_vectors)
    groups = _groups(task_vectors, designs, modules, what.pattern)
    hot = {
        id(design): dataclasses.replace(design, poe=dataclasses.replace(design.poe, temperature=what.temperature))
        for design, _ in groups
    }
    draws = sample_full(
        task_vectors,
        lambda tensor: hot.get(id(designs(tensor)), designs(tensor)),
        what.draws,
        generator=what.generator(task_vectors.device),
        sampler=cast(Literal["gibbs", "laplace"], what.sampler),
        chains=what.chains,
        warmup=what.warmup,
        thin=what.thin,
        pattern=what.pattern,
        progress=progress,
        ranks=ranks,
    )
    left = [modules[place] for _, places in groups for place in places if modules[place] not in draws.modules]
    notes, data = [not_drawn(left)] if left else [], []
    if not draws.independent:  # others have no numbers of their own
        made, few = arviz_data(draws, None, what.seed)
        data.append(made)
        notes += few
    experts, highest = kept_when_solved(task_vectors, designs, draws.modules, ranks)
    return Drawn(draws, tuple(data), experts, tuple(notes + _too_hot(what.temperature, highest)))


def _modules(task_vectors: TaskVectors) -> list[str]:
    return [name for tensor in merged_tensors(task_vectors) for name in module_names(task_vectors, tensor)]


def _serving(energy: Energy, coordinates: str) -> str:
    """The samplers that can draw an energy: in these coordinates, and in Span ones."""
    serving = {name: each.coordinates for name, each in SAMPLERS.items() if each.refusal(energy) is None}
    here = [name for name, places in serving.items() if coordinates in places]
    there = [name for name in serving if name not in here]
    return one_of(here) + (f"; or, with --coordinates span, {one_of(there)}" if there else "")


def _groups(
    task_vectors: TaskVectors, designs: Table, modules: Sequence[str], pattern: str
) -> list[tuple[Design, list[int]]]:
    """Positions of the modules to draw, by design."""
    tensor_of = {name: tensor for tensor in task_vectors.treatments for name in module_names(task_vectors, tensor)}
    groups: dict[int, tuple[Design, list[int]]] = {}
    for place, name in enumerate(modules):
        if regular(pattern).search(name):
            design = designs(tensor_of[name])
            groups.setdefault(id(design), (design, []))[1].append(place)
    if not groups:
        shown = f"{', '.join(modules[:3])}{', ...' if len(modules) > 3 else ''}"
        raise ValueError(
            f"--pattern {pattern!r}: fits none of the {len(modules)} merged modules ({shown}). "
            f"{nearest_part(pattern, modules)}`poe-merge plan` lists the tensors."
        )
    return list(groups.values())


def _bound(design: Design, statistics: SpanStatistics, what: Sampling) -> Posterior:
    return bound(dataclasses.replace(design.span_product, temperature=what.temperature), statistics)


def _selected(sets: Sequence[tuple[SpanStatistics, int]], places: Sequence[int]) -> SpanStatistics:
    """The statistics of modules of one design, which are in one set."""
    return sets[places[0]][0].select([sets[place][1] for place in places])


def _draw_group(
    design: Design,
    posterior: Posterior,
    what: Sampling,
    generator: torch.Generator,
    stage: Callable[[], Callable[[int, int], None]],
) -> tuple[SpanDraws, ArvizData, list[str]]:
    """Draws of the modules of one design, the same for ArviZ, and what a reader should know."""
    assert posterior.span is not None
    mode = merge_in_span(posterior, design)
    sampler = SAMPLERS[what.sampler]
    offered = {"chains": what.chains, "warmup": what.warmup, "thin": what.thin, "mode": mode}
    settings: dict[str, Any] = {name: value for name, value in offered.items() if name in sampler.settings}
    if "progress" in sampler.settings:
        settings["progress"] = stage()
    try:
        chains = sampler.draw(posterior, what.draws, generator=generator, **settings)
    except ValueError as error:
        raise with_names(error, posterior.modules) from error
    except (RuntimeError, ArithmeticError) as error:
        coldest = _COLDEST * temperature_range(posterior)[1]
        if what.temperature > coldest:
            raise
        raise ValueError(
            f"--temperature {what.temperature:g}: too low for the sampler {what.sampler}, whose steps become nothing "
            f"at these scales ({str(error).splitlines()[0]}). Ask for {coldest:.1g} or more, or for --sampler gibbs."
        ) from error
    data, notes = arviz_data(chains, posterior, what.seed)
    notes = [] if what.independent else notes
    if bool(posterior.active.any()):
        notes += _too_hot(what.temperature, temperature_range(posterior)[1])
    named = SpanDraws.of(chains, posterior)
    away = span_distance(posterior.span.statistics, named.coefficients, posterior.coefficients(mode))
    return dataclasses.replace(named, from_merge=away), data, notes


def arviz_data(draws: Draws | FullDraws, posterior: Posterior | None, seed: int) -> tuple[ArvizData, list[str]]:
    """Draws for ArviZ, and what it says about the number of draws."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = to_inference_data(draws, posterior, seed=seed)
    return data, [str(each.message) for each in caught if each.category is TooFewDraws]


def _digest(statistics: Sequence[SpanStatistics]) -> str:
    """Of the only set, or of all sets' digests."""
    digests = [statistics_digest(each) for each in statistics]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _silent(statistics: Sequence[SpanStatistics]) -> list[str]:
    """Experts whose update is zero wherever something is merged: they drop out, and copies of the base do."""
    norms = torch.cat([each.gram.diagonal(dim1=-2, dim2=-1)[:, : len(each.updates)] for each in statistics])
    silent = [name for name, found in zip(statistics[0].updates, (norms > 0).any(0).tolist(), strict=True) if not found]
    return without_update(silent)


def _too_hot(temperature: float, highest: float) -> list[str]:
    if temperature <= highest:
        return []
    return [
        f"temperature {temperature:g}: above about {highest:.2g} draws are the anchor's rather than the experts'. Give "
        "a lower --temperature, or choose it on validation data (`inference.tempering.temper`)."
    ]
