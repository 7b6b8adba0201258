"""Consent to code: modules that a file names are imported, which runs them, only with ``--allow-code``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from poe_merge.settings import ConfigError, Document, Place
from poe_merge.specs import names_code


def refuse_code(document: Document, keys: Set[str]) -> None:
    """Refuse modules that a file names, before any is imported; those that were typed as flags are fine.

    Args:
        document: The configuration.
        keys: Keys whose values may name a class.

    Raises:
        ConfigError: If there is one.
    """
    for place, text in _texts(document.data, ()):
        origin = document.origins.get(document.known(place), "")
        if not keys.isdisjoint(place) and not origin.startswith("--") and names_code(text):
            raise ConfigError(
                f"{origin}{': ' if origin else ''}`{text}` is code of one's own, which would be run. If you trust it, "
                "add --allow-code (in Python: `allow_code=True`), or type it as a flag."
            )


def refuse_file(document: Document, place: tuple[str, str]) -> None:
    """Refuse a file of code that a configuration names in a key of a section; one that was typed as a flag is fine.

    Raises:
        ConfigError: If there is one.
    """
    section: Any = document.data.get(place[0])
    named = section.get(place[1]) if isinstance(section, Mapping) else None
    origin = document.origins.get(document.known(place), "")
    if named is not None and not origin.startswith("--"):
        raise ConfigError(
            f"{origin}{': ' if origin else ''}`{place[1]}: {named}` is code of one's own, which would be run. If you "
            f"trust it, add --allow-code (in Python: `allow_code=True`), or type it as --{place[1]}."
        )


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    # Every text in nested data, with its place.
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, (*place, key))
