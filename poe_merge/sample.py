"""``poe-merge sample``: draw, then write the members with their draws, or go on where that was interrupted.

OUT/member-000, ...    the members, OUT/shared their common part (deltas only), OUT/ensemble.json what everything is
OUT/sample.json        settings, and whether the chains agree, if there are any
OUT/draws              every draw, not only the members': ``inference.models.draw_files.load_draws``
OUT/draws.nc           the same for ArviZ: coefficients (Span; draws-0.nc, ... where designs differ between tensors)
                       or log mixture weights (Full; none of Laplace's draws, of which seeds are kept)
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diagnostics.arviz_adapter import write_netcdf
from diagnostics.chains import chain_convergence
from diagnostics.draw_groups import merge_attributes
from diagnostics.verdicts import Level
from inference.models.artifacts import versions
from inference.models.design import Design
from inference.models.digest import Progress, difference
from inference.models.disk import OutputError
from inference.models.draw_files import add_draws, changed_beside, load_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.folder import weight_files
from inference.models.method_design import AnyDesign
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, PosteriorDraws, SpanDraws
from inference.models.modules import module_names
from inference.models.places import portable
from inference.models.ranks import ALONE, Ranks
from inference.models.record_shapes import SampleRecord, require_shape
from inference.models.staging import Staging
from inference.models.statistics_files import collect_statistics
from inference.models.statistics_record import families
from inference.models.surrounding import distance_from_merge
from inference.retention import ExpertRetention, concerns, totals_of
from poe_merge.config import MergeConfig
from poe_merge.drawing import Drawn, arviz_data, check_drawable, draw_full, draw_span
from poe_merge.functional import Span, laplace_draws
from poe_merge.record import check_inputs, read_record
from poe_merge.sampling import Sampling, Seeds
from poe_merge.stats import Table, check_apart, checked_statistics, checkpoints_of
from poe_models.weights.json_files import read_object
from poe_models.weights.patterns import pattern
from poe_models.weights.task_vectors import TaskVectors

RECORD, DRAWS = "sample.json", "draws"
_DRAWN = f"{DRAWS}/draws.json"
AnyTable = Callable[[str], AnyDesign]


class Bars(Progress, Protocol):
    """Progress in modules and bytes, and in steps of a sampler."""

    def steps(self, stage: str) -> Callable[[int, int], None]:
        """Begin a sampler; the function that is returned is told its finished steps and their total."""
        ...


@dataclass(frozen=True)
class SampleReport:
    """Result of ``poe-merge sample``.

    Attributes:
        out: The folder.
        what: The settings.
        drawn: The draws.
        shared: Number of merged tensors that were not drawn: they are the merge's, or the method's at its own seed.
        found: Number of merged modules that the pattern finds, and of all.
        warnings: What a reader should know.
        seconds: Wall time of this run.
    """

    out: Path
    what: Sampling | Seeds
    drawn: Drawn
    shared: int
    found: tuple[int, int]
    warnings: tuple[str, ...]
    seconds: float


def sample(
    settings: MergeConfig,
    task_vectors: TaskVectors,
    designs: AnyTable,
    out: Path,
    what: Sampling | Seeds,
    bars: Bars,
    *,
    statistics: Path | None,
    merged: Path | None,
    resume: bool,
    ranks: Ranks = ALONE,
) -> SampleReport:
    """Draw merged models around the merge and write them.

    Args:
        settings: The configuration.
        task_vectors: Base and experts.
        designs: The design of each tensor.
        out: The folder to make.
        what: What to draw.
        bars: Told how far it is.
        statistics: Folder of Span statistics, instead of a pass over the weights.
        merged: Folder of the merge, whose tensors are taken for all that is not drawn; by default it is solved here.
        resume: Go on with an interrupted run of the same settings.
        ranks: The processes that share the work.

    Returns:
        What was done.

    Raises:
        OutputError: If the folder exists, the disk is full, or the interrupted run was another one.
        CheckpointError: If an input cannot be used, or the statistics are about something else.
        ValueError: If something cannot be drawn; says what.
    """
    began = time.monotonic()
    weight_files(task_vectors.base)  # refuses, before anything is drawn, what cannot be written
    out = check_apart(out, checkpoints_of(task_vectors, designs), resume=resume)
    staging = Staging(out)
    if ranks.first:
        staging.check(resume)
    asked = _asked(settings, what, merged)
    span = _span(settings, task_vectors, what, merged)
    designs = designs if span is None else span.unscaled
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if ranks.gather(resume and staging.has(_DRAWN))[0]:
            drawn = _drawn_before(staging, asked)
        else:
            task_vectors.refuse_copies()
            drawn = (
                _draw(task_vectors, designs, what, statistics, bars, ranks)
                if span is None
                else _near(span, merged, what, bars)
            )
            drawn = _judged(_around(merged, drawn, task_vectors, designs, bars))
        ensemble = MergedEnsemble(
            task_vectors,
            designs,
            drawn.draws.thinned(what.members),
            out_dtype=settings.output_dtype,
            elsewhere=merged,
            through=None if span is None else span.model.merges,
        )
        record = {"kind": "sample", **asked, **_record(drawn), "versions": versions()}
        ensemble.save(
            out,
            format=what.format,
            resume=resume,
            progress=bars,
            extras=lambda place: _write(place, drawn, record),
            ranks=ranks,
        )
    told = [text for each in ranks.gather([str(each.message) for each in caught]) for text in each]
    return _report(out, what, drawn, ensemble, task_vectors, told, began)


def _asked(settings: MergeConfig, what: Sampling | Seeds, merged: Path | None) -> dict[str, Any]:
    """Settings of the draws as plain data: a resumed run must have the same."""
    folder = None if merged is None else str(merged.absolute())
    plain: dict[str, Any] = {"sampling": asdict(what), "config": settings.resolved(), "merge": folder}
    asked: dict[str, Any] = json.loads(json.dumps(plain))
    return asked


def _report(
    out: Path,
    what: Sampling | Seeds,
    drawn: Drawn,
    ensemble: MergedEnsemble,
    task_vectors: TaskVectors,
    warned: list[str],
    began: float,
) -> SampleReport:
    tensors = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
    modules = [name for tensor in tensors for name in module_names(task_vectors, tensor)]
    sampled = set(ensemble.sampled)  # modules, of which a fused tensor has several
    return SampleReport(
        out=out,
        what=what,
        drawn=drawn,
        shared=sum(1 for name in tensors if not sampled.intersection(module_names(task_vectors, name))),
        found=(sum(1 for name in modules if pattern(what.pattern).search(name)), len(modules)),
        warnings=tuple(dict.fromkeys([*drawn.warnings, *warned])),
        seconds=time.monotonic() - began,
    )


def _draw(
    task_vectors: TaskVectors,
    designs: AnyTable,
    what: Sampling | Seeds,
    statistics: Path | None,
    bars: Bars,
    ranks: Ranks,
) -> Drawn:
    if isinstance(what, Seeds):
        draws = MethodDraws.of(task_vectors, designs, what.seeds, pattern=what.pattern, progress=bars)
        return Drawn(draws, (), (), ())
    products = _products(designs)
    check_drawable(task_vectors, products, what)
    if what.coordinates == "full" and statistics is not None:
        raise ValueError(
            "--stats: Full draws are made from the weights themselves. Leave it out, or --coordinates span."
        )
    if what.coordinates == "full":
        return draw_full(task_vectors, products, what, bars, ranks)
    if statistics is None:
        sets = families(task_vectors, products)
        found = [collect_statistics(task_vectors, products, tensors=each, progress=bars, ranks=ranks) for each in sets]
    else:
        found = [checked_statistics(statistics, task_vectors, products, bars)]
    return draw_span(found, task_vectors, products, what, bars.steps)


def _near(span: Span, merged: Path | None, what: Sampling | Seeds, bars: Bars) -> Drawn:
    """Draws around a fit with experts on predictions, of the modules that are asked for.

    Where modules share coefficients, what ArviZ gets is of their groups.
    """
    assert merged is not None
    assert isinstance(what, Sampling)
    found, mode = laplace_draws(span, merged, what.members, what.seed, bars.steps("Gauss-Newton matrix"))
    draws, (data, _) = span.model.draws(found, mode), arviz_data(found, span.posterior, what.seed)
    if what.pattern:
        draws = draws.restrict(what.pattern)
        data = data.sel(module=span.model.groups_of(draws.modules))
    return Drawn(draws, (data,), (), ())


def _span(settings: MergeConfig, task_vectors: TaskVectors, what: Sampling | Seeds, merged: Path | None) -> Span | None:
    """The span of a merge with experts on predictions, if it has some."""
    if settings.functional.tasks is None:
        return None
    if merged is None:
        raise ValueError(
            "functional.tasks: draws with experts on predictions surround a fit. Run `poe-merge merge`, then "
            "`poe-merge sample --merge FOLDER --allow-code`."
        )
    assert isinstance(what, Sampling)
    return Span.of(settings, task_vectors, what.temperature)


def _around(
    merged: Path | None, drawn: Drawn, task_vectors: TaskVectors, designs: AnyTable, progress: Progress
) -> Drawn:
    """The draws with their distance from the merged folder, if there is one, and a warning if they are far from it."""
    draws = drawn.draws
    if isinstance(draws, MethodDraws):
        return drawn
    if merged is not None:
        products = _products(designs)
        check_inputs(merged, task_vectors, products, progress)
        draws = replace(draws, from_merge=distance_from_merge(draws, task_vectors, products, merged))
    for data in drawn.data:
        if draws.from_merge is not None:
            names = [str(name) for name in data.posterior["module"].values]
            apart = set(names) <= set(draws.modules)  # and no groups of them
            here = draws.from_merge.select([draws.index(name) for name in names]) if apart else draws.from_merge
            data.attrs |= merge_attributes(here)
    experts = drawn.experts if merged is None else totals_of(read_record(merged))
    far = () if draws.far_from_merge is None else (draws.far_from_merge,)
    return replace(drawn, draws=draws, experts=experts, warnings=(*drawn.warnings, *far, *concerns(experts)))


def _record(drawn: Drawn) -> dict[str, Any]:
    """Everything but the draws themselves as plain data: their source, their centre, the merge, and the chains."""
    draws, around = drawn.draws, None
    if isinstance(draws, PosteriorDraws):
        found = {} if draws.from_merge is None else merge_attributes(draws.from_merge)
        numbers = {key: None if value != value else value for key, value in found.items()}
        kinds = {"coordinates": draws.kind, "surrounds": draws.surrounds, "sampler": draws.sampler}
        around = {**kinds, "temperatures": list(draws.temperatures), **numbers}
    return {
        "source": draws.source,
        "around": around,
        "experts": [each.record() for each in drawn.experts],
        "convergence": drawn.convergence,
        "warnings": drawn.warnings,
    }


def _products(designs: AnyTable) -> Table:
    def product(tensor: str) -> Design:
        design = designs(tensor)
        assert isinstance(design, Design)
        return design

    return product


def read_sample(folder: Path) -> dict[str, Any]:
    """Read ``sample.json`` of a folder; a ``ValueError`` says what of it is not as it was written."""
    record = read_object(folder / RECORD)
    require_shape(SampleRecord, record, str(folder / RECORD))
    return record


def _drawn_before(staging: Staging, asked: Mapping[str, Any]) -> Drawn:
    """The draws of an interrupted run, if they are what is asked for now."""
    if (changed := changed_beside(staging.content, DRAWS)) is not None:
        raise OutputError(
            f"{changed}: not the file that was written with the draws. Remove {staging.folder} to start again."
        )
    try:
        record = read_sample(staging.content)
    except ValueError as error:
        raise OutputError(f"{error} Remove {staging.folder} to start again.") from error
    if found := difference({key: record[key] for key in asked}, portable(asked, staging.out)):
        place, before, now = found[0]
        raise OutputError(
            f"{staging.folder} was begun with {place} = {before}, now it is {now}. Restore what it was, or remove "
            "that folder to start again."
        )
    draws = load_draws(staging.content / DRAWS, record["source"])
    assert isinstance(draws, SpanDraws | FullDraws | MethodDraws)
    numbers = ("kept", "residual_left", "length")
    known = tuple(
        ExpertRetention(each["name"], *(math.nan if each[key] is None else each[key] for key in numbers))
        for each in record["experts"]
    )
    return Drawn(draws, (), known, tuple(record["warnings"]), record["convergence"])


def _write(staging: Staging, drawn: Drawn, record: Mapping[str, Any]) -> None:
    """Write everything beside the members; the draws last, for they say that the rest is there."""
    if staging.has(_DRAWN):
        return
    chains = ["draws.nc" if len(drawn.data) == 1 else f"draws-{number}.nc" for number in range(len(drawn.data))]
    for name, data in zip(chains, drawn.data, strict=True):
        staging.write(name, partial(write_netcdf, data))
    staging.write_record(RECORD, record)
    add_draws(staging, DRAWS, drawn.draws, [*chains, RECORD])


def _judged(drawn: Drawn) -> Drawn:
    """The draws with verdicts on R-hat and effective sample size, if the sampler has chains."""
    if drawn.draws.independent:
        return drawn
    found = chain_convergence(drawn.draws)
    sizes = np.fmin(found.summary.ess_bulk, found.summary.ess_tail)
    convergence = {
        "r_hat": _extreme(found.summary.r_hat, np.max),
        "ess": _extreme(sizes, np.min),
        "warnings": [f"{each.about}: {each.text}" for each in found.verdicts if each.level != Level.GOOD],
    }
    return replace(drawn, convergence=convergence)


def _extreme(values: np.ndarray, reduce: Any) -> float | None:
    known = values[~np.isnan(values)]  # an infinite R-hat is one
    return float(reduce(known)) if known.size else None
