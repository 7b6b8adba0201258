"""Sections of configuration files, and their validation: every mistake with its place and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from poe_merge.by_tensor import Setting
from poe_merge.settings import ConfigError, Document, Place, Value
from poe_merge.specs import nearest

__all__ = ["Section", "validated"]

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A section of the configuration. Keys without a value say nothing; unknown ones are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # a key's description, which is its help text, stands below it
    )

    @classmethod
    def valid_keys(cls) -> list[str]:
        """The keys as they are written in YAML."""
        return list(cls.model_fields)

    @classmethod
    def values(cls) -> dict[str, Value]:
        """Types of the keys that hold no further section."""
        marks = ((key, mark) for key, field in cls.model_fields.items() for mark in field.metadata)
        return {key: mark for key, mark in marks if isinstance(mark, Value)}

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.valid_keys()}

    def settings(self) -> dict[str, Setting[Any]]:
        """The settings that are given, by their key."""
        return {key: value for key, value in self if isinstance(value, Setting)}


def validated(
    document: Document,
    root: type[S],
    sections: Mapping[tuple[str, ...], type[Section]],
    folders: Iterable[Path],
    foreign: Mapping[str, str] | None = None,
) -> S:
    """Validate configuration data.

    Args:
        document: The data.
        root: The configuration.
        sections: Names of the keys that lead to a section, without indices, to the section.
        folders: Relative paths refer to these.
        foreign: Keys of other programs, and why they have no use here.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there are mistakes; lists all, each with its place and the nearest valid name.
    """
    problems = list(document.problems)
    try:
        config = root.model_validate(document.data, context={"folders": tuple(folders)})
    except ValidationError as error:
        order = {place: position for position, place in enumerate(document.origins)}
        found = [((*each["loc"], *each.get("ctx", {}).get("place", ())), each) for each in error.errors()]
        found.sort(key=lambda item: order.get(document.known(item[0]), -1))
        problems += [_one_line(place, each, document, sections, foreign or {}) for place, each in found]
    if problems:
        listed = "\n  ".join([f"{len(problems)} mistakes in the configuration:", *problems])
        raise ConfigError(problems[0] if len(problems) == 1 else listed)
    return config


def _one_line(
    place: Place,
    problem: Any,
    document: Document,
    sections: Mapping[tuple[str, ...], type[Section]],
    foreign: Mapping[str, str],
) -> str:
    """A mistake with its origin, its key, and what would be right."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        valid = sections[tuple(part for part in place[:-1] if isinstance(part, str))].valid_keys()
        message = _unknown_key(str(place[-1]), valid, foreign)
    elif problem["type"] == "missing":
        flag = str(place[-1]).replace("_", "-").replace("models", "model")
        where = f": write it in the YAML file, or give --{flag}" if len(place) == 1 else ""
        message = f"`{place[-1]}` is missing{where}"
    elif problem["type"] not in ("value_error", "misplaced"):
        message = f"{message}, got {problem['input']!r}"
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    origin = document.origins.get(document.known(place), "")
    known = (origin,) if origin.startswith("--") else (origin, dotted)
    end = "" if message.endswith(("?", ".")) else "."
    return ": ".join(part for part in (*known, message + end) if part)


def _unknown_key(key: str, valid: list[str], foreign: Mapping[str, str]) -> str:
    if key in foreign:
        return f"mergekit's `{key}` is refused: {foreign[key]}. Leave it out"
    return f"unknown key `{key}`; {nearest(key, valid)}Valid keys: {', '.join(valid)}"
