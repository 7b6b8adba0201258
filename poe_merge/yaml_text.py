"""Parser of YAML of bounded size, aliases written out: a few lines cannot expand to gigabytes."""

from __future__ import annotations

from typing import Any

import yaml
from typing_extensions import override

LARGEST, DEEPEST = 20_000, 32
"""Most values, aliases written out, and most levels of nesting; a text has at most 50 characters per value."""


class YamlError(ValueError):
    """Text that is no YAML, or YAML that is too large; the message has the line."""


class _TooLarge(yaml.YAMLError):
    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem)
        self.problem_mark = mark


def read(text: str, source: str = "") -> tuple[yaml.Node | None, Any]:
    """Parse YAML into its nodes, which know their lines, and plain data.

    Args:
        text: The YAML.
        source: Name of its file for messages, or nothing.

    Returns:
        The root node, None if the text is empty, and the data.

    Raises:
        YamlError: If it is no YAML, or too large or deep once its aliases are written out.
    """
    try:
        _require_small(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}: " if mark and source else f"{source}: " if source else ""
        raise YamlError(f"{where}not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML lets Python's own through
        raise YamlError(f"{source}{': ' if source else ''}not valid YAML: {error}.") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the place of a value that Python refuses, such as the date 2020-13-41."""

    @override
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def _require_small(text: str) -> None:
    """Count values by the parser's events, which are made one by one and without expanding anything."""
    if len(text) > 50 * LARGEST:
        raise _TooLarge(f"it has more than {50 * LARGEST:,} characters")
    sizes: dict[str | None, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in opened):
                raise _TooLarge(f"{event.anchor!r} contains itself", event.start_mark)
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            total += 1
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = total - before
        if total > LARGEST or len(opened) > DEEPEST:
            what = f"more than {LARGEST:,} values, aliases written out" if total > LARGEST else "too many levels"
            raise _TooLarge(f"it has {what}", event.start_mark)
