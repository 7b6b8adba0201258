"""The output folder while it is being written: `OUT.partial`, finished parts, resuming, and one rename at the end.

    OUT.partial/merge_state.json                what is being merged; a resumed run must be about the same
    OUT.partial/parts/00000-00003.safetensors   finished tensors of shard 0, group 3, with their records in the header
    OUT.partial/records/00000.json              records of a finished shard, whose parts are gone
    OUT.partial/model/                          finished shards and other files: what becomes OUT

Every file is written under another name, flushed to the disk and renamed, so that a file that is there is whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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


STATE, PARTS, RECORDS, MODEL = "merge_state.json", "parts", "records", "model"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXT = re.compile(rf"os error ({'|'.join(str(code) for code in sorted(_FULL))})\b")


class Staging:
    """Writes `OUT.partial`.

    Args:
        out: The folder that exists at the end.

    Attributes:
        folder: `OUT.partial`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")

    def check(self, resume: bool) -> None:
        """Refuse to run over an interrupted merge unasked.

        Args:
            resume: Whether to go on with it.

        Raises:
            OutputError: If there is one and `resume` is false, or the folder is something else.
        """
        if self.folder.exists() and not resume:
            raise OutputError(
                f"{self.folder} is left from an interrupted merge. Go on with it (`resume=True`, or `--resume` on the "
                "command line), or remove that folder to start again."
            )
        if self.folder.exists() and not (self.folder / STATE).exists():
            raise OutputError(
                f"{self.folder} has no {STATE}: it is not an interrupted merge. Look at what it is, and move it or "
                "choose another output folder."
            )

    @contextmanager
    def begin(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Start `OUT.partial`, or go on with the one that is there, and keep other processes out of it.

        Args:
            state: What is merged: settings, digests of the inputs, versions; plain data.

        Yields:
            Nothing; the folder is this process's own until the block ends.

        Raises:
            OutputError: If the folder is about another merge, or another process works in it.
        """
        if (self.folder / STATE).exists():
            self._check_same(json.loads((self.folder / STATE).read_text(encoding="utf-8")), state)
        with self.disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(), self.disk_errors():
            for stale in self.folder.rglob("*.tmp"):
                stale.unlink()
            self._write_json(self.folder / STATE, state)
            for name in (PARTS, RECORDS, MODEL):
                (self.folder / name).mkdir(exist_ok=True)
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(
            self.folder, os.O_RDONLY
        )  # the folder itself: nothing to clean up, and it follows a rename
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise OutputError(f"another process is merging into {self.folder}. Wait for it, or end it.") from None
        finally:
            os.close(descriptor)

    def nbytes(self) -> int:
        """Bytes that are in the folder already."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        old, new = dict(_leaves(before)), dict(_leaves(json.loads(json.dumps(now))))
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise OutputError(
                f"{self.folder} was begun with `{key}` = {old.get(key)!r}, now it is {new.get(key)!r}{more}: not the "
                "same merge. Restore what it was, or remove that folder to start again."
            )

    def part(self, shard: int, group: int) -> Path:
        """Path of the part of one group."""
        return self.folder / PARTS / f"{shard:05d}-{group:05d}.safetensors"

    def has_part(self, shard: int, group: int, names: Sequence[str]) -> bool:
        """Whether a group is finished: its part opens and holds just these tensors."""
        try:
            with safe_open(self.part(shard, group), framework="pt") as file:
                return set(file.keys()) == set(names)
        except (OSError, SafetensorError):
            return False

    def save_part(self, shard: int, group: int, tensors: Mapping[str, Tensor], records: Sequence[Any]) -> None:
        """Save the tensors of a finished group with their records.

        Args:
            shard: Number of the shard.
            group: Number of the group in the shard.
            tensors: CPU tensors by name.
            records: Plain data.
        """
        metadata = {"records": json.dumps(records)}
        self._replace(self.part(shard, group), lambda path: save_file(dict(tensors), path, metadata=metadata))

    def has_shard(self, shard: int, name: str) -> bool:
        """Whether a shard is finished."""
        return (self.folder / MODEL / name).exists() and (self.folder / RECORDS / f"{shard:05d}.json").exists()

    def finish_shard(self, shard: int, name: str, groups: int, aliases: Mapping[str, str]) -> None:
        """Assemble a shard from its parts, which are memory-mapped and not read into memory.

        Args:
            shard: Number of the shard.
            name: Its file name.
            groups: How many groups it has.
            aliases: Further names of tied tensors to the names they are saved under; written as equal tensors.
        """
        paths = [self.part(shard, group) for group in range(groups)]
        tensors: dict[str, Tensor] = {}
        records: list[Any] = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                records += json.loads(file.metadata()["records"])
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        for alias, target in aliases.items():
            path = next(path for path in paths if target in _names(path))
            with safe_open(path, framework="pt") as file:  # a second map: safetensors saves no tensor twice
                tensors[alias] = file.get_tensor(target)
        self._write_json(self.folder / RECORDS / f"{shard:05d}.json", records)
        self._replace(self.folder / MODEL / name, lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    def drop_parts(self, shard: int) -> None:
        """Remove the parts of a finished shard."""
        for path in (self.folder / PARTS).glob(f"{shard:05d}-*.safetensors"):
            path.unlink()

    def records(self) -> list[Any]:
        """The records of all finished shards, in order."""
        files = sorted((self.folder / RECORDS).glob("*.json"))
        return [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the model; numbers that JSON lacks (NaN, infinity) become null."""
        self._write_json(self.folder / MODEL / name, data)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the model."""
        self._replace(self.folder / MODEL / name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, source: Path, name: str) -> None:
        """Copy a file into the model."""
        (self.folder / MODEL / name).parent.mkdir(parents=True, exist_ok=True)
        self._replace(self.folder / MODEL / name, lambda path: shutil.copyfile(source, path))

    def publish(self) -> None:
        """Move the model into place, and remove what only resuming needs.

        Raises:
            OutputError: If something else has taken the place.
        """
        if self.out.exists():
            raise OutputError(
                f"{self.out} has appeared in the meantime. The merge is complete in {self.folder / MODEL}: move it."
            )
        (self.folder / MODEL).rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove `OUT.partial`."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_json(self, path: Path, data: Any) -> None:
        text = json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n"
        self._replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _replace(self, path: Path, write: Callable[[Path], Any]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with self.disk_errors():
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors puts a file of its own there, which only its owner can read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn a full disk into one `OutputError`.

        Yields:
            Nothing.

        Raises:
            OutputError: If the disk is full.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)):
                for unfinished in self.folder.rglob("*.tmp"):
                    unfinished.unlink()
                raise OutputError(
                    f"the disk of {self.folder} is full. Free some space and go on with `--resume` (`resume=True`); "
                    "nothing finished so far is lost."
                ) from error
            raise


def _names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _leaves(data: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Plain data as pairs of a dotted path and a leaf."""
    if isinstance(data, Mapping) and data:
        return [pair for k, v in data.items() for pair in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(data, list) and data:
        return [pair for index, value in enumerate(data) for pair in _leaves(value, f"{prefix}[{index}]")]
    return [(prefix, data)]


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not (abs(data) < float("inf")) else data
