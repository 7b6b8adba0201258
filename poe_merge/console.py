"""Output of the command line: tables, reports, errors and progress bars."""

from __future__ import annotations

import inspect
import math
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from poe_merge.ranks import rank_number

if TYPE_CHECKING:  # an error needs none of these, which take seconds to import
    from diagnostics.predictions.functional_score import FunctionalScore
    from diagnostics.predictions.model_scores import ModelScores
    from diagnostics.verdicts import Verdict
    from inference.models.adapters import AdapterReport
    from inference.models.merge import MergeReport
    from inference.retention import ExpertRetention
    from inference.search import SearchResult
    from poe_merge.activations import ActivationsReport
    from poe_merge.batch_norm import BatchNormReport
    from poe_merge.presets import Preset
    from poe_merge.sample import SampleReport
    from poe_merge.sampling import Sampling, Seeds
    from poe_merge.stats import StatisticsReport
    from poe_models.methods import MergingMethod

_PIPED_WIDTH = 200
_SHOWN = 3


def console_for(stderr: bool = False) -> Console:
    """Return the console of standard output or of standard error, of a fixed width where nobody watches."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else _PIPED_WIDTH)


def visible(text: str) -> str:
    """Text with unprintable characters escaped; ``poe_models.printing`` is imported late, for it waits for torch."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """Text as a console may print it: visible, and no markup of Rich's."""
    return escape(visible(text))


def lines(text: str) -> None:
    """Print text of several lines to stdout."""
    print("\n".join(map(visible, text.split("\n"))))


def error(message: str) -> None:
    """Print an error to stderr: one line unless it lists several things; the terminal's width breaks it."""
    _print("red", "error", message)


def warning(message: str) -> None:
    """Print a warning to stderr; of several processes that share their work, the first one warns."""
    if rank_number() == 0:
        _print("yellow", "warning", message)


@contextmanager
def python_warnings() -> Iterator[None]:
    """Print what libraries warn of as this program's own warnings, whatever Python was told to do with them.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *where, **more: warning(str(message))
        yield


def _print(colour: str, word: str, message: str) -> None:
    console = console_for(stderr=True)
    first, *more = map(visible, message.strip().split("\n"))
    lines = [first, *(line if line.startswith(" ") else f"  {line}" for line in more)]  # none passes for a new message
    text = Text.assemble((f"{word}:", colour), " ", "\n".join(lines))  # no markup, which eats the backslashes of a rule
    console.print(text, soft_wrap=not console.is_terminal)


def search(result: SearchResult, about: str, csv: Path | None) -> None:
    """Print the best settings of a search, and what went wrong in it."""
    console = console_for()
    failed = [trial for trial in result.trials if trial.error]
    done = f"{len(result.trials)} trials" + (f", {len(failed)} of them failed" if failed else "")
    console.print(shown(f"{done}; best {about}: {result.score:.4g}."), soft_wrap=True)
    for name, value in result.values.items():
        console.print(shown(f"  {name}: {value if isinstance(value, str) else f'{value:.4g}'}"), soft_wrap=True)
    for trial in failed[:3]:
        warning(f"trial {trial.number}: {trial.error}")
    if csv is not None:
        console.print(shown(f"{csv}: all trials."), soft_wrap=True)


def activations(done: ActivationsReport) -> None:
    """Print whose moments were collected, and how to use them."""
    kept = f"; from before: {', '.join(done.kept)}" if done.kept else ""
    text = f"{done.out}: activations of {', '.join(done.collected) or 'nobody'}{kept}."
    console_for().print(shown(text), soft_wrap=True)
    console_for().print(shown(f"""Use them as --residual-map "Activation('{done.out}')"."""), soft_wrap=True)


def batch_norm(done: BatchNormReport) -> None:
    """Print how many statistics were re-estimated, and on what."""
    seen = ", ".join(f"{count} batches of {task}" for task, count in done.batches.items())
    console_for().print(shown(f"{done.out}: {len(done.tensors)} tensors re-estimated on {seen}."), soft_wrap=True)
    if len(done.batches) > 1:
        warning(
            "every batch has examples of one task, which normalise it alone. For statistics of the mixture give one "
            "task whose batches have examples of all: --tasks FILE.py:NAME."
        )


def report(done: MergeReport) -> None:
    """Print what a merge did, and what did not converge."""
    console = console_for()
    counts = ", ".join(
        f"{n} {word}" for word, n in zip(("merged", "averaged", "kept"), done.tensors.values(), strict=True)
    )
    batches = "batch" if done.resumed_batches == 1 else "batches"
    resumed = f", {done.resumed_batches} {batches} from before" if done.resumed_batches else ""
    console.print(
        f"{shown(str(done.out))}: tensors: {counts}; {done.modules} matrices solved; {size(done.nbytes)} written in "
        f"{done.seconds:.1f} s{resumed}."
    )
    if done.copied:
        console.print(shown(f"Copied from the base's folder: {', '.join(done.copied)}."), soft_wrap=True)
    if done.left_out:
        names = ", ".join(done.left_out)
        warning(f"left in the base's folder, links out of it or files of unknown kinds: {names}. Copy what you need.")
    if done.updated:
        share = done.rounded_back / done.updated
        console.print(f"Rounding left {share:.1%} of the changed weights at the base's value.")
    _experts(done)
    changed = done.tensors["merge"] + done.tensors["average"]
    if done.equal_to_base and done.equal_to_base == changed:
        warning("the merge is equal to the base: every tensor that was merged or averaged came out as it was.")
    elif done.equal_to_base:
        console.print(f"{done.equal_to_base} of {changed} merged or averaged tensors came out as the base's.")
    _not_converged(done.status)
    if done.not_converged:
        more = ", ..." if len(done.not_converged) > _SHOWN else ""
        warning(f"not converged: {', '.join(done.not_converged[:_SHOWN])}{more}; poe_merge.json lists all.")


def line(text: str) -> None:
    """Print one line of text, broken by the terminal's width."""
    console_for().print(shown(text), soft_wrap=True)


def fitted(told: str, concern: str) -> None:
    """Print how a fit with experts on predictions ended, and a concern if there is one."""
    line(told)
    if concern:
        warning(concern)


def merged(done: MergeReport | AdapterReport) -> None:
    """Print what a merge did."""
    from inference.models.adapters import AdapterReport

    if isinstance(done, AdapterReport):
        adapter(done)
    else:
        report(done)


def adapter(done: AdapterReport) -> None:
    """Print what a merge of adapters did."""
    ranks = sorted(set(done.ranks.values()))
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "none"
    whole = f", {len(done.replaced)} tensors replaced whole" if done.replaced else ""
    line(
        f"{done.out}: an adapter with factors of {done.modules} modules, {spread}{whole}; {size(done.nbytes)} written "
        f"in {done.seconds:.1f} s."
    )
    line(f"Relative Frobenius error of all merged updates from the rank: {done.error:.3g}.")
    _experts(done)
    _not_converged(done.status)


def _experts(done: MergeReport | AdapterReport) -> None:
    """Print what was kept of every expert."""
    if done.experts:
        line(f"Kept of the experts' updates: {', '.join(map(_kept, done.experts))}.")
    for text in done.concerns:
        warning(text)


def _not_converged(statuses: Mapping[str, int]) -> None:
    from inference.solution import Status

    for name, count in statuses.items():
        status = Status[name.upper()]
        if not status.converged:
            warning(f"{count} of {sum(statuses.values())} matrices {status}.")


def _kept(expert: ExpertRetention) -> str:
    from inference.retention import MOST_GROWN

    left = "" if math.isnan(expert.residual_left) else f" ({expert.residual_left:.0%} of its squared residual left)"
    if expert.residual_left > MOST_GROWN:
        left = f" (its squared residual grew {expert.residual_left:.0f}-fold)"
    return f"{expert.name} {'nothing, its update is zero' if math.isnan(expert.kept) else expert.kept_percent}{left}"


def statistics(done: StatisticsReport) -> None:
    """Print the contents of Span statistics."""
    from inference.models.statistics_files import statistics_digest

    about, maps = done.statistics, ", ".join(dict.fromkeys(done.statistics.residual_maps))
    console_for().print(
        shown(
            f"{done.out}: {len(about.modules)} modules, {len(about.updates)} experts ({', '.join(about.updates)}), "
            f"{maps} around the centre {about.center}; {_folder_size(done.out)} in {done.seconds:.1f} s; digest "
            f"{statistics_digest(about)[:12]}."
        ),
        soft_wrap=True,
    )


def sample(done: SampleReport) -> None:
    """Print the draws, whether their chains agree, and warnings."""
    from inference.models.model_draws import PosteriorDraws
    from poe_merge.sampling import Seeds

    what, draws, console = done.what, done.drawn.draws, console_for()
    made = f"{done.out}: {what.members} members as {what.format}, {_folder_size(done.out)} in {done.seconds:.1f} s"
    modules = "1 module" if len(draws.modules) == 1 else f"{len(draws.modules)} modules"
    name = what.method if isinstance(what, Seeds) else what.sampler
    console.print(shown(f"{made}; {modules} drawn by {name} {_how_drawn(what, done.shared)}."), soft_wrap=True)
    if what.pattern:
        console.print(shown(f"--pattern {what.pattern!r} fits {done.found[0]} of {done.found[1]} merged modules."))
    _chains(done, console)
    if done.drawn.experts:
        kept = ", ".join(map(_kept, done.drawn.experts))
        console.print(shown(f"The merge kept of the experts' updates: {kept}."), soft_wrap=True)
    if isinstance(draws, PosteriorDraws) and draws.from_merge is not None:
        console.print(shown(f"{draws.about}: {draws.from_merge}."), soft_wrap=True)
    for text in done.warnings:
        warning(text)


def _chains(done: SampleReport, console: Console) -> None:
    """Print whether the chains agree."""
    found, draws = done.drawn.convergence, done.drawn.draws
    if found is None:
        console.print("Independent draws: there are no chains to judge.")
        if draws.kind == "full":
            console.print("No draws.nc: of these draws seeds are kept, and no numbers for ArviZ.")
        return
    r_hat, ess = (
        "unknown" if value is None else f"{value:{form}}"
        for value, form in ((found["r_hat"], ".3f"), (found["ess"], ".0f"))
    )
    chains = "1 chain" if draws.num_chains == 1 else f"{draws.num_chains} chains"
    console.print(f"{chains} of {draws.num_draws} draws: largest R-hat {r_hat}, smallest effective sample size {ess}.")
    for text in found["warnings"]:
        warning(text)


def _folder_size(folder: Path) -> str:
    return size(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def _how_drawn(what: Sampling | Seeds, shared: int) -> str:
    from poe_merge.sampling import Seeds

    if isinstance(what, Seeds):
        rest = f", {shared} more tensors at seed {what.first}" if shared else ""
        return f"at the seeds {', '.join(map(str, what.seeds))}{rest}"
    rest = f", {shared} more tensors at the merge" if shared else ""
    return f"in {what.coordinates.capitalize()} coordinates at temperature {what.temperature:g}{rest}"


def diagnosis(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Print where the page is and its warnings, the worst first."""
    for found in verdicts:
        warning(f"{found.about}: {found.text}")
    console_for().print(f"{shown(str(path))}: {len(verdicts) or 'no'} warning{'' if len(verdicts) == 1 else 's'}.")


def scores(found: ModelScores, csv: Path | None) -> None:
    """Print the scores of models, and where they were written."""
    console = console_for()
    console.print(found)
    console.print(f"Intervals of {found.confidence:.0%}; ? marks those not to be trusted.")
    if csv is not None:
        console.print(shown(f"{csv}: the same as a file."), soft_wrap=True)


def divergences(found: FunctionalScore, csv: Path | None) -> None:
    """Print the functional scores of models, the nearest to the experts first, and where they were written."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("model", "KL", *map(shown, found.tasks)):
        table.add_column(head, overflow="fold")
    for model in found.ranking:
        table.add_row(shown(model), str(found.mean(model)), *(str(found.on_task(model, task)) for task in found.tasks))
    console = console_for()
    console.print(table)
    console.print(f"Nats an input, lower is nearer to the tasks' own experts; intervals of {found.confidence:.0%}.")
    if csv is not None:
        console.print(shown(f"{csv}: the same as a file."), soft_wrap=True)


def presets(known: Mapping[str, Preset]) -> None:
    """Print the presets: what they are for, and what they set."""
    table = Table("preset", "scaling", "scale", "for", box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.columns[0].no_wrap = True
    common = set.intersection(*({*map(str, preset.parameters.items())} for preset in known.values()))
    for name, preset in known.items():
        values = preset.parameters
        table.add_row(name, str(values["scaling"]), values["scale"], shown(preset.about))
    console = console_for()
    console.print("Bui et al. (2026), arXiv 2607.01689, Table 5:\n")
    console.print(table)
    first = next(iter(known.values())).parameters
    shared = ", ".join(f"{key}: {value}" for key, value in first.items() if str((key, value)) in common)
    console.print(f"\nAll of them: {shown(shared)}.")


def methods(known: Mapping[str, type[MergingMethod]]) -> None:
    """Print the merging methods: what they see and need, how they are called, whom to cite."""
    table = Table("method", "sees", "needs", "streams", "random", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.columns[0].no_wrap = True
    for name, method in known.items():
        about = method.about
        streams, random = (("yes" if flag else "no") for flag in (about.streaming, about.random))
        table.add_row(name, f"a {about.scope}", "nothing" if about.data == "none" else about.data, streams, random)
    console = console_for()
    console.print(table)
    for name, method in known.items():
        console.print()
        _paragraph(console, f"{name}({', '.join(_settings(method))})")
        _paragraph(console, f"{method.about.title}. {method.about.citation}", "  ")


def _paragraph(console: Console, text: str, indent: str = "") -> None:
    """Print text between words at the terminal's width, further lines indented; on one line where nobody watches."""
    if console.is_terminal:
        text = textwrap.fill(
            text,
            console.width,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    else:
        text = indent + text
    console.print("\n".join(map(shown, text.split("\n"))), soft_wrap=True)


def _settings(method: type[MergingMethod]) -> list[str]:
    """Its settings with their defaults; without those that are filled in by a look at the model, which are None."""
    parameters = inspect.signature(method).parameters.values()
    named = ((p.name, p.default) for p in parameters if p.default is not None)
    return [name if default is inspect.Parameter.empty else f"{name}={default!r}" for name, default in named]


def size(nbytes: float) -> str:
    """Bytes as text; imported late, for ``poe_models`` takes seconds."""
    from poe_models.printing import size_text

    return size_text(nbytes)
