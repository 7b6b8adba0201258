"""Arguments that commands share, and the configuration and checkpoints that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poe_merge import console as show
from poe_merge.config import MergeConfig, parse_config, require_known
from poe_merge.flags import overridden
from poe_merge.progress import Bars
from poe_merge.settings import Document, read_yaml

if TYPE_CHECKING:
    from inference.models.ranks import Ranks
    from poe_models.weights.task_vectors import TaskVectors

Config = Annotated[Path | None, typer.Argument(help="YAML file; flags go before it.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to make.", show_default=False)]
Tasks = Annotated[
    str | None, typer.Option("--tasks", help="Python file with `network(base)` and `tasks()`.", show_default=False)
]
Csv = Annotated[Path | None, typer.Option("--csv", help="The table as a file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document in the place of the table.")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Import the modules that the configuration names: this runs their code, also in plan."
    ),
]


def opened(
    path: Path | None,
    flags: Mapping[str, Any],
    allow_code: bool,
    *,
    functional: bool = False,
    ranks: Ranks | None = None,
) -> tuple[MergeConfig, TaskVectors]:
    """Read the configuration and open what it names, on the device of this rank if there are several.

    Args:
        path: YAML file.
        flags: Settings in its place.
        allow_code: Import the modules that the file names.
        functional: Whether the command knows experts on predictions.
        ranks: The processes that share the work.
    """
    document, folders = read(path, flags)
    settings = parse_config(document, folders, allow_code=allow_code)
    require_known(settings, functional=functional)
    task_vectors = vectors(settings)
    if ranks is not None:
        task_vectors.device = ranks.device(task_vectors.device)
    return settings, task_vectors


def read(path: Path | None, flags: Mapping[str, Any]) -> tuple[Document, tuple[Path, ...]]:
    """The configuration with the flags in it, and the folders that its paths refer to."""
    document = overridden(Document() if path is None else read_yaml(path), flags)
    return document, (Path.cwd() if path is None else path.absolute().parent, Path.cwd())


def taken_up(
    merged: Path, config: Path | None, flags: Mapping[str, Any], allow_code: bool, ranks: Ranks
) -> tuple[MergeConfig, TaskVectors]:
    """The configuration of a merge, and what it names, on the device of this rank if there are several."""
    from poe_merge.record import config_of

    if config is not None:
        raise ValueError(f"{config}: --merge {merged} has its own configuration. Give one of the two.")
    settings = config_of(merged, flags, allow_code=allow_code)
    require_known(settings, functional=True)
    task_vectors = vectors(settings)
    task_vectors.device = ranks.device(task_vectors.device)
    return settings, task_vectors


def vectors(settings: MergeConfig) -> TaskVectors:
    """Open the checkpoints of a configuration; rules and filters that fit nothing are warned about."""
    from poe_merge.build import open_task_vectors
    from poe_merge.unmatched import unmatched

    task_vectors = open_task_vectors(settings)
    for text in unmatched(settings, task_vectors):
        show.warning(text)
    return task_vectors


class InterruptedByUser(Exception):
    """Ctrl-C, with the message that says how to go on."""


def required(out: Path | None, command: str) -> Path:
    """The folder to make.

    Raises:
        ValueError: If it was not given, or starts with somebody who has no home here.
    """
    if out is None:
        raise ValueError(f"`poe-merge {command}`: give the folder to make, --out DIR.")
    try:
        return out.expanduser()
    except RuntimeError as error:
        raise ValueError(f"--out {out}: {error}. Give another folder.") from error


@contextmanager
def shown_bars(out: Path, nothing: str = "Nothing was written.") -> Iterator[Bars]:
    """Progress bars; Ctrl-C says how to go on with what has been begun, if anything has.

    Args:
        out: The folder that is being made.
        nothing: What to say if nothing of it was begun.

    Yields:
        The bars.

    Raises:
        InterruptedByUser: If it was pressed.
    """
    try:
        with Bars() as bars:
            yield bars
    except KeyboardInterrupt:
        begun = out.with_name(out.name + ".partial")
        left = f"Go on with the same command and --resume; what is done so far is in {begun}."
        raise InterruptedByUser(f"interrupted. {left if begun.exists() else nothing}") from None
