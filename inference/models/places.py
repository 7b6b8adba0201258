"""Paths in the records of folders that people publish: relative to the folder, not those of one machine.

An input beside the merged folder is ``../base`` in ``poe_merge.json``, a snapshot in the Hub's cache is its id and
revision, ``org/name@0123abc``. What shares no folder with the output but the root, or the folder of all homes, is
``../NAME`` as well: there, as everywhere, putting it (or a link) beside the merged folder is how it is found again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from poe_models.weights.loading import model_and_adapter

_HUB_FOLDER = re.compile(r"models--([^/\\]+)--([^/\\]+)")
_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]+)$")
_REVISION = re.compile(r"([\w.-]+)/([\w.-]+)@([0-9a-f]+)")
_QUOTED = re.compile(r"(?<=')\.{0,2}/[^']*(?=')|(?<=\")\.{0,2}/[^\"]*(?=\")")
_ON = re.compile(r"\+(?=\.{0,2}/|[\w.-]+/[\w.-]+@[0-9a-f]+$)")  # of MODEL+ADAPTER
_CODE = re.compile(r"(.+\.py)(:[A-Za-z_]\w*(?:\(.*\))?)", re.DOTALL)
"""A class or function of the user's own: its file, and how it is called."""
_ROLE = re.compile(r"(?:model under )*anchor ")


def portable(data: Any, folder: Path, *, foreign: bool = True) -> Any:
    """Plain data with the absolute paths of things that are there written as seen from a folder.

    Args:
        data: Plain data; paths are whole strings or keys, several in ``MODEL+ADAPTER``, follow ``anchor``, stand in
            quotes, or are files of code as in ``FILE.py:Name(1.0)``.
        folder: The folder that the record is in.
        foreign: Write ``../NAME`` for what shares no folder with it; left absolute otherwise, so that it is found.

    Returns:
        A copy.

    >>> portable({"source": str(Path.cwd() / "x")}, Path.cwd() / "merged")["source"] in ("../x", str(Path.cwd() / "x"))
    True
    """
    whole = folder.absolute()
    return _changed(data, lambda text: _relative(text, whole, foreign) if text.startswith("/") else None)


def resolved(data: Any, folder: Path) -> Any:
    """Plain data with the paths that :func:`portable` wrote made absolute again.

    Args:
        data: Plain data.
        folder: The folder that the record is in, wherever that is now.

    Returns:
        A copy.
    """

    def absolute(text: str) -> str | None:
        if text.startswith(("../", "./")):
            return os.path.normpath(folder.absolute() / text)
        found = _REVISION.fullmatch(text)
        cached = Path(HF_HUB_CACHE, f"models--{found[1]}--{found[2]}", "snapshots", found[3]) if found else None
        return str(cached) if cached is not None and cached.is_dir() else None

    return _changed(data, absolute)


def without_places(text: str) -> str:
    """A text whose quoted absolute paths are names alone: the same wherever the files are.

    >>> without_places("Fisher('/data/stats')")
    "Fisher('stats')"
    """
    return _QUOTED.sub(lambda found: Path(found[0]).name, text)


def _relative(text: str, folder: Path, foreign: bool) -> str | None:
    path = Path(text)
    if not os.path.exists(text):
        return None
    revision, model = _SNAPSHOT.search(text), hub_id(text)
    if revision is not None and model is not None:
        return f"{model}@{revision[1]}"
    common = Path(os.path.commonpath([path, folder]))
    if common in (Path(path.anchor), Path.home().parent):
        return f"../{path.name}" if foreign else None
    seen = Path(os.path.relpath(path, folder)).as_posix()
    return f"{seen}/" if seen in (".", "..") else seen if seen.startswith("../") else f"./{seen}"


def _changed(data: Any, change: Callable[[str], str | None]) -> Any:
    if isinstance(data, Mapping):
        keys = [_changed(key, change) for key in data]
        names = keys if len(set(keys)) == len(keys) else data  # two places of one name: neither is changed
        return {name: _changed(value, change) for name, value in zip(names, data.values(), strict=True)}
    if isinstance(data, list | tuple):
        return [_changed(value, change) for value in data]
    return _text(data, change) if isinstance(data, str) else data


def _text(text: str, change: Callable[[str], str | None]) -> str:
    role = _ROLE.match(text)
    prefix = role[0] if role else ""
    rest = text.removeprefix(prefix)
    if (code := _CODE.fullmatch(rest)) is not None:
        return f"{prefix}{change(code[1]) or code[1]}{_QUOTED.sub(lambda found: change(found[0]) or found[0], code[2])}"
    parts = _parts(rest)
    found = [change(part) for part in parts]
    if any(each is not None for each in found):
        return prefix + "+".join(each or part for each, part in zip(found, parts, strict=True))
    return _QUOTED.sub(lambda found: change(found[0]) or found[0], text)


def _parts(text: str) -> list[str]:
    """The text, or the model and the adapters that it names."""
    if not os.path.isabs(text):
        return [text] if os.path.exists(text) else _ON.split(text)
    found = model_and_adapter(text)
    return [text] if found is None else [found[0], *_parts(found[1])]


def hub_id(source: str) -> str | None:
    """The Hub's id of a downloaded model.

    >>> hub_id("/cache/models--org--name/snapshots/0123abc")
    'org/name'
    """
    found = _HUB_FOLDER.search(source)
    return f"{found[1]}/{found[2]}" if found else None


def short_source(source: str) -> str:
    """A checkpoint's name without the folders of the machine it was on."""
    path = Path(source)
    generic = path.stem in ("model", "pytorch_model", "adapter_model")
    return hub_id(source) or (f"{path.parent.name}/{path.name}" if generic else path.name)
