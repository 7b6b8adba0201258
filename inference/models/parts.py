"""Finished parts of a weight file: their digests, their records, and the further names of tied tensors."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from inference.models.digest import file_digest
from inference.models.plain_json import Encoded, json_text, plain


class Records:
    """Records of parts and weight files, each in a file of lines beside its own: a digest, then a record in each line.

    The lines of a part become those of its weight file as they are, and what this process has written it need not
    parse again: with very many tensors that is much of the time.
    """

    def __init__(self) -> None:
        self._known: dict[Path, Encoded] = {}

    def text(self, place: Path, file: Path, records: Sequence[Any]) -> str:
        """Content of the records' file of a finished part, which will be at ``place``."""
        told = [plain(record) for record in records]
        self._known[place] = Encoded([data for _, data in told], [line for line, _ in told])
        return _lines(file, self._known[place].lines)

    def joined(self, place: Path, file: Path, parts: Sequence[Path]) -> str:
        """The same of a weight file, from the records' files of its parts."""
        if all(part in self._known for part in parts):
            self._known[place] = Encoded.joined(self._known.pop(part) for part in parts)
            return _lines(file, self._known[place].lines)
        return _lines(file, [line for part in parts for line in _read(part)[1:]])

    def of(self, place: Path) -> Encoded:
        """The records of a part or weight file."""
        if place not in self._known:
            lines = _read(place)[1:]
            self._known[place] = Encoded(map(json.loads, lines), lines)
        return self._known[place]


def _lines(file: Path, records: Iterable[str]) -> str:
    return "\n".join([json_text({"sha256": file_digest(file)}), *records])


def _read(place: Path) -> list[str]:
    return place.read_text(encoding="utf-8").rstrip("\n").split("\n")


def finished(file: Path, parts: Path) -> bool:
    """True for a file of an interrupted run that is progress; a part of the folder is, once its records are beside it.

    >>> finished(Path("out/parts/model/00000.safetensors"), Path("out/parts"))
    False
    """
    return file.suffix != ".tmp" and (not file.is_relative_to(parts) or file.with_suffix(".json").exists())


def intact(file: Path, place: Path) -> bool:
    """True if a file has the digest that was recorded when it was written."""
    try:
        return digest_beside(place) == file_digest(file)
    except (OSError, ValueError, KeyError):
        return False


def digest_beside(place: Path) -> str:
    """The digest of a part or weight file in its records' file."""
    with place.open(encoding="utf-8") as lines:
        found = json.loads(lines.readline())
    return str(found["sha256"]) if set(found) == {"sha256"} else ""  # records beside it: of 0.1


def once(aliases: Mapping[str, str], held: Container[str]) -> dict[str, str]:
    """The further names that a file notes in its metadata, and does not hold tensors for."""
    return {alias: target for alias, target in aliases.items() if alias not in held}


def whole(parts: Sequence[Path], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of all parts, memory-mapped, and those of further names that are written with equal values."""
    tensors: dict[str, Tensor] = {}
    for path in parts:
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors | {alias: tensors[target] for alias, target in copies.items()}
