"""The commands of ``poe-merge``, from ``plan`` and ``merge`` to ``diagnose`` and ``evaluate``.

A command imports what it needs when it runs: torch and ArviZ take seconds, which ``poe-merge --help`` need not wait
for.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command
from typing_extensions import override

import poe_merge
from poe_merge import console as show
from poe_merge import documents, judging
from poe_merge.arguments import (
    AllowCode,
    AsJson,
    Config,
    Csv,
    InterruptedByUser,
    Out,
    Tasks,
    opened,
    read,
    required,
    shown_bars,
    taken_up,
    vectors,
)
from poe_merge.config import require_known
from poe_merge.csv_tables import write_csv
from poe_merge.errors import explained
from poe_merge.flags import ConfiguredCommand, SampleCommand, with_flags
from poe_merge.progress import Bars
from poe_merge.quiet import quietly
from poe_merge.ranks import rank_number, require_shared


class WholeSentences(TyperGroup):
    """Commands whose first sentences are listed whole, where click would cut them to a line."""

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, with the first paragraph of its help as its line in the list."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.short_help = command.help.partition("\n\n")[0]
        return command


app = typer.Typer(
    name="poe-merge",
    cls=WholeSentences,
    help="Merge fine-tuned models as a product of experts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors and warnings only, and what --json asks for, of any command.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, of any command.")] = False,
) -> None:
    if show_version:
        print(f"poe-merge {poe_merge.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=ConfiguredCommand)
@with_flags
def plan(
    flags: Mapping[str, Any], config: Config = None, allow_code: AllowCode = False, as_json: AsJson = False
) -> None:
    """Print the treatment of every tensor and the costs of a merge, from headers alone."""
    from inference.models.duration import measured_rates, predicted_seconds
    from inference.models.merge import plan as plan_merge
    from poe_merge.build import batch_bytes_of, designs_of
    from poe_merge.plan_text import show_plan

    settings, task_vectors = opened(config, flags, allow_code, functional=True)
    designs = designs_of(settings, task_vectors.base)
    batch_bytes = batch_bytes_of(settings, task_vectors, designs)
    planned = plan_merge(task_vectors, designs, out_dtype=settings.output_dtype, batch_bytes=batch_bytes)
    if settings.adapter is not None:
        from inference.models.adapters import adapter_bytes, refuse_no_adapter

        adapters = refuse_no_adapter(task_vectors, planned)
    seconds = predicted_seconds(task_vectors, planned, measured_rates(task_vectors.device))
    if as_json:
        documents.show(documents.plan(planned, task_vectors, seconds))
        return
    show_plan(planned, task_vectors, seconds)
    if settings.functional.tasks is not None:
        from poe_merge.functional import memory

        show.lines(memory(settings, task_vectors))
    if settings.adapter is not None:
        most = show.size(adapter_bytes(planned, adapters, settings.adapter[0], settings.output_dtype))
        show.line(f"Written as an adapter: {most} at most; time, memory and sizes above are those of a whole model.")


@app.command(cls=ConfiguredCommand)
@with_flags
def merge(
    flags: Mapping[str, Any],
    config: Config = None,
    out: Out = None,
    allow_code: AllowCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
) -> None:
    """Merge, and write a Hugging Face folder, or an adapter (--output)."""
    from inference.models.ranks import launched_ranks
    from poe_merge.merging import merge as merge_models

    out = required(out, "merge")
    with launched_ranks() as ranks:
        settings, task_vectors = opened(config, flags, allow_code, functional=True, ranks=ranks)
        with shown_bars(out) as bars:
            report = merge_models(settings, task_vectors, out, bars, resume=resume, ranks=ranks)
    show.merged(report)
    if settings.functional.tasks is not None:
        from poe_merge.functional import how_it_ended

        show.fitted(*how_it_ended(out))


@app.command(cls=ConfiguredCommand)
@with_flags
def search(
    flags: Mapping[str, Any],
    config: Config = None,
    out: Out = None,
    score: Annotated[
        str, typer.Option("--score", help="A metric, functional (no labels), or FILE.py:NAME of a state dict.")
    ] = "accuracy",
    tasks: Tasks = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier runs included.")] = 60,
    sampler: Annotated[str, typer.Option(help="gp (Gaussian process), random or grid.")] = "gp",
    storage: Annotated[
        str | None, typer.Option(help="Database of the study, sqlite:///study.db; memory if not given.")
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in the database.")] = "poe-merge",
    worker: Annotated[
        int, typer.Option(min=0, help="Number of this worker, or group of as many processes, on the study.")
    ] = 0,
    fraction: Annotated[float, typer.Option(help="Share of each task's batches that are used.")] = 1.0,
    submodule: Annotated[str, typer.Option(help="Where in the network the checkpoints are.")] = "",
    csv: Csv = None,
    search_seed: Annotated[int, typer.Option("--search-seed", min=0, help="Of the proposals.")] = 0,
    allow_code: AllowCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge of the best.")] = False,
) -> None:
    """Choose the settings that CONFIG gives as ranges by a score, and merge with the best ones."""
    from inference.models.plan import inputs_of
    from inference.models.ranks import launched_ranks
    from inference.models.staging import Staging, check_output
    from poe_merge import search as searching
    from poe_merge.scoring import scoring

    out = required(out, "search")
    space = searching.read_space(*read(config, flags), allow_code=allow_code)
    settings = space.middle()
    require_known(settings, functional=False)
    if settings.adapter is not None:
        raise ValueError("`output: adapter`: a search writes whole models. Merge its best configuration as an adapter.")
    task_vectors = vectors(settings)
    inputs = [Path(each.source) for each in inputs_of(task_vectors, []).values() if each.files]
    with launched_ranks() as ranks:
        if ranks.first:
            Staging(check_output(out, inputs, resume=resume), "merge").check(resume)
        ranks.wait()
        task_vectors.device = ranks.device(task_vectors.device)
        by = scoring(score, tasks, settings, space.folders, fraction, submodule, task_vectors.device)
        budget = searching.Budget(trials, sampler, storage, study, worker, search_seed)
        kept = "Nothing was written." if storage is None else f"The same command goes on with the study in {storage}."
        with shown_bars(out, kept) as bars:
            found, report = searching.search(space, task_vectors, by, out, budget, bars, resume=resume, ranks=ranks)
    if ranks.first:
        show.search(found, by.about, None if csv is None else write_csv(found.to_dataframe(), csv))
        show.report(report)


@app.command(cls=ConfiguredCommand)
@with_flags
def activations(
    flags: Mapping[str, Any],
    tasks: Annotated[str, typer.Option("--tasks", help="Python file with `network(base)` and `tasks()`.")],
    config: Config = None,
    out: Out = None,
    submodule: Annotated[str, typer.Option(help="Where in the network the checkpoints are.")] = "",
    allow_code: AllowCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the experts that are done.")] = False,
) -> None:
    """Collect second moments of layers' inputs, each expert on its task, for Activation and Mixed experts."""
    from inference.models.ranks import launched_ranks
    from poe_merge.activations import make_activations
    from poe_merge.user_tasks import read_tasks

    out = required(out, "activations")
    with launched_ranks() as ranks:
        settings, task_vectors = opened(config, flags, allow_code, ranks=ranks)
        user = read_tasks(tasks, [Path.cwd()])
        how: dict[str, Any] = {"submodule": submodule, "resume": resume, "ranks": ranks}
        with Bars() as bars:
            report = make_activations(settings, task_vectors, user, out, progress=bars, **how)
    show.activations(report)


@app.command("batch-norm")
def batch_norm(
    run: Annotated[Path, typer.Argument(help="A folder that `poe-merge merge` made.", show_default=False)],
    tasks: Annotated[str, typer.Option("--tasks", help="Python file with `network(base)` and `tasks()`.")],
    out: Out = None,
    submodule: Annotated[str, typer.Option(help="Where in the network the checkpoints are.")] = "",
    device: Annotated[str, typer.Option(help="Where the network runs: cpu, cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Write again what an interrupted run left.")] = False,
) -> None:
    """Copy a merge, with running statistics of BatchNorm re-estimated on tasks' inputs; labels are not used.

    Give one task whose batches have examples of all tasks: those of several tasks are run one task after the other.
    """
    from poe_merge.batch_norm import reestimate
    from poe_merge.user_tasks import read_tasks

    out = required(out, "batch-norm")
    user = read_tasks(tasks, [Path.cwd()])
    with shown_bars(out) as bars:
        steps = bars.steps("running statistics")
        report = reestimate(run, out, user, submodule=submodule, device=device, resume=resume, progress=steps)
    show.batch_norm(report)


@app.command(cls=ConfiguredCommand)
@with_flags
def stats(
    flags: Mapping[str, Any],
    config: Config = None,
    out: Out = None,
    allow_code: AllowCode = False,
) -> None:
    """Read the weights once, and save the Span statistics that poe-merge sample needs."""
    from inference.models.preparing import prepare_designs
    from inference.models.ranks import launched_ranks
    from poe_merge.build import DesignTable
    from poe_merge.stats import make_statistics

    out = required(out, "stats")
    with launched_ranks() as ranks:
        settings, task_vectors = opened(config, flags, allow_code, ranks=ranks)
        table = DesignTable(settings, task_vectors.base)
        with shown_bars(out) as bars:
            designs = prepare_designs(task_vectors, table, bars)
            report = make_statistics(settings, task_vectors, designs, out, bars, ranks)
    show.statistics(report)


@app.command(cls=SampleCommand)
@with_flags
def sample(
    flags: Mapping[str, Any],
    config: Config = None,
    members: Annotated[int, typer.Option("-n", "--members", min=1, help="How many merged models.")] = 10,
    out: Out = None,
    allow_code: AllowCode = False,
    merged: Annotated[
        Path | None,
        typer.Option("--merge", help="Folder of `poe-merge merge` to draw around, instead of CONFIG."),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Folder of `poe-merge stats` of the same merge.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="Algorithm that draws. [default: gibbs]")] = None,
    coordinates: Annotated[
        str | None,
        typer.Option(help="span: combinations of the updates and the merge; full: any update. [default: span]"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the posterior. [default: 1]")] = None,
    pattern: Annotated[str, typer.Option(help="Regular expression: draw only these modules.")] = "",
    format: Annotated[str, typer.Option(help="checkpoints, or deltas in float32.")] = "checkpoints",
    chains: Annotated[int | None, typer.Option(min=1, help="Number of chains. [default: 4]")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws kept per chain. [default: 500]")] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps per chain before the first kept draw. [default: the sampler's]")
    ] = None,
    thin: Annotated[int | None, typer.Option(min=1, help="Steps per kept draw. [default: 1]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Draw merged models from the posterior around the merge.

    The merge is the one that ``poe-merge merge`` makes of the same configuration, or has made (--merge). If the
    merging method (--method) is a random one, such as dare, the members are merges at as many seeds instead.
    """
    from inference.models.preparing import prepare_designs
    from inference.models.ranks import launched_ranks
    from poe_merge.build import MethodTable, designs_of
    from poe_merge.sample import sample as draw_members
    from poe_merge.sampling import Options, requested

    out = required(out, "sample")
    options = Options(members, pattern, format, sampler, coordinates, temperature, stats, chains, draws, warmup, thin)
    with launched_ranks() as ranks:
        settings, task_vectors = (
            opened(config, flags, allow_code, functional=True, ranks=ranks)
            if merged is None
            else taken_up(merged, config, flags, allow_code, ranks)
        )
        what = requested(settings, options)
        table = designs_of(settings, task_vectors.base)
        how: dict[str, Any] = {"statistics": stats, "merged": merged, "resume": resume, "ranks": ranks}
        with shown_bars(out) as bars:
            designs = table if isinstance(table, MethodTable) else prepare_designs(task_vectors, table, bars)
            report = draw_members(settings, task_vectors, designs, out, what, bars, **how)
    show.sample(report)


app.command()(judging.diagnose)
app.command()(judging.evaluate)
app.command()(judging.score)
app.command(cls=ConfiguredCommand)(judging.check)
app.command()(judging.presets)
app.command()(judging.methods)


def run(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: What was typed after ``poe-merge``.

    Returns:
        The exit status: 0, 2 for anything wrong with the input, 130 if interrupted, 1 for an error of the program.
    """
    typed = [word for word in arguments if word not in ("--debug", "--quiet")]
    command, first = get_command(app), rank_number() == 0
    try:
        require_shared(typed)
        with show.python_warnings(), quietly("--quiet" in arguments or not first, but_stdout="--json" in arguments):
            result = command.main(args=typed, prog_name="poe-merge", standalone_mode=False)
        if result == INTERRUPTED:  # typer's own answer to Ctrl-C
            show.warning("interrupted.")
        return result if isinstance(result, int) else 0
    except InterruptedByUser as told:
        show.warning(str(told))
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            raise
        message, status = explained(error, arguments, command)
        show.error(message if first else f"process {rank_number()}: {message}")
        return status


def main() -> None:
    """Entry point of the console script."""
    gc.set_threshold(50_000, 20, 20)  # plans and records are many objects and no garbage
    sys.exit(run(sys.argv[1:]))
