"""Docstrings as Markdown: what they have of reStructuredText is roles and literal blocks; doctests become fenced."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?(?:[\w.]+\.)?(\w+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring without roles and double colons, its doctests in fences."""
    return _DOCTEST.sub(r"```pycon\n\g<0>\n```", _LITERAL.sub(":", _ROLE.sub(r"`\1`", text)))


class Markdown(Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
