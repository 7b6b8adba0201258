"""Atomic writing of files, and errors of the disk as one ``OutputError`` that says what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from poe_models.printing import size_text
from poe_models.weights.checkpoint import InputChanged

RESUME = "go on with `--resume` (`resume=True`); nothing finished so far is lost"
"""Advice where a run can be resumed once the disk is mended."""

_FULL = (
    "the disk of {folder} is full",
    "Free some space and {again}. (`df` and `df -i` say what is full: bytes or files.)",
)
_ELSEWHERE = "Make it writable and {again}, or choose another output."
_CLOSED = ("{folder} may not be written by this user", _ELSEWHERE)
_REFUSALS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        "{file} would be larger than files may be here (`ulimit -f`, or the disk's own limit)",
        "Raise the limit or choose another disk, and {again}.",
    ),
    errno.ENAMETOOLONG: ("the name {file} is too long for this disk", "Choose a shorter one."),
    errno.EROFS: ("{folder} is on a disk that can only be read", _ELSEWHERE),
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
}
_CODE = re.compile(r"(?:os error|errno =|\[Errno) ?(\d+)")


class OutputError(RuntimeError):
    """The output cannot be written there, resumed, or finished; the message says what to do."""


def real_path(path: Path) -> Path:
    """A path with its links resolved, as far as they lead anywhere: a link to itself stays what it is."""
    return Path(os.path.realpath(path))


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start what needs more bytes than the disk of a folder has; the folder need not exist yet.

    Raises:
        OutputError: If there is less space.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the merge needs {size_text(needed)} in {existing}, where {size_text(free)} are free. Free some space "
            "or choose another disk."
        )


@contextmanager
def disk_errors(file: Path, again: str = RESUME) -> Iterator[None]:
    """Within the block a failed write (disk full, no permission) raises one ``OutputError``.

    Args:
        file: What is written.
        again: What to do once the cause is gone.

    Yields:
        Nothing.

    Raises:
        OutputError: If the disk is full or read-only, a limit is reached, or anything else is in the way.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # HDF5 has all of them
        code = _errno(error)
        if code is None or isinstance(error, OutputError):
            raise
        reason, way_out = _REFUSALS.get(code, ("{file} cannot be written ({text})", "Remove the cause and {again}."))
        text = f"{reason}. {way_out}".format(file=file, folder=file.parent, text=os.strerror(code), again=again)
        raise OutputError(text) from error


@contextmanager
def changed(folder: Path, progress: Callable[[], bool], again: str = RESUME) -> Iterator[None]:
    """Within the block the error of an input that changed says what to do with what is finished, if anything is.

    Args:
        folder: What is finished lies here.
        progress: Tells whether anything is finished.
        again: What to do once the file is as it was.

    Yields:
        Nothing.

    Raises:
        InputChanged: If an input changed.
    """
    try:
        yield
    except InputChanged as error:
        if not progress():
            raise
        raise InputChanged(
            f"{error} To keep what is finished, put the file back as it was and {again}. To start with it as it is "
            f"now, remove {folder}."
        ) from error


@contextmanager
def only_process(folder: Path, again: str = RESUME) -> Iterator[None]:
    """Keep other processes out of a folder within the block.

    Args:
        folder: The folder.
        again: What to do once the disk is mended.

    Yields:
        Nothing; the folder is this process's own until the block ends.

    Raises:
        OutputError: If another process is in it.
    """
    with disk_errors(folder, again):
        opened = os.open(folder, os.O_RDONLY)  # the folder itself: nothing to clean up, follows a rename
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise OutputError(f"another process is writing into {folder}. Wait for it, or end it.") from None
    try:
        yield
    finally:
        os.close(opened)


def _errno(error: BaseException) -> int | None:
    """The system's number for an error; safetensors and HDF5 have it in their text, or in that of the cause."""
    known = getattr(error, "errno", None)
    if known is None and (found := _CODE.search(str(error))):
        known = int(found[1])
    cause = error.__cause__ or error.__context__
    return known if known is not None or cause is None else _errno(cause)


def replace_file(file: Path, write: Callable[[Path], Any], again: str = RESUME) -> None:
    """Write a file under another name, flush it to the disk, and rename it: it is there whole or not at all.

    Args:
        file: The file; one that is there is replaced.
        write: Writes it at the path that it is given.
        again: What to do once the disk is mended.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary = file.with_name(file.name + ".tmp")
    with disk_errors(file, again):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors puts a file of its own there, which only its owner can read
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
