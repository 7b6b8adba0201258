"""Texts to print: results in a few lines without arrays, sizes in bytes, and untrusted text with escapes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from typing_extensions import override

MOST_NAMES, LONGEST_TEXT = 4, 60


class Brief:
    """Base of dataclasses that print their fields in brief; it has none of its own.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Curve(Brief):
    ...     names: tuple[str, ...]
    ...     values: torch.Tensor
    >>> Curve(("a", "b"), torch.zeros(2, 500))
    Curve(names=('a', 'b'), values=float32 (2, 500))
    """

    @override
    def __repr__(self) -> str:
        texts = [f"{item.name}={_shortened(getattr(self, item.name))}" for item in fields(self)]  # type: ignore[arg-type]
        return textwrap.fill(f"{type(self).__name__}({', '.join(texts)})", 120, subsequent_indent="    ")


def _shortened(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a tensor or an array
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return f"{{{_listed([*value])}}}"
    if isinstance(value, Sequence):
        return f"({_listed(value)})"
    return f"{type(value).__name__}(...)" if is_dataclass(value) and isinstance(value, Brief) else str(value)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def _listed(items: Sequence[Any]) -> str:
    """The first of several names, one text that all have, or the number of other things."""
    if not all(isinstance(item, str) for item in items):
        return f"{len(items)} x {type(items[0]).__name__}"
    if len(items) > 1 and len(set(items)) == 1:
        return f"{len(items)} x {_quoted(items[0])}"
    shown = ", ".join(map(_quoted, items[:MOST_NAMES]))
    return f"{shown}, ... {len(items)} in all" if len(items) > MOST_NAMES else shown


def size_text(nbytes: float) -> str:
    """A number of bytes as text.

    >>> size_text(0), size_text(1536), size_text(215_000), size_text(3 * 10**9)
    ('0 bytes', '1.5 kB', '215.0 kB', '3.0 GB')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def visible(text: str) -> str:
    r"""Text with control characters and other unprintable ones escaped.

    >>> print(visible("fc\x1b[2J.weight"))
    fc\x1b[2J.weight
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
