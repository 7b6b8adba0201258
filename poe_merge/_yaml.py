"""Read YAML and remember where everything stood, so that an error can say `config.yaml:7:5`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where it is wrong and what would be right."""


@dataclass
class Document:
    """Plain configuration data with the origin of its parts.

    Args:
        data: Nested dicts and lists, as YAML has them.
        origins: For places (paths of keys and indices) where they were written: `file:line:column`, or a flag.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)

    def origin(self, place: Place) -> str:
        """Where the nearest enclosing part of `place` was written; empty if nobody knows."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.origins:
                return self.origins[place[:length]]
        return ""

    def overridden(self, over: Document) -> Document:
        """This document with the values of another in place, section by section."""
        return Document(merged(self.data, over.data), {**self.origins, **over.origins})


def read_yaml(path: Path) -> Document:
    """Read one YAML file.

    Args:
        path: The file.

    Returns:
        Its data and the place of each part.

    Raises:
        ConfigError: If there is no such file, it is no YAML, a key is given twice, or it is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a configuration is a mapping, with `base_model: ...` and `models: ...`.")
    return Document(data, dict(_origins(node, (), str(path))))


def _origins(node: yaml.Node, place: Place, path: str) -> Iterator[tuple[Place, str]]:
    if not place:
        yield (), _where(node, path)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*place, index), _where(item, path)
            yield from _origins(item, (*place, index), path)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, str] = {}
        for key, value in node.value:
            name = str(getattr(key, "value", ""))
            if name in seen and name != "<<":
                raise ConfigError(f"{_where(key, path)}: `{name}` is given twice, first at {seen[name]}. Keep one.")
            seen[name] = _where(key, path)
            yield (*place, name), _where(key, path)
            yield from _origins(value, (*place, name), path)


def _where(node: yaml.Node, path: str) -> str:
    return f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def merged(data: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the values of `over` in place, section by section.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    both = dict(data)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
