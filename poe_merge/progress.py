"""Progress bars of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from poe_merge.console import console_for, shown
from poe_merge.quiet import is_quiet


class _Modules(ProgressColumn):
    """Column of a progress bar: the number of matrices that are solved."""

    @override
    def render(self, task: Task) -> Text:
        total = task.fields["modules"]
        return Text(f"{task.fields['solved']}/{total} matrices" if total else "")


class _Amount(DownloadColumn):
    """Bytes, or a sampler's steps."""

    @override
    def render(self, task: Task) -> Text:
        counted = task.fields.get("steps")
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} steps") if counted else super().render(task)


class Bars:
    """Progress bars on stderr; a context manager and an ``inference.models.merge.Progress``."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _Modules(),
            _Amount(),
            TimeRemainingColumn(compact=True),
            console=console_for(stderr=True),
            disable=is_quiet() or not sys.stderr.isatty(),
        )
        self._solved = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:  # rich before 15 ends even bars that never showed with an empty line
            self._progress.stop()

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        """Add the bar of a stage; the first one makes them appear."""
        self._progress.start()
        self._solved = 0
        self._task = self._progress.add_task(shown(stage), total=nbytes, modules=modules, solved=0)

    def steps(self, stage: str) -> Callable[[int, int], None]:
        """Add the bar of a sampler; what is returned moves it on."""
        self._progress.start()
        task = self._progress.add_task(shown(stage), total=None, modules=0, solved=0, steps=True)
        return lambda finished, total: self._progress.update(task, completed=finished, total=total)

    def advance(self, modules: int, nbytes: int) -> None:
        """Move the newest bar on."""
        self._solved += modules
        self._progress.update(self._task, advance=nbytes, solved=self._solved)
