"""The base of a merge of adapters, which their configs name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from poe_merge.settings import Document

_KEY = "base_model_name_or_path"


def with_base_of_adapters(document: Document, folders: Iterable[Path]) -> Document:
    """Fill in a ``base_model`` that is left out, where every model is an adapter and all name the same one.

    Args:
        document: The data of a configuration, which is changed.
        folders: Relative paths refer to these, or to the current folder.

    Returns:
        The document.
    """
    data, places = document.data, [*folders, Path()]
    models = data.get("models")
    if data.get("base_model") is not None or not isinstance(models, list) or not models:
        return document
    named = {_base_of(entry, places) for entry in models}
    (base,) = named if len(named) == 1 else (None,)
    if base is not None:
        data["base_model"] = base
        document.origins[("base_model",)] = document.origins.get(("models", 0), "")
    return document


def _base_of(entry: Any, places: Iterable[Path]) -> str | None:
    """The base that the adapter of an entry of ``models`` names, or None."""
    model = entry.get("model") if isinstance(entry, dict) else None
    if not isinstance(model, str):
        return None
    from poe_models.weights.json_files import read_object  # torch comes with it, and help needs none

    configs = (place / Path(model).expanduser() / "adapter_config.json" for place in places)
    try:
        found = next((read_object(config) for config in configs if config.is_file()), {})
    except ValueError:  # the adapter is refused by name when it is opened
        return None
    return found[_KEY] if isinstance(found.get(_KEY), str) else None
