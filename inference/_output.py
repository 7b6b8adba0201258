"""May the output be written there? Asked before anything is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path


class OutputError(RuntimeError):
    """The output cannot be written there, resumed, or finished; the message says what to do."""


def check_output(out: Path, inputs: Sequence[Path]) -> Path:
    """Refuse an output folder that would overwrite something.

    Args:
        out: The folder to be made.
        inputs: Folders and files that are read.

    Returns:
        Its absolute path, links resolved.

    Raises:
        OutputError: If it exists, contains an input, or lies inside an input folder.
    """
    resolved = out.expanduser().resolve()
    for source in (path.resolve() for path in inputs):
        if resolved == source or resolved in source.parents:
            raise OutputError(f"the output folder {out} contains the input {source}. Choose another folder.")
        if source.is_dir() and source in resolved.parents:
            raise OutputError(f"the output folder {out} lies inside the input {source}. Choose another folder.")
    if out.exists() or out.is_symlink():
        raise OutputError(f"the output folder {out} exists. Choose another name, or remove it first.")
    return resolved


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start a merge that the disk cannot hold.

    Args:
        folder: Where it is to be written; it need not exist yet.
        needed: Bytes still to be written.

    Raises:
        OutputError: If there is less space.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the merge needs {needed / 1e9:.3g} GB in {existing}, where {free / 1e9:.3g} GB are free. Free some space "
            "or choose another disk."
        )
