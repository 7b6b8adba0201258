"""How many single edits of the core the tests notice: `python -m benchmarks.mutants` (or `make mutants`).

Samples edits of every file named in `table.toml`, runs the tests named there against each, and writes
`benchmarks/results/mutants.md`. What is known of each file is kept in `out/mutants` until the file changes.

A script of its own because mutmut leaves decorated methods out, and here nearly every method is an `@override`, and
cosmic-ray edits the checkout itself and starts a fresh interpreter (five seconds of imports) for every edit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from benchmarks.mutants.edits import edits_of
from benchmarks.mutants.report import LEFT_OUT, FileResult, Tried, digest_of, judged, markdown, with_stored
from benchmarks.mutants.run import FORK, Guarded, copied, warm

TABLE = Path(__file__).with_name("table.toml")
OUT = Path("out/mutants")


def sampled(file: str, table: dict[str, Any], per_file: int, seed: int) -> FileResult:
    """The edits of one file that are to be tried; more per file are the same ones and others.

    Raises:
        ValueError: the table judges an edit that the file does not have.
    """
    source = Path(file).read_text(encoding="utf-8")
    lines = source.splitlines()
    every = [judged(Tried.of(edit, lines), file, table) for edit in edits_of(source)]
    for entry in (entry for kind in LEFT_OUT for entry in table.get(kind, []) if entry["file"] == file):
        if not any(each.code == entry["code"] and entry.get("edit", each.edit) == each.edit for each in every):
            raise ValueError(f"`{TABLE.name}` judges an edit that {file} no longer has: {entry}. Take the entry out.")
    random.Random(f"{seed} {file}").shuffle(every)
    tried = sorted(every[:per_file], key=lambda each: (each.span, each.new))
    return FileResult(file, digest_of(source), len(every), tuple(tried))


class Job:
    """The process that tries one file's edits.

    Args:
        work: the file, its tests and a copy to run them in.
        result: what is known of its edits.
        bar: its progress bar.
    """

    def __init__(self, work: Guarded, result: FileResult, bar: TaskID) -> None:
        self.work, self.result, self.bar = work, result, bar
        self.outcomes, sender = FORK.Pipe(duplex=False)
        wanted = {each.key for each in result.open}
        edits = [edit for edit in edits_of(work.path.read_text(encoding="utf-8")) if (edit.span, edit.new) in wanted]
        self.process = FORK.Process(target=work.examine, args=(edits, sender))
        self.process.start()
        sender.close()

    def advance(self, progress: Progress) -> bool:
        """Take one message of the process; whether it was the last.

        Raises:
            Broken: the file's tests do not pass without an edit.
        """
        message = self.outcomes.recv()
        if isinstance(message, Exception):
            raise message
        if message is None:
            self.process.join()
            return True
        self.result = self.result.with_outcome(*message)
        self.result.write(OUT)
        done = f"{self.work.file} ({self.result.count('survived', 'not reached')} left)"
        progress.update(self.bar, advance=1, description=done, refresh=True)
        return False

    def stop(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)


def run_all(results: Sequence[FileResult], guards: Mapping[str, Sequence[str]], jobs: int, seconds: float) -> None:
    """Work through the files, each in a process and a copy of its own; nothing outlives an interruption.

    Raises:
        Broken: a file's tests do not pass without an edit.
    """
    queue = list(results)
    running: dict[Any, Job] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(auto_refresh=False) as progress:
        idle = [copied(Path.cwd(), Path(folder).resolve() / str(job)) for job in range(jobs)]
        try:
            while queue or running:
                while idle and queue:
                    result = queue.pop(0)
                    work = Guarded(idle.pop(), result.file, tuple(guards[result.file]), seconds)
                    job = Job(work, result, progress.add_task(work.file, total=len(result.open)))
                    running[job.outcomes] = job
                for outcomes in wait(list(running)):
                    job = running[outcomes]
                    if job.advance(progress):
                        idle.append(running.pop(outcomes).work.copy)
        finally:
            for job in running.values():
                job.stop()


def main() -> None:
    """Try the edits that are not known yet and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", help="source files; all of the table by default")
    parser.add_argument("--per-file", type=int, default=25, help="edits sampled from each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=12, help="CPU time of the tests an edit may meet")
    parser.add_argument("--survivors", action="store_true", help="try those again that survived before")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mutants.md"))
    arguments = parser.parse_args()
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up as after Ctrl-C
    warm()
    every = [sampled(file, table, arguments.per_file, arguments.seed) for file in table["guards"]]
    if unknown := [file for file in arguments.files if file not in table["guards"]]:
        parser.error(f"{TABLE.name} names no tests that guard {', '.join(unknown)}")
    wanted = arguments.files or list(table["guards"])
    again = [with_stored(r, OUT, arguments.survivors and r.file in wanted) for r in every]
    try:
        run_all(
            [result for result in again if result.file in wanted and result.open],
            table["guards"],
            arguments.jobs,
            arguments.seconds,
        )
    finally:
        known = [with_stored(result, OUT, False) for result in every]
        numbers = f"--per-file {arguments.per_file} --seed {arguments.seed} --seconds {arguments.seconds:g}"
        options = " ".join([*arguments.files, numbers])
        judged = [r for r in known if r.count("killed", "timed out", "survived", "not reached")]
        arguments.out.write_text(markdown(judged, options), encoding="utf-8")


if __name__ == "__main__":
    main()
