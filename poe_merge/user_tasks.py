"""A user's module of tasks: two functions, ``network`` and ``tasks``, as ``inference.models.tasks`` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from inference.models.tasks import Task
from poe_merge.specs import SpecError, meant, module_of

__all__ = ["UserTasks", "read_function", "read_tasks"]


@dataclass(frozen=True, eq=False)
class UserTasks:
    """Tasks and network of a user's module.

    Attributes:
        tasks: The tasks, of different names.
        source: The module's file.
        network: Its function ``network(base)``, which makes the architecture that weights are loaded into.
    """

    tasks: tuple[Task, ...]
    source: Path
    network: Callable[[str], nn.Module]


def read_tasks(text: str, folders: Sequence[Path] = ()) -> UserTasks:
    """Import a module of tasks, which runs its code, and ask it for them.

    Args:
        text: ``FILE.py`` or ``module``, whose function ``tasks`` gives the tasks; ``FILE.py:NAME`` for another one.
        folders: Where relative files and plain modules are looked for; the current folder if empty.

    Raises:
        SpecError: If it does not import, lacks a function, or a function fails or gives something else.
    """
    where, _, name = text.partition(":") if not text.endswith(".py") else (text, "", "")
    what = f"tasks `{text}`"
    module = module_of(what, where, folders or [Path.cwd()])
    file = Path(str(module.__file__))
    function, network = (_function(what, module, each) for each in (name or "tasks", "network"))
    found = _called(what, file, function)
    listed = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    odd = next((each for each in listed if not isinstance(each, Task)), None)
    if odd is not None or not listed:
        got = "nothing" if not listed else type(odd).__name__
        raise SpecError(f"{what}: `{name or 'tasks'}()` gave {got}. Return a list of `inference.Task`.")
    names = [task.name for task in listed]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None:
        raise SpecError(f"{what}: two tasks are called {twice!r}. Give each a name of its own.")
    return UserTasks(tuple(listed), file, lambda base: _network(what, file, network, base))


@dataclass(frozen=True, eq=False)
class UserFunction:
    """A function of a user's module.

    Attributes:
        call: The function; whatever goes wrong in it is one ``SpecError`` with its cause.
        source: The module's file.
    """

    call: Callable[..., Any]
    source: Path


def read_function(what: str, text: str, folders: Sequence[Path] = ()) -> UserFunction:
    """Import a function ``FILE.py:NAME`` or ``module:NAME``, which runs the module's code.

    Args:
        what: What it is for, in messages.
        text: The module and the function.
        folders: Where relative files and plain modules are looked for; the current folder if empty.

    Raises:
        SpecError: If the module does not import or lacks the function.
    """
    where, _, name = text.rpartition(":")
    module = module_of(what, where, folders or [Path.cwd()])
    function, source = _function(what, module, name), Path(str(module.__file__))
    return UserFunction(lambda *arguments: _called(what, source, function, *arguments), source)


def _function(what: str, module: Any, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SpecError(
            f"{what}: {module.__file__} has no function `{name}`{meant(name, functions)}Define "
            f"`def {name}({'base' if name == 'network' else ''}): ...`."
        )
    return found


def _network(what: str, file: Path, function: Callable[..., Any], base: str) -> nn.Module:
    found = _called(what, file, function, base)
    if not isinstance(found, nn.Module):
        raise SpecError(f"{what}: `network(base)` gave {type(found).__name__}. Return the architecture, an nn.Module.")
    return found


def _called(what: str, file: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function; whatever goes wrong is one ``SpecError`` with its cause."""
    try:
        return function(*arguments)
    except Exception as error:
        shown = ", ".join(repr(each) if isinstance(each, str) else type(each).__name__ for each in arguments)
        raise SpecError(
            f"{what}: {file}: `{function.__name__}({shown})` failed: {type(error).__name__}: {error}"
        ) from error
