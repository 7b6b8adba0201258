"""Explanations of a command's exceptions to the person who typed it: one message, and the exit status."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from poe_merge.specs import meant, nearest

LESS_MEMORY = "Free memory or take a larger machine; `poe-merge plan` says how much a merge takes."


def explained(error: Exception, arguments: Sequence[str], command: Any) -> tuple[str, int]:
    """Explain an exception.

    Args:
        error: The exception.
        arguments: What was typed.
        command: The group of commands.

    Returns:
        The message, and the status: 2 for anything wrong with the input, 1 for an error of the program.
    """
    if hasattr(error, "format_message"):  # typer's own, which come from either of two libraries
        return _usage(error, arguments, command), 2
    wrong_input = _is_wrong_input(error)
    return _text(error, wrong_input), 2 if wrong_input else 1


def _is_wrong_input(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError):
        return True
    from inference.models.disk import OutputError
    from inference.models.memory import OutOfMemory, is_out_of_memory

    return isinstance(error, OutputError | OutOfMemory) or is_out_of_memory(error)


def _text(error: Exception, wrong_input: bool) -> str:
    from inference.models.memory import OutOfMemory, is_out_of_memory

    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        return f"out of memory ({str(error).partition('.')[0] or type(error).__name__}). {LESS_MEMORY}"
    return str(error) if wrong_input else f"{type(error).__name__}: {error} (--debug shows where)"


def _usage(error: Any, arguments: Sequence[str], command: Any) -> str:
    """A mistyped command or option, with the nearest that exists."""
    message: str = error.format_message()
    commands = getattr(command, "commands", {})
    if unknown := re.match(r"No such command '(.*?)'", message):
        return f"no command `{unknown[1]}`{meant(unknown[1], commands)}Commands: {', '.join(commands)}."
    if option := getattr(error, "option_name", None):
        used = next((commands[word] for word in arguments if word in commands), command)
        valid = [name for parameter in used.params for name in [*parameter.opts, *parameter.secondary_opts]]
        if option not in valid:
            where = f"poe-merge {used.name}" if used is not command else "poe-merge"
            close = nearest(option, [name for name in valid if name.startswith("-")])
            hint = "λ is `--scaling`. " if option == "--lambda" else close
            return f"no option `{option}`; {hint}See `{where} --help`."
    return message
