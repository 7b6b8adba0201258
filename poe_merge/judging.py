"""Commands that judge: ``diagnose``, ``evaluate``, ``score`` and ``check``, and the lists of what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from poe_merge import console as show
from poe_merge import documents
from poe_merge.arguments import AllowCode, AsJson, Config, Csv, Tasks, opened
from poe_merge.csv_tables import write_csv
from poe_merge.flags import with_flags
from poe_merge.presets import PRESETS
from poe_merge.progress import Bars
from poe_merge.specs import METHOD, RESIDUAL_MAP, parse_spec


def diagnose(
    run: Annotated[Path, typer.Argument(help="A folder that `poe-merge merge` made.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    draws: Annotated[
        Path | None, typer.Option("--draws", help="Draws of the same merge: `draws` of `poe-merge sample`.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Class probabilities and labels, .npz or .safetensors.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option("--activations", help="Moments of the experts' inputs, a folder of `poe-merge activations`."),
    ] = None,
    tails: Annotated[bool, typer.Option("--tails/--no-tails", help="Read all weights for the residuals.")] = True,
    residual_map: Annotated[
        str | None,
        typer.Option(
            "--residual-map",
            help="Measures residuals in the place of the merge's experts; InputGram where a method has merged.",
            show_default=False,
        ),
    ] = None,
    num_surrogates: Annotated[
        int,
        typer.Option(
            "--surrogates",
            min=0,
            help="Merges of Gaussian updates that tails are compared with; each takes as long as the merge.",
        ),
    ] = 19,
    seed: Annotated[int, typer.Option("--seed", help="Of resamples and surrogates.")] = 0,
    allow_code: AllowCode = False,
) -> None:
    """Judge a merge: one page of verdicts, tables and figures."""
    from poe_merge import diagnose as diagnosis

    diagnosis.check_out(out)
    measure = None if residual_map is None else parse_spec(residual_map, RESIDUAL_MAP)
    with Bars() as bars:
        page = diagnosis.diagnose(
            run,
            draws=draws,
            predictions=predictions,
            activations=activations,
            tails=tails,
            residual_map=measure,
            num_surrogates=num_surrogates,
            seed=seed,
            allow_code=allow_code,
            progress=bars,
        )
    show.diagnosis(diagnosis.write_page(page.html, out), page.warnings)


def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file with base_model, models and tasks.", show_default=False)],
    tasks: Tasks = None,
    csv: Csv = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Score models on tasks: accuracy, NLL, calibration, perplexity and others, with intervals and comparisons."""
    from inference.models.ranks import launched_ranks
    from poe_merge import evaluate as evaluation

    settings, folders = evaluation.load_evaluation(config, tasks, allow_code=allow_code)
    with launched_ranks() as ranks, Bars() as bars:
        found = evaluation.evaluate(settings, folders, bars.steps("evaluating"), ranks)
    if not ranks.first:
        return
    written = None if csv is None else write_csv(found.to_dataframe(), csv)
    if as_json:
        documents.show(documents.scores(found))
    else:
        show.scores(found, written)


def score(
    config: Annotated[
        Path, typer.Argument(help="YAML file with base_model, models, tasks and experts.", show_default=False)
    ],
    tasks: Tasks = None,
    csv: Csv = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Rank models without labels: mean divergence of their predictions from those of each task's own expert."""
    from inference.models.ranks import launched_ranks
    from poe_merge import evaluate as evaluation

    settings, folders = evaluation.load_evaluation(config, tasks, allow_code=allow_code)
    with launched_ranks() as ranks, Bars() as bars:
        found = evaluation.score(settings, folders, bars.steps("scoring"), ranks)
    if not ranks.first:
        return
    written = None if csv is None else write_csv(found.to_dataframe(), csv)
    if as_json:
        documents.show(documents.divergences(found))
    else:
        show.divergences(found, written)


@with_flags
def check(
    flags: Mapping[str, Any],
    method: Annotated[str, typer.Argument(help="'Ties(density=0.1)', my_module:MyMethod(...)", show_default=False)],
    config: Config = None,
    allow_code: AllowCode = False,
    not_promised: Annotated[
        list[str] | None,
        typer.Option("--not-promised", help="A property it need not have; once for each.", show_default=False),
    ] = None,
    random_seed: Annotated[int, typer.Option("--random-seed", min=0, help="Of the random modules.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Test the properties of a merging method, on random modules and on those of a configuration.

    Moments and data of random modules are random. The exit status is 1 if a property is broken.
    """
    from poe_merge.check import check_method, summary

    real = config is not None or any(value is not None for value in flags.values())
    task_vectors = opened(config, flags, allow_code)[1] if real else None
    report = check_method(method, task_vectors, not_promised or [], random_seed)
    if as_json:
        documents.show(documents.check(report))
    else:
        show.lines(summary(report))
    if report.broken:
        raise typer.Exit(1)


def presets() -> None:
    """List the named settings of the paper."""
    show.presets(PRESETS)


def methods(as_json: AsJson = False) -> None:
    """List the merging methods of the literature, with what they need and whom to cite."""
    if as_json:
        documents.show(documents.methods(METHOD.registry))
    else:
        show.methods(METHOD.registry)
