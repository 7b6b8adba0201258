"""Places of the tensors in a PyTorch file, whose bytes are read without touching the map of the file."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

_LOCAL = struct.Struct("<26xHH")
"""Header of a zip member: the lengths of its name and its extra field, which come before its bytes."""


def address_of_file(path: Path, storages: Collection[tuple[int, int]]) -> int | None:
    """Address at which a PyTorch file of the zip format is mapped.

    Args:
        path: The file.
        storages: Address and size of every storage that was loaded from its map.

    Returns:
        The address of its first byte; None if the storages are not its members, as they lie there and in this
        machine's byte order.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        swapped = "byteorder" in members and archive.read(members["byteorder"]) != sys.byteorder.encode()
        places = sorted(
            (_start(file, member), member.file_size)
            for name, member in members.items()
            if name.startswith("data/") and member.file_size and member.compress_type == zipfile.ZIP_STORED
        )
    found = sorted(storage for storage in storages if storage[1])
    first = found[0][0] - places[0][0] if found and places else 0
    same = found == [(first + start, size) for start, size in places]
    return first if same and not swapped else None


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset)
    return member.header_offset + _LOCAL.size + sum(_LOCAL.unpack(file.read(_LOCAL.size)))
