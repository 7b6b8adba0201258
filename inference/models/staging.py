"""An output folder while it is written: ``OUT.partial``, finished files in it, resuming, and one rename at the end.

    OUT.partial/state.json                   what is written; a resumed run must be about the same
    OUT.partial/parts/SHARD/00003.*          tensors of batch 3 of a weight file, and lines of their digest and records
    OUT.partial/records/SHARD.json           digest and records of a finished weight file, whose parts are gone
    OUT.partial/output/                      finished files: what becomes OUT

Files are written under other names, flushed and renamed: what is there is whole. Its owner alone removes progress.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from inference.models.digest import difference
from inference.models.disk import RESUME, OutputError, changed, disk_errors, only_process, real_path, replace_file
from inference.models.parts import Records, digest_beside, finished, intact, once, whole
from inference.models.places import portable
from inference.models.plain_json import Encoded, finite, json_text
from inference.models.ranks import ALONE, Ranks
from poe_models.weights.checkpoint import CheckpointError
from poe_models.weights.saving import save_file
from poe_models.weights.weight_files import SafetensorsFile, tie_metadata

STATE, PARTS, RECORDS, OUTPUT = "state.json", "parts", "records", "output"
_PRETTY = 2**20
Finished = tuple[Mapping[str, Tensor], Sequence[Any]]
"""CPU tensors of a batch by name, and their records: plain data."""
Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a file by its name."""
Batch = TypeVar("Batch")


def check_output(out: Path, inputs: Sequence[Path], *, resume: bool = False) -> Path:
    """Refuse an output folder that would overwrite something.

    Args:
        out: The folder to be made.
        inputs: Folders and files that are read.
        resume: Accept one that an interrupted run has put in place already, before it could clean up.

    Returns:
        Its absolute path, links resolved.

    Raises:
        OutputError: If it exists, contains an input, or lies inside an input folder.
    """
    resolved = real_path(out.expanduser())
    for source in map(real_path, inputs):
        if resolved == source or resolved in source.parents:
            raise OutputError(f"the output folder {out} contains the input {source}. Choose another folder.")
        if source.is_dir() and source in resolved.parents:
            raise OutputError(f"the output folder {out} lies inside the input {source}. Choose another folder.")
    staging = Staging(resolved)
    with disk_errors(resolved):
        taken = out.exists() or out.is_symlink()
        staging.folder.exists()  # whose name is longer
    if taken and not (resume and staging.published):
        staging.tidy()
        done = ", and no interrupted run of it is left to go on with" if resume and not staging.folder.exists() else ""
        raise OutputError(f"the output folder {out} exists{done}. Choose another name, or remove it first.")
    return resolved


class Staging:
    """An output folder being written.

    Args:
        out: The folder that exists at the end.
        what: What is written, for messages: "merge", "save".
        again: What to do after a full disk or the like.

    Attributes:
        folder: ``OUT.partial``.
    """

    def __init__(self, out: Path, what: str = "save", again: str = RESUME) -> None:
        self.out, self.what, self.again = out, what, again
        self.folder = out.with_name(out.name + ".partial")
        self._fresh = False
        self._check_inputs: Callable[[], None] = lambda: None
        self._expected: dict[str, Headers] = {}
        self._records = Records()

    @property
    def published(self) -> bool:
        """True if OUT is in place, and only the clean-up was interrupted."""
        return self.out.is_dir() and (self.folder / STATE).is_file() and not (self.folder / OUTPUT).exists()

    @property
    def content(self) -> Path:
        """The folder that finished files are in."""
        return self.out if self.published else self.folder / OUTPUT

    @property
    def _nothing_finished(self) -> bool:
        files = (path for path in self.folder.rglob("*") if path.is_file() and path != self.folder / STATE)
        return not self.published and not any(finished(path, self.folder / PARTS) for path in files)

    def check(self, resume: bool) -> None:
        """Refuse to run over an interrupted run unless it is to be resumed.

        Raises:
            OutputError: If there is one and ``resume`` is false, another process is at it, or it is something else.
        """
        if not self.folder.exists() or all(path.suffix == ".tmp" for path in self.folder.iterdir()):
            return  # killed before it had said what it was about: there is nothing to go on with
        if not (self.folder / STATE).exists():
            raise OutputError(
                f"{self.folder} has no {STATE}: it is not an interrupted {self.what}. Look at what it is, and move it "
                "or choose another output folder."
            )
        with only_process(self.folder, self.again):
            if not resume and not self._nothing_finished:
                raise OutputError(
                    f"{self.folder} is left from an interrupted {self.what}. Go on with it (`resume=True`, or "
                    "`--resume` on the command line), or remove that folder to start again."
                )

    @contextmanager
    def begin(self, state: Mapping[str, Any], check_inputs: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Start ``OUT.partial``, or go on with the one that is there, and keep other processes out of it.

        One in which nothing is finished is started anew, and removed if an input or a setting is refused.

        Args:
            state: What is written: settings, digests of the inputs, versions; plain data.
            check_inputs: Raises if an input is not what its digest says any more. Called before a batch that is written
                counts as finished, and before the output is moved into place.

        Yields:
            Nothing; the folder is this process's own until the block ends.

        Raises:
            OutputError: If the folder is about something else, another process works in it, or the disk is full.
        """
        self._check_inputs = check_inputs
        with disk_errors(self.folder, self.again):
            self.folder.mkdir(parents=True, exist_ok=True)
        with only_process(self.folder, self.again):
            self._fresh = self._nothing_finished
            if not self._fresh:
                self._check_same(self._begun_with(), state)
            with disk_errors(self.folder, self.again):
                for stale in self.folder.rglob("*.tmp"):
                    stale.unlink()
            if not self.published:
                self._write_json(self.folder / STATE, state)
                with disk_errors(self.folder, self.again):
                    (self.folder / OUTPUT).mkdir(exist_ok=True)
            try:
                with changed(self.folder, lambda: not self._nothing_finished, self.again):
                    yield
            except ValueError:
                if self._nothing_finished:
                    self._remove()
                raise

    @contextmanager
    def shared(
        self, ranks: Ranks, state: Mapping[str, Any], check_inputs: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Begin in the first rank, and go along with it in the others.

        Args:
            ranks: The processes that write the output.
            state: As of ``begin``; that of the first rank counts.
            check_inputs: As of ``begin``, in every rank.

        Yields:
            Nothing; the folder is the ranks' own until the block ends in the first of them.
        """
        if ranks.first:
            with self.begin(state, check_inputs):
                ranks.wait()
                yield
        else:
            ranks.wait()
            self._check_inputs = check_inputs
            with changed(self.folder, lambda: not self._nothing_finished, self.again):
                yield
        ranks.wait()

    def _begun_with(self) -> Any:
        try:
            return json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.folder / STATE} is damaged ({error}). Remove that folder.") from error

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = difference(before, json.loads(json.dumps(finite(now))))
        if differing:
            place, old, new = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise OutputError(
                f"{self.folder} was begun with `{place}` = {old}, now it is {new}{more}: not the same {self.what}. "
                "Restore what it was, or remove that folder to start again."
            )

    def nbytes(self) -> int:
        """Bytes that are in the folder already."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def write_shard(
        self,
        name: str,
        batches: Sequence[Batch],
        make: Callable[[Batch], Finished],
        aliases: Mapping[str, str],
        headers: Headers,
        done: Callable[[Batch], None] = lambda batch: None,
        ranks: Ranks = ALONE,
        costs: Sequence[float] = (),
    ) -> int:
        """Write a weight file batch by batch; batches that an earlier run finished are verified, and not made again.

        Several ranks divide the batches, and wait for each other before one of them assembles the file.

        Args:
            name: Path of the file in the output.
            batches: Descriptions of its batches of tensors.
            make: Makes the tensors and records of a batch.
            aliases: Further names of tied tensors to saved ones; those not in ``headers`` go into the file's metadata.
            headers: What the file must hold in the end.
            done: Called with every batch of this rank's once it is saved.
            ranks: The processes that write the output.
            costs: Of each batch, for their division; none if all cost the same.

        Returns:
            How many of this rank's batches were there already.
        """
        assembler = len(self._expected) % ranks.size  # the next rank's turn, while the others go on
        self._expect(name, headers)
        whole, there = self.has_shard(name), 0
        for number in sorted(ranks.share(costs or [1.0] * len(batches))):
            if whole or self.has_part(name, number):
                there += 1
            else:
                self.save_part(name, number, make(batches[number]), once(aliases, headers))
            done(batches[number])
        ranks.wait()
        if ranks.rank == assembler:
            if not whole:
                self.finish_shard(name, len(batches), aliases, headers)
            shutil.rmtree(self.folder / PARTS / name, ignore_errors=True)
        return there

    def has_part(self, name: str, batch: int) -> bool:
        """Return whether a batch of a weight file is finished and has the bytes that were written."""
        return intact(self._part(name, batch), self._part(name, batch).with_suffix(".json"))

    def save_part(self, name: str, batch: int, made: Finished, ties: Mapping[str, str]) -> None:
        """Save the tensors of a finished batch with their records, and the ties that the whole file notes."""
        path, (tensors, records) = self._part(name, batch), made
        self._replace(path, lambda temporary: save_file(tensors, temporary, metadata=tie_metadata(ties)))
        self._check_inputs()  # after the last look at them, and before the batch counts as finished
        place = path.with_suffix(".json")
        self._write_text(place, self._records.text(place, path, records))

    def has_shard(self, name: str) -> bool:
        """Return whether a weight file is finished and has the bytes that were written."""
        return intact(self.folder / OUTPUT / name, self._record(name))

    def finish_shard(self, name: str, batches: int, aliases: Mapping[str, str], headers: Headers) -> None:
        """Assemble a weight file from its parts, which are memory-mapped and not read into memory."""
        paths = [self._part(name, batch) for batch in range(batches)]
        ties = once(aliases, headers)
        copies = {alias: target for alias, target in aliases.items() if alias not in ties}
        if copies or len(paths) > 1:
            self._save(name, whole(paths, copies), tie_metadata(ties))
        else:  # the part is the file
            self.write(name, partial(shutil.copyfile, paths[0]))
        parts, place = [path.with_suffix(".json") for path in paths], self._record(name)
        self._write_text(place, self._records.joined(place, self.folder / OUTPUT / name, parts))

    def records(self, names: Sequence[str]) -> Encoded:
        """Records of finished weight files, in order."""
        return Encoded.joined(self._records.of(self._record(name)) for name in names)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Sha256 of finished weight files by name, from when each was written."""
        return {name: digest_beside(self._record(name)) for name in names}

    def has(self, name: str) -> bool:
        """Return whether a file of the output is finished."""
        return (self.content / name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file of the output."""
        self._expect(name, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
        self._save(name, tensors, metadata)

    def _save(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        self.write(name, lambda path: save_file(tensors, path, metadata=metadata))

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the output; numbers that JSON lacks (NaN, infinity) become null."""
        self._write_json(self.folder / OUTPUT / name, data)

    def write_record(
        self, name: str, record: Mapping[str, Any], free: Collection[str] = (), *, foreign: bool = True
    ) -> None:
        """Write the record of a run to the output, with paths as seen from the folder that it is in.

        Args:
            name: Its path in the output.
            record: Plain data.
            free: Keys of what names no paths, and is written as it is.
            foreign: Write ``../NAME`` for what shares no folder with it.
        """
        told = {key: value for key, value in record.items() if key not in free}
        data = portable(told, (self.out / name).parent, foreign=foreign)
        self.write_json(name, {key: data.get(key, value) for key, value in record.items()})

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file of the output, whole or not at all.

        Args:
            name: Its path in the output.
            write: Writes it at the path that it is given.
        """
        self._replace(self.folder / OUTPUT / name, write)

    def _expect(self, name: str, headers: Headers) -> None:
        if name in self._expected:
            raise OutputError(f"{self.out}: two files would be called {name}. Rename one of them in the base's folder.")
        self._expected[name] = headers

    def read_back(self) -> None:
        """Compare the headers of everything that this run has written or found finished with what they must be."""
        for name, expected in self._expected.items():
            file = self.folder / OUTPUT / name
            found = {key: (info.dtype, info.shape) for key, info in SafetensorsFile(file).tensors.items()}
            if found != dict(expected):
                key = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
                self._record(name).unlink(missing_ok=True)  # so that it is made again
                raise CheckpointError(
                    f"{file}: tensor {key!r} is {found.get(key)}, expected {expected.get(key)}. To have the file made "
                    f"again, {self.again}."
                )

    def publish(self) -> None:
        """Read the output back, move it into place, and remove what only resuming needs.

        Raises:
            OutputError: If something else has taken the place.
            CheckpointError: If an input has changed, or a weight file does not hold what was to be written.
        """
        if not self.published:
            self._check_inputs()
            self.read_back()
            if self.out.exists():
                made = self.folder / OUTPUT
                raise OutputError(f"{self.out} has appeared in the meantime. The {self.what} is complete: move {made}.")
            with disk_errors(self.out, self.again):
                (self.folder / OUTPUT).rename(self.out)
        self._remove()

    def abandon(self) -> None:
        """Remove ``OUT.partial`` of a folder that is written at once, if this run began it."""
        if self._fresh:
            self._remove()

    def tidy(self) -> None:
        """Finish an interrupted clean-up behind an output that is in place; everything else stays."""
        if self.published or (self.folder.is_dir() and not any(self.folder.iterdir())):
            self._remove()

    def _remove(self) -> None:
        for name in (PARTS, RECORDS, OUTPUT):  # the state last: it says what the rest is
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, name: str, batch: int) -> Path:
        return self.folder / PARTS / name / f"{batch:05d}.safetensors"

    def _record(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.json"

    def _write_json(self, path: Path, data: Any) -> None:
        text = json_text(data)
        if len(text) < _PRETTY and path.is_relative_to(self.folder / OUTPUT):  # the encoder that indents is slow
            text = json_text(data, 2)
        self._write_text(path, text)

    def _write_text(self, path: Path, text: str) -> None:
        self._replace(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))

    def _replace(self, path: Path, write: Callable[[Path], Any]) -> None:
        replace_file(path, write, self.again)
