"""Import the classes a user names in a spec, and say in one line what is wrong where that fails."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_FILE_MODULE = "_poe_merge_file_"


class SpecError(ValueError):
    """A spec that cannot be read, or names something that is not there."""


def custom_class(what: str, where: str, name: str, base: type, folders: Sequence[Path]) -> Any:
    """Import class `name` from module or file `where`.

    Args:
        what: How an error message starts.
        where: ``my_module`` or ``path/to/file.py``.
        name: Name of the class.
        base: What the class has to derive from.
        folders: Where files and modules are looked for first.

    Returns:
        The class.

    Raises:
        SpecError: If the file does not import, or has no such class, or the class is of another kind.
    """
    module = _from_file(what, where, folders) if where.endswith(".py") else _from_name(what, where, folders)
    found = getattr(module, name, None)
    at = getattr(module, "__file__", None) or where
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        known = ", ".join(key for key in classes if key != base.__name__) or f"no class derived from {base.__name__}"
        raise SpecError(f"{what}: {at} has no `{name}`; it has {known}.")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecError(f"{what}: `{name}` in {at} is no {base.__name__}. Write `class {name}({base.__name__}): ...`.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise SpecError(f"{what}: `{name}` in {at} lacks {missing}. Define it.")
    return found


def custom_prefix(found: type) -> str:
    """How a class is found again: ``module:`` or ``/absolute/file.py:``."""
    if found.__module__.startswith(_FILE_MODULE):
        return f"{source_file(found)}:"
    return f"{found.__module__}:"


def source_file(found: type) -> Path | None:
    """The file that defines a class, if it has one."""
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    return Path(file) if file else None


def _from_file(what: str, where: str, folders: Sequence[Path]) -> ModuleType:
    candidates = [folder / Path(where).expanduser() for folder in folders]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise SpecError(f"{what}: there is no file {' or '.join(str(path) for path in candidates)}.")
    file = file.resolve()
    name = _FILE_MODULE + hashlib.sha256(str(file).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SpecError(f"{what}: {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    try:
        with _first_on_path([file.parent]), _one_error(what, file):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(what: str, where: str, folders: Sequence[Path]) -> ModuleType:
    file = next((folder / f"{where}.py" for folder in folders if (folder / f"{where}.py").is_file()), None)
    if file is not None:  # by its path: whatever else is called so does not matter
        return _from_file(what, str(file), folders)
    with _first_on_path(folders), _one_error(what, Path(where)):
        importlib.invalidate_caches()
        return importlib.import_module(where)


@contextmanager
def _first_on_path(folders: Sequence[Path]) -> Iterator[None]:
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


@contextmanager
def _one_error(what: str, file: Path) -> Iterator[None]:
    """Turn whatever an import raises into one `SpecError` with the file, its line and the cause."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        raise SpecError(f"{what}: {file}{line} does not import: {type(error).__name__}: {error}") from error
