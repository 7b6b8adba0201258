"""Text from other people's files as it may be shown: nothing in it is obeyed, nothing in it is hidden."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""Text with everything that a terminal would obey, or not show, written out.

    >>> print(visible("fc\x1b[2J.weight"))
    fc\x1b[2J.weight
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
