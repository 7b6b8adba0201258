"""``poe-merge diagnose``: what a merged folder, its draws and its predictions say, as one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diagnostics.alignment import Alignment, gram_alignment
from diagnostics.chains import ChainConvergence, CoefficientIntervals, chain_convergence, coefficient_intervals
from diagnostics.predictions.evaluation import Evaluation, evaluate_predictions
from diagnostics.predictions.files import load_predictions
from diagnostics.report.report import Page, report
from diagnostics.residuals import Experts, Residuals, residuals
from diagnostics.solver import FixedPointConvergence, fixed_point_convergence
from diagnostics.tails.pooled import PooledTails, pooled_tails
from diagnostics.tails.surrogates import Surrogates, surrogate_residuals
from diagnostics.verdicts import Level, Verdict
from inference.models.design import Design
from inference.models.digest import Progress, Silent, file_digest
from inference.models.disk import real_path, replace_file
from inference.models.draw_files import load_draws
from inference.models.method_design import AnyDesign
from inference.models.model_draws import PosteriorDraws, SpanDraws
from poe_merge.beside import beside_verdict
from poe_merge.build import designs_of
from poe_merge.config import parse_config
from poe_merge.record import (
    NotBuiltIn,
    design_of,
    experts_of,
    merge_of,
    read_record,
    rewritten,
    task_vectors_of,
    unprepared,
)
from poe_merge.settings import Document
from poe_models.residual_maps import InputGram, ResidualMap
from poe_models.weights.loading import Checkpoint, CheckpointError
from poe_models.weights.moments import MomentsFolder
from poe_models.weights.task_vectors import TaskVectors

NUM_SURROGATES = 19
LEVEL = 0.05
_REWRITTEN = (
    "is not what the merge wrote: how the solver ended and what was kept of each expert are the merge's, and not of "
    "these weights, of which residuals and tails are. Merge again."
)
METHODS_MAP = InputGram()
"""Measures the residuals of a method's merge unless told otherwise."""


@dataclass
class Findings:
    """Results of the diagnostics that could be made, with verdicts that say why the others could not."""

    fixed_point: FixedPointConvergence | None = None
    chains: ChainConvergence | None = None
    coefficients: CoefficientIntervals | None = None
    around: Verdict | None = None
    residuals: Residuals | None = None
    tails: PooledTails | None = None
    measured: str = ""
    alignment: Alignment | None = None
    predictions: Evaluation | None = None
    verdicts: list[Verdict] = field(default_factory=list)


def diagnose(
    run: Path,
    *,
    draws: Path | None = None,
    predictions: Path | None = None,
    activations: Path | None = None,
    tails: bool = True,
    residual_map: ResidualMap | None = None,
    num_surrogates: int = NUM_SURROGATES,
    seed: int = 0,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Page:
    """Make the report of a merged folder.

    Args:
        run: Folder that ``poe-merge merge`` made.
        draws: A folder of draws, as ``poe-merge sample`` and ``save_draws`` make them.
        predictions: A file of predictions, see ``diagnostics.predictions.files``.
        activations: Second moments of the experts' inputs, as ``poe-merge activations`` writes them.
        tails: Read base, experts and merge again for the residuals and their tails.
        residual_map: Measures residuals in the place of the merge's experts; ``InputGram`` by default where a method,
            which has no experts, has merged.
        num_surrogates: Merges of Gaussian updates, as the null of a heavy tail; 0 for none. Each takes as
            long as the merge.
        seed: Of resamples and surrogates.
        allow_code: Import the modules of the user's own that the merge's configuration names.
        progress: Told about the merges of surrogates.

    Returns:
        The page.

    Raises:
        ValueError: If something that was given cannot be read.
    """
    record = read_record(run)
    found, progress = Findings(), progress or Silent()
    changed = rewritten(run, record, progress) if tails or draws is not None else None  # otherwise not looked at
    if changed is not None:
        found.verdicts.append(Verdict("weights", Level.CAUTION, f"{changed} {_REWRITTEN}"))
    merged = [tensor for tensor in record["tensors"] if "modules" in tensor]
    modules = [module for tensor in merged for module in tensor["modules"]]
    solved = [module for tensor in merged if "experts" in design_of(record, tensor) for module in tensor["modules"]]
    if solved:
        found.fixed_point = fixed_point_convergence(solved)
    if not modules:
        text = "no matrix was merged: every tensor was averaged or kept, and there is nothing to judge."
        found.verdicts.append(Verdict("merge", Level.UNKNOWN, text))
    if draws is not None:
        as_written = changed is None and "written" in record
        _judge_draws(draws, run, record, [str(module["module"]) for module in modules], found, allow_code, as_written)
    if tails and modules:
        _fit_tails(run, record, found, seed, residual_map, num_surrogates, allow_code, progress)
    if activations is not None:
        found.alignment = gram_alignment(task_vectors_of(record), MomentsFolder(activations), seed=seed)
    if predictions is not None:
        found.predictions = evaluate_predictions(load_predictions(predictions), seed=seed)
    return report(
        f"Merge {run.resolve().name}",
        subtitle=f"made by poe-merge {record['versions'].get('poe-merge', '')}",
        record=record,
        fixed_point=found.fixed_point,
        chains=found.chains,
        coefficients=found.coefficients,
        around=found.around,
        residuals=found.residuals,
        tails=found.tails,
        measured=found.measured,
        alignment=found.alignment,
        predictions=found.predictions,
        verdicts=found.verdicts,
    )


def check_out(out: Path) -> None:
    """Refuse, before anything is read, to write a page over something else or under another kind of name."""
    if out.suffix != ".html" or out.is_dir():
        raise ValueError(f"`poe-merge diagnose --out {out}`: the report is a page. Give a name that ends in .html.")


def write_page(text: str, out: Path) -> Path:
    """Write the page, whole or not at all; one that is there is replaced. Returns its absolute path."""
    check_out(out)
    target = real_path(out.expanduser())
    replace_file(target, lambda path: path.write_text(text, encoding="utf-8"), "run again")
    return target


def _judge_draws(
    path: Path,
    run: Path,
    record: Mapping[str, Any],
    modules: list[str],
    found: Findings,
    allow_code: bool,
    as_written: bool,
) -> None:
    draws = load_draws(path)
    strange = sorted(set(draws.modules) - set(modules))
    if strange:
        raise ValueError(
            f"{path}: draws of {strange[0]!r}, which this merge does not have. Give draws of the same base and experts."
        )
    if isinstance(draws, PosteriorDraws):
        designs = partial(recorded_designs, run, record, allow_code=allow_code)
        vectors = partial(task_vectors_of, record)
        found.around = beside_verdict(draws, run, record, vectors, designs, as_written=as_written)
    if isinstance(draws, SpanDraws):
        found.coefficients = coefficient_intervals(draws)
    if draws.independent:
        how = draws.sampler if isinstance(draws, PosteriorDraws) else "seeds of a merging method"
        text = f"{len(draws)} independent draws ({how}): there are no chains to judge."
        found.verdicts.append(Verdict("draws", Level.NOTE, text))
    else:
        found.chains = chain_convergence(draws)


def _fit_tails(
    run: Path,
    record: Mapping[str, Any],
    found: Findings,
    seed: int,
    residual_map: ResidualMap | None = None,
    num_surrogates: int = NUM_SURROGATES,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Residuals and tails; where the inputs are not what they were, a note why there are none."""
    try:
        vectors = task_vectors_of(record)
        designs = {str(t["tensor"]): design_of(record, t) for t in record["tensors"] if "design" in t}
        again = partial(recorded_designs, run, record, vectors.base, allow_code=allow_code)
        experts = _experts(designs, residual_map, again)
        found.measured = _measured(designs, residual_map)
        found.residuals = residuals(
            run, vectors, lambda tensor: experts[tensor], scaling=lambda tensor: float(designs[tensor]["scaling"])
        )
        surrogates = None
        if num_surrogates:
            surrogates = _surrogates(again, vectors, experts, num_surrogates, seed, progress, found)
        level = max(LEVEL, 1 / (num_surrogates + 1))  # so few surrogates can reach no smaller one
        found.tails = pooled_tails(found.residuals, surrogates=surrogates, level=level, seed=seed)
    except (ValueError, CheckpointError, OSError) as error:
        part = "tails" if found.residuals is not None else "residuals"
        way_out = (
            " Otherwise name a residual map that measures them, --residual-map."
            if isinstance(error, NotBuiltIn)
            else ""
        )
        found.verdicts.append(Verdict(part, Level.UNKNOWN, f"left out: {error}{way_out}"))


def _surrogates(
    again: Callable[[], dict[str, AnyDesign]],
    vectors: TaskVectors,
    experts: Mapping[str, Experts],
    count: int,
    seed: int,
    progress: Progress | None,
    found: Findings,
) -> Surrogates | None:
    """Residuals of the same merge of Gaussian updates; where the record does not hold the merge, a note why not."""
    try:
        merge = unprepared(again())
        return surrogate_residuals(
            vectors, merge, lambda tensor: experts[tensor], num_surrogates=count, seed=seed, progress=progress
        )
    except ValueError as error:
        way_out = (
            " Otherwise make it in Python: `surrogate_residuals(task_vectors, poe)` with your product of experts."
            if isinstance(error, NotBuiltIn)
            else ""
        )
        text = f"the same merge of Gaussian updates could not be made, so that no tail has a null: {error}{way_out}"
        found.verdicts.append(Verdict("null control", Level.UNKNOWN, text))
        return None


def _experts(
    designs: Mapping[str, Mapping[str, Any]],
    residual_map: ResidualMap | None,
    again: Callable[[], dict[str, AnyDesign]],
) -> dict[str, Experts]:
    """Experts or the residual map that measure the residuals of each tensor."""

    def built_in(design: Mapping[str, Any]) -> Experts:
        if residual_map is not None:
            return residual_map
        return METHODS_MAP if "method" in design else experts_of(design)

    try:
        return {tensor: built_in(design) for tensor, design in designs.items()}
    except NotBuiltIn:
        own = again()
    return {tensor: each.poe if isinstance(each, Design) else METHODS_MAP for tensor, each in own.items()}


def _measured(designs: Mapping[str, Mapping[str, Any]], residual_map: ResidualMap | None) -> str:
    """Sentence on the map that measured residuals, where it was not the merge's own experts; else nothing."""
    if residual_map is not None:
        return f"Residuals are measured by {residual_map!r}, which was asked for."
    titles = dict.fromkeys(str(design["title"]) for design in designs.values() if "method" in design)
    if not titles:
        return ""
    return (
        f"{' and '.join(titles)} has no experts and so no residuals of its own: residuals are measured by "
        f"{METHODS_MAP!r} (`--residual-map` asks for another)."
    )


def recorded_designs(
    run: Path, record: Mapping[str, Any], base: Checkpoint, *, allow_code: bool
) -> dict[str, AnyDesign]:
    """Designs with which a recorded merge can be done again.

    Args:
        run: The merged folder.
        record: Contents of its ``poe_merge.json``.
        base: The open base, which an adapter as the anchor's centre is opened on.
        allow_code: Import the modules that its configuration names.

    Returns:
        Name of each merged tensor to its design; tensors that shared one do so again.

    Raises:
        NotBuiltIn: If a design is code of the user's own, which may not be imported, or which nothing names.
        ValueError: If that code has changed, or a design was given numbers that a record does not hold.
    """
    try:
        return merge_of(record, base)
    except NotBuiltIn as error:
        config = (record.get("settings") or {}).get("config")
        if isinstance(config, dict) and "functional" in config:
            raise NotBuiltIn(
                f"{run}: merged with experts on predictions, which a record does not hold, so that it cannot be done "
                "again from there."
            ) from None
        if not isinstance(config, dict):
            raise NotBuiltIn(f"{error} The merge was made in Python, so that nothing says where it is.") from None
        if not allow_code:
            way_out = "Add --allow-code to import it from where the merge's configuration names it."
            raise NotBuiltIn(f"{error} {way_out}") from None
    for path, digest in record["inputs"].get("code", {}).get("sha256", {}).items():
        if not Path(path).is_file() or file_digest(Path(path)) != digest:
            raise ValueError(f"{path} is not the code that the merge was made with. Put it back, or merge again.")
    settings = parse_config(Document(config), [run.absolute().parent, Path.cwd()], allow_code=True)
    table = designs_of(settings, base)
    return {str(each["tensor"]): table(str(each["tensor"])) for each in record["tensors"] if "design" in each}
