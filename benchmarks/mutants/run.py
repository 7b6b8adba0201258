"""Run the tests that guard a file against edits of it, in a copy of the checkout; the checkout is never written to.

Tests are collected once. A first run tells how long each takes and which functions it enters; then every edit gets a
fork in which the edited function's code replaces the original's, and meets only the tests that reach it, the quickest
first. An edit outside function bodies (a constant, a default) is written into the copy and imported afresh.
"""

from __future__ import annotations

import compileall
import gc
import importlib
import json
import multiprocessing
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from benchmarks.mutants.edits import Edit

LIBRARIES = ("torch", "pyro.infer", "scipy.stats", "scipy.optimize", "arviz", "matplotlib.pyplot", "safetensors.torch")
PACKAGES = ("poe_models", "inference", "diagnostics", "poe_merge", "benchmarks", "tests")
MEMORY = 8 << 30
"""Bytes of data a run may hold: an edited loop may not stop."""
PASSED, FAILED, BROKEN = 0, 1, 70
FORK = multiprocessing.get_context("fork")


class Broken(RuntimeError):
    """Something that says nothing of an edit."""


Report = Callable[[Edit, str], None]


@dataclass(frozen=True)
class Guarded:
    """One source file, the tests that guard it, and a copy of the checkout to run them in.

    Attributes:
        copy: the copy's root.
        file: path of the source file from there.
        tests: paths of test files from there; doctests of the file itself run as well.
        seconds: CPU time of the tests an edit may meet; the slowest beyond it are left out.
    """

    copy: Path
    file: str
    tests: tuple[str, ...]
    seconds: float

    @property
    def path(self) -> Path:
        """The source file in the copy."""
        return self.copy / self.file

    @property
    def arguments(self) -> list[str]:
        """What pytest is to collect."""
        return [self.file, *self.tests]

    def examine(self, edits: Sequence[Edit], outcomes: Connection) -> None:
        """Try edits one after another and send ``(key, outcome)`` for each, then None; in a process of its own."""
        os.setsid()
        try:
            self._examine(edits, lambda edit, outcome: outcomes.send(((edit.span, edit.new), outcome)))
        except Broken as error:
            outcomes.send(error)
        outcomes.send(None)

    def _examine(self, edits: Sequence[Edit], report: Report) -> None:
        source = self.path.read_text(encoding="utf-8")
        inside = Patched(self, source, [edit for edit in edits if edit.in_body], report)
        code = _exit_code(lambda: self._pytest([inside], writes=True))
        if code != PASSED:
            raise Broken(f"the tests of {self.file} do not pass without an edit:\n{self._log()[-4000:]}")
        reached = Reached.read(self.copy)
        for edit in (edit for edit in edits if not edit.in_body):
            tests = reached.chosen(edit, self.seconds)
            self.path.write_text(edit.applied(source), encoding="utf-8")
            chosen = Chosen(tests)
            report(edit, outcome_of(_exit_code(lambda: self._pytest([chosen]), 20 + 4 * sum(tests.values()))))  # noqa: B023
            self.path.write_text(source, encoding="utf-8")

    def _pytest(self, plugins: list[Any], writes: bool = False) -> int:
        """Pytest on the copy, in a forked process; its output goes to a file."""
        log = os.open(self.copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.copy)
        sys.dont_write_bytecode = not writes
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.path[:] = [str(self.copy), *sys.path]
        os.environ.update(PYTHONPATH=str(self.copy), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        # By its own name first: pytest would make a second module of a file that its package has imported.
        module = importlib.import_module(self.file.removesuffix(".py").replace("/", "."))
        if module.__file__ != str(self.path):
            raise Broken(f"{module.__file__} was imported instead of the copy in {self.copy}.")
        options = ["-q", "-s", "-x", "-p", "no:cacheprovider", f"--basetemp={self.copy}.tmp"]
        return pytest.main([*options, *self.arguments], plugins=plugins)

    def _log(self) -> str:
        return (self.copy / "log.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Reached:
    """What the run without an edit tells: CPU seconds of each test and first lines of the functions that it enters."""

    tests: Mapping[str, tuple[float, Sequence[int]]]

    @classmethod
    def read(cls, copy: Path) -> Reached:
        """What :func:`trace` wrote down."""
        return cls(json.loads((copy / "reached.json").read_text(encoding="utf-8")))

    def chosen(self, edit: Edit, seconds: float) -> dict[str, float]:
        """Tests that reach an edit and their CPU seconds, the quickest first, up to the time allowed."""
        kept: dict[str, float] = {}
        for own, name in sorted((own, name) for name, (own, lines) in self.tests.items() if edit.reached_by(lines)):
            if kept and own + sum(kept.values()) > seconds:
                break
            kept[name] = own
        return kept


@dataclass(frozen=True, eq=False)
class Chosen:
    """A pytest plugin that keeps some tests, in the order given."""

    tests: Mapping[str, float]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep and sort."""
        place = {name: i for i, name in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


@dataclass(frozen=True, eq=False)
class Patched:
    """A pytest plugin that runs the collected tests once as they are, then a few of them against every edit.

    Attributes:
        guarded: the file.
        source: its text.
        edits: edits in function bodies.
        report: told the outcome of each.
    """

    guarded: Guarded
    source: str
    edits: Sequence[Edit]
    report: Report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run in forks what pytest would run here."""
        copy, path = self.guarded.copy, str(self.guarded.path)
        if session.testsfailed or _exit_code(lambda: trace(session, path, copy / "reached.json")) != PASSED:
            session.testsfailed = max(1, session.testsfailed)
            return True
        reached = Reached.read(copy)
        functions = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == path]
        items = {item.nodeid: item for item in session.items}
        for edit in self.edits:
            tests = reached.chosen(edit, self.guarded.seconds)
            if not tests:
                self.report(edit, "not reached")
                continue

            def attempt(edit: Edit = edit, tests: Mapping[str, float] = tests) -> int:
                patch(functions, self.source, edit, path)
                return run_items(session, [items[name] for name in tests])

            self.report(edit, outcome_of(_exit_code(attempt, 10 + 4 * sum(tests.values()))))
        return True


def trace(session: pytest.Session, path: str, out: Path) -> int:
    """Run all tests and write down what each takes and enters."""
    reached: dict[str, tuple[float, list[int]]] = {}
    for item in session.items:
        lines: set[int] = set()

        def entered(frame: Any, event: str, argument: Any, lines: set[int] = lines) -> None:
            if frame.f_code.co_filename == path:
                lines.add(frame.f_code.co_firstlineno)

        start = time.process_time()
        sys.settrace(entered)
        code = run_items(session, [item])
        sys.settrace(None)
        reached[item.nodeid] = (time.process_time() - start, sorted(lines))
        if code != PASSED:
            return FAILED
    out.write_text(json.dumps(reached), encoding="utf-8")
    return PASSED


def run_items(session: pytest.Session, items: Sequence[pytest.Item]) -> int:
    """Run tests in this order up to the first that fails."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return FAILED
    return PASSED


def patch(functions: Sequence[FunctionType], source: str, edit: Edit, path: str) -> None:
    """Give live functions the code that the edit makes of them.

    Raises:
        Broken: no function has the edited code.
    """
    before, after = compile(source, path, "exec"), compile(edit.applied(source), path, "exec")
    changed = [(old, new) for old, new in _pairs(before, after) if old != new]
    patched = [(f, new) for f in functions for old, new in changed if f.__code__ == old]
    for function, new in patched:
        function.__code__ = new
    if not patched:
        raise Broken(f"line {edit.line}, {edit.text}: no function has this code.")


def _pairs(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Codes of functions within two codes of the same structure.

    Yields:
        The code in the first and its place's code in the second.
    """
    inner = [[const for const in code.co_consts if isinstance(const, CodeType)] for code in (before, after)]
    for old, new in zip(*inner, strict=False):
        yield old, new
        yield from _pairs(old, new)


def outcome_of(code: int) -> str:
    """What an ended run says of its edit: "survived", "timed out" or "killed".

    Raises:
        Broken: the run itself broke.
    """
    if code == BROKEN:
        raise Broken("an edit could not be tried; the end of the output above tells why.")
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        return "timed out"
    return "survived" if code in {PASSED, pytest.ExitCode.NO_TESTS_COLLECTED} else "killed"


def _exit_code(function: Callable[[], int], cpu_seconds: float | None = None) -> int:
    """Call a function in a fork and wait for the exit code that it returns; any exception in it is a failure."""

    def limited() -> None:
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        try:
            code = int(function())
        except BaseException as error:  # of an edited import, for instance
            traceback.print_exc(file=sys.__stderr__)
            code = BROKEN if isinstance(error, Broken) else FAILED
        sys.stdout.flush()
        os._exit(code)

    process = FORK.Process(target=limited)
    process.start()
    process.join()
    return process.exitcode or 0


def warm() -> None:
    """Import what the tests import anyway; nothing of this project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)


def copied(root: Path, copy: Path) -> Path:
    """A copy of the checkout's files, compiled so that an edited file is compiled anew and no other is."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    compileall.compile_dir(copy, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy
